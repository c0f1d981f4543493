"""Wire tensors as torch tensors: the one place where bfloat16 bits become numbers and ids become int32; and their way to a device.

In: an answer as numpy arrays; out: the same values beside the student, copied while the device works on something else.
Axes: N rows, D width, K kept ids, V vocabulary rows, G blocks and O outliers of a compressed state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from teacher_wire.core.signals import TeacherSignals
from teacher_wire.core.tensor import Tensor
from teacher_wire.score.signals.hidden import BLOCK_CHANNELS

_IDS = ("uint8", "uint16", "uint24", "int32")


def to_torch(tensor: Tensor, device: torch.device | str = "cpu", *, pinned: bool = False) -> torch.Tensor:
    """The same values on `device`; float dtypes are kept, ids become int32 (what indexes with them widens them on the device).

    Args:
        pinned: into memory that a device can copy from by itself, for a later `ahead`; then `device` must be the host.
    """
    array = tensor.array.astype(np.int32) if tensor.dtype in _IDS else np.ascontiguousarray(tensor.array)
    if tensor.dtype == "bfloat16":
        array = array.view(np.int16)
    if pinned:
        found = torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)), pin_memory=True)
        np.copyto(found.numpy(), array)
    else:
        # torch has no read-only tensors; what came off the wire is never written to
        found = torch.from_numpy(array if array.flags.writeable else array.copy())
    if tensor.dtype == "bfloat16":
        found = found.view(torch.bfloat16)
    return found.to(device, non_blocking=True)


@dataclass(frozen=True)
class LabelTensors:
    """An answer as torch tensors.

    Attributes:
        named: by the names of `TeacherSignals`; ids are int32.
    """

    named: dict[str, torch.Tensor]

    @classmethod
    def of(cls, signals: TeacherSignals, *, pinned: bool = False) -> LabelTensors:
        """On the host; `pinned` as in `to_torch`."""
        return cls({name: to_torch(tensor, pinned=pinned) for name, tensor in signals.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(tensor.nbytes for tensor in self.named.values())

    def to(self, device: torch.device) -> LabelTensors:
        """On `device`, by `ahead`."""
        return LabelTensors(ahead(self.named, device))

    def state(self, dtype: torch.dtype) -> torch.Tensor:
        """The states [N, D], in `dtype` if they were compressed, whichever way they travelled (proto: Compression)."""
        if "hidden_ND" in self.named:
            return self.named["hidden_ND"]
        state_ND, scales_NG = self.named["state_int8_ND"].float(), self.named["state_scales_NG"].float()
        state_ND *= scales_NG.repeat_interleave(BLOCK_CHANNELS, dim=1)[:, : state_ND.shape[1]]
        values_NO = self.named["outlier_values_NO"].float()
        return state_ND.scatter_(1, self.named["outlier_ids_NO"].long(), values_NO).to(dtype)


def ahead(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The same tensors on `device`, copied on a stream of their own while it works on what it was given before.

    Nothing waits but the device, and only for the copy: the host goes on, and whatever the device is asked next finds them there.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    copying, working = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        moved = {
            name: (tensor if tensor.is_pinned() or tensor.is_cuda else tensor.pin_memory()).to(
                device, non_blocking=True
            )
            for name, tensor in tensors.items()
        }
    working.wait_stream(copying)
    for tensor in moved.values():
        tensor.record_stream(working)  # its memory is the copying stream's: not to be given away while it is read
    return moved


@lru_cache(maxsize=8)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
