"""Wire tensors as torch tensors: the one place where bfloat16 bits become numbers and ids become int64."""

from __future__ import annotations

import numpy as np
import torch

from teacher_wire.messages import Tensor

_IDS = ("uint8", "uint16", "uint24", "int32")


def to_torch(tensor: Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """The same values on `device`; float dtypes are kept, ids become int64."""
    if tensor.dtype in _IDS:
        return torch.from_numpy(tensor.array.astype(np.int64)).to(device, non_blocking=True)
    array = np.ascontiguousarray(tensor.array)
    if not array.flags.writeable:  # torch has no read-only tensors; what came off the wire is never written to
        array = array.copy()
    if tensor.dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device, non_blocking=True)
    return torch.from_numpy(array).to(device, non_blocking=True)
