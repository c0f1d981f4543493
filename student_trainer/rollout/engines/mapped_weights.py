"""A file of weights as the memory that it lies in: its tensors without a copy, shared with the process that has it mapped too.

In: a safetensors file of this machine; out: a tensor of each name. Where there is a GPU the memory is registered with CUDA, so that copies to and
from it go at the full speed of the bus, several times that of pageable memory. Nobody may cut the file while it is mapped.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MappedWeights:
    """See module.

    Args:
        file: written by safetensors, in memory (/dev/shm) or on a disk.
        registered: whether its memory is registered with CUDA if it can be; a machine that refuses copies more slowly.

    Attributes:
        tensors: by name, those whose dtype is in `DTYPES`; writing to one writes to the file.
        is_registered: whether copies are fast.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, file: Path, *, registered: bool) -> None:
        self._status = file.stat()
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        bytes_ = torch.from_file(str(file), shared=True, size=self._status.st_size, dtype=torch.uint8)
        self.tensors: Mapping[str, Tensor] = {
            name: found
            for name, said in header.items()
            if name != "__metadata__" and (found := _tensor(bytes_, 8 + length, said)) is not None
        }
        self.is_registered = registered and _register(bytes_)
        if self.is_registered:  # before the mapping goes, which the views hold
            weakref.finalize(self, _unregister, bytes_.data_ptr())

    def is_of(self, file: Path) -> bool:
        """Whether the name still leads to this very file, and not to one that has taken its place."""
        now = file.stat()
        return os.path.samestat(now, self._status) and now.st_size == self._status.st_size


def _tensor(bytes_: Tensor, begin: int, said: Mapping[str, object]) -> Tensor | None:
    """A view; None where it cannot be one."""
    dtype, offsets = DTYPES.get(str(said["dtype"])), said["data_offsets"]
    assert isinstance(offsets, list)
    start, stop = begin + offsets[0], begin + offsets[1]
    if dtype is None or start % dtype.itemsize:
        return None
    return bytes_[start:stop].view(dtype).view(torch.Size(said["shape"]))  # type: ignore[arg-type]


def _register(bytes_: Tensor) -> bool:
    """Whether CUDA has taken the memory."""
    if not torch.cuda.is_available():
        return False
    torch.cuda.init()
    if int(torch.cuda.cudart().cudaHostRegister(bytes_.data_ptr(), bytes_.numel(), 0)) == 0:
        return True
    with contextlib.suppress(
        RuntimeError
    ):  # CUDA remembers what it has refused, and the next kernel would be blamed for it
        torch.zeros(1, device="cuda")
    return False


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
