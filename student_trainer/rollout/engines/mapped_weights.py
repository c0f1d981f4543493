"""A file of weights as the memory that it lies in: its tensors without a copy, shared with the process that has it mapped too.

In: a safetensors file of this machine; out: a tensor of each name. A file that lies in memory (/dev/shm) can be registered with CUDA: copies
between it and a GPU then go at the full speed of the bus, several times that of pageable memory. That takes longer than one such copy saves,
and keeps the pages where they are. Nobody may cut the file while it is mapped.
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

_MEMORY = Path("/dev/shm")  # pages of a disk's files must stay free to be written back
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MappedWeights:
    """See module.

    Args:
        file: written by safetensors.

    Attributes:
        tensors: by name, those whose dtype is in `DTYPES`; writing to one writes to the file.
        is_registered: whether copies are fast.

    Raises:
        OSError: it cannot be read or mapped, or is none of safetensors'.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._status = file, file.stat()
        self.is_registered = False
        try:
            with file.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(length))
            self._bytes = torch.from_file(str(file), shared=True, size=self._status.st_size, dtype=torch.uint8)
            self.tensors: Mapping[str, Tensor] = {
                name: found
                for name, said in header.items()
                if name != "__metadata__" and (found := _tensor(self._bytes, 8 + length, said)) is not None
            }
        except (RuntimeError, ValueError) as error:
            raise OSError(f"{file} cannot be mapped: {' '.join(str(error).split())[:200]}") from error

    def register(self) -> None:
        """Makes copies fast where that can be: of a file in memory, by a process that uses a GPU, on a machine that does not refuse."""
        if self.is_registered or not self._file.resolve().is_relative_to(_MEMORY) or not torch.cuda.is_available():
            return
        self.is_registered = _register(self._bytes)
        if self.is_registered:  # it is called before this object's own tensors go, and the mapping with them
            weakref.finalize(self, _unregister, self._bytes.data_ptr())

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
    torch.cuda.init()
    done = int(torch.cuda.cudart().cudaHostRegister(bytes_.data_ptr(), bytes_.numel(), 0)) == 0
    if not done:
        _forget_refusal()
    return done


def _unregister(address: int) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(address)) != 0:
        _forget_refusal()


def _forget_refusal() -> None:
    """CUDA remembers what it has refused, and the next kernel would be blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
