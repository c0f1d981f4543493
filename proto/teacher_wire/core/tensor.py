"""Arrays with the type they have on the wire. bfloat16 is held as its uint16 bit patterns, since numpy has no such type."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from teacher_wire.core.errors import TensorError

# wire dtype -> (numpy dtype in memory, bytes an element on the wire)
DTYPES: dict[str, tuple[str, int]] = {
    "uint8": ("uint8", 1),
    "uint16": ("uint16", 2),
    "uint24": ("uint32", 3),
    "int32": ("int32", 4),
    "int8": ("int8", 1),
    "float16": ("float16", 2),
    "bfloat16": ("uint16", 2),
    "float32": ("float32", 4),
}
FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Tensor:
    """An array and the type it has on the wire (`bfloat16` is held as uint16 bits)."""

    dtype: str
    array: np.ndarray

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise TensorError("unknown dtype", field="dtype", value=self.dtype, limit="|".join(DTYPES))
        if self.array.dtype != np.dtype(DTYPES[self.dtype][0]):
            raise TensorError(
                f"{self.dtype} is held as {DTYPES[self.dtype][0]}", field="array.dtype", value=self.array.dtype
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def payload_bytes(self) -> int:
        """Bytes of the data on the wire."""
        return self.array.size * DTYPES[self.dtype][1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the first axis, without a copy."""
        return Tensor(self.dtype, self.array[start:stop])

    def as_float32(self) -> np.ndarray:
        """The values as float32, same shape."""
        if self.dtype == "bfloat16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)


def float32(array: np.ndarray) -> Tensor:
    """A float32 tensor of `array`."""
    return Tensor("float32", np.ascontiguousarray(array, dtype=np.float32))


def token_id_dtype(vocab_rows: int) -> str:
    """The narrowest wire type that holds every id below `vocab_rows`."""
    return "uint16" if vocab_rows <= 1 << 16 else "uint24"
