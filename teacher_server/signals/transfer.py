"""Copies between host and device that the device need not wait for.

In: numpy arrays or device tensors; out: the other. On CUDA through pinned memory, to the host on a stream of their own:
the next batch is computed meanwhile, and one wait a batch is enough.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor as Torch

from teacher_wire.messages import Tensor, token_id_dtype

_copiers: dict[torch.device, torch.cuda.Stream] = {}


def to_device(array: np.ndarray, device: torch.device) -> Torch:
    """An array on the device; the copy is ordered before whatever the current stream does next."""
    tensor = torch.from_numpy(array.copy())  # what came over the wire is read-only
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class ToHost:
    """Copies under way, begun when the current stream has made the tensors.

    Args:
        tensors: by name; ids are int64 on the device.
    """

    def __init__(self, tensors: Mapping[str, Torch]) -> None:
        narrow = {name: t.to(torch.int32) if t.dtype == torch.int64 else t for name, t in tensors.items()}
        self._device = {name: t.contiguous() for name, t in narrow.items()}  # kept alive until they are copied
        self._copied: torch.cuda.Event | None = None
        device = next(iter(tensors.values())).device
        if device.type != "cuda":
            self._host = self._device
            return
        stream = _copiers.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._host = {}
            for name, tensor in self._device.items():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host[name] = host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)  # sleeps: a spinning wait would cost a core
            self._copied.record(stream)

    def wait(self) -> dict[str, Torch]:
        """The tensors on the host; other threads run while this one waits."""
        if self._copied is not None:
            self._copied.synchronize()
            self._device = {}
        return self._host


def to_wire(host: Torch, ids_below: int = 0) -> Tensor:
    """A host tensor as a wire tensor, without a copy where the types allow; integers are ids below `ids_below`."""
    if host.dtype == torch.bfloat16:
        return Tensor("bfloat16", host.view(torch.int16).numpy().view(np.uint16))
    if host.dtype == torch.int32:
        name = token_id_dtype(ids_below)
        array = host.numpy().view(np.uint32)
        return Tensor(name, array.astype(np.uint16) if name == "uint16" else array)
    return Tensor(str(host.dtype).removeprefix("torch."), host.numpy())
