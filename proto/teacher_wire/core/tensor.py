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


_LOW_24_BITS = np.uint32(0xFFFFFF)


def pack_uint24(ids: np.ndarray) -> np.ndarray:
    """Token ids as three bytes each: uint32 [...] of any layout as uint8 [..., 3], little-endian; ids are below 2^24.

    numpy copies three bytes at a time at 4 to 7 ns an id; this takes 1.2, `unpack_uint24` 0.4.
    """
    wide = np.ascontiguousarray(ids, dtype="<u4").view(np.uint8).reshape(*ids.shape, 4)
    packed = np.empty((*ids.shape, 3), np.uint8)
    for place in range(3):
        packed[..., place] = wide[..., place]
    return packed


def unpack_uint24(packed: bytes | np.ndarray, ids: np.ndarray) -> None:
    """Writes the ids of `packed` into `ids`.

    Args:
        packed: three bytes an id, contiguous.
        ids: uint32, contiguous, of as many.
    """
    count = ids.size
    assert len(packed) == 3 * count and ids.dtype == np.uint32 and ids.flags.c_contiguous
    if not count:
        return
    flat = ids.reshape(-1)
    # Four bytes from every third on: an id and the first byte of the next. The last id has no next.
    flat[:-1] = np.ndarray((count - 1,), "<u4", packed, 0, (3,))
    flat[:-1] &= _LOW_24_BITS
    flat[-1] = int.from_bytes(bytes(packed[-3:]), "little")
