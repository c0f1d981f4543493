"""Wire tensors as torch tensors: the one place where bfloat16 bits become numbers and ids become int64."""

from __future__ import annotations

import numpy as np
import torch

from teacher_wire.messages import BLOCK_CHANNELS, TeacherSignals, Tensor

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


def unpack_state(signals: TeacherSignals, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """The states [N, D] of an answer, in `dtype` on `device`, whichever way they travelled (proto: Compression)."""
    if signals.hidden_ND is not None:
        return to_torch(signals.hidden_ND, device)
    assert signals.state_int8_ND is not None and signals.state_scales_NG is not None
    assert signals.outlier_ids_NO is not None and signals.outlier_values_NO is not None
    state_ND = to_torch(signals.state_int8_ND, device).float()
    scales_NG = to_torch(signals.state_scales_NG, device).float()
    state_ND *= scales_NG.repeat_interleave(BLOCK_CHANNELS, dim=1)[:, : state_ND.shape[1]]
    values_NO = to_torch(signals.outlier_values_NO, device).float()
    return state_ND.scatter_(1, to_torch(signals.outlier_ids_NO, device), values_NO).to(dtype)
