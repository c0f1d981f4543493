"""Copies between host and device that the device need not wait for.

In: numpy arrays or device tensors; out: the other. On CUDA through pinned memory, to the host on a stream of their own:
the next batch is computed meanwhile, and one wait a batch is enough.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor as Torch

from teacher_wire.core.axes import Axis, axis_of
from teacher_wire.core.tensor import DTYPES, Tensor

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


class HostRows:
    """An answer whose tensors are made part by part, on its way to the host.

    A tensor of at most `held_bytes` is gathered on the device and copied when all is there. Of a larger one each part is
    copied as it comes, into its place on the host, and the device holds no more than `held_bytes` of parts beside the newest.

    Args:
        totals: entries of each axis in all.
        held_bytes: see above.
    """

    def __init__(self, totals: Mapping[Axis, int], held_bytes: int) -> None:
        self._totals = totals
        self._held_bytes = held_bytes
        self._filled: dict[str, int] = {}
        self._gathered: dict[str, Torch] = {}
        self._streamed: dict[str, Torch] = {}
        self._held: deque[tuple[torch.cuda.Event, Torch]] = deque()  # copies under way
        self._rest: ToHost | None = None

    def add(self, parts: Mapping[str, Torch]) -> None:
        """The next entries of each of these tensors; may wait for older parts to reach the host."""
        for name, part in parts.items():
            start = self._filled.get(name, 0)
            stop = self._filled[name] = start + len(part)
            if start == 0 and stop == self._totals[axis_of(name)]:
                self._gathered[name] = part
                continue
            if name not in self._streamed and name not in self._gathered:
                self._make(name, part)
            if name in self._streamed:
                self._stream(self._streamed[name][start:stop], part)
            else:
                self._gathered[name][start:stop] = part

    def _make(self, name: str, part: Torch) -> None:
        shape = (self._totals[axis_of(name)], *part.shape[1:])
        if part.device.type == "cuda" and math.prod(shape) * part.element_size() > self._held_bytes:
            dtype = torch.int32 if part.dtype == torch.int64 else part.dtype
            self._streamed[name] = torch.empty(shape, dtype=dtype, pin_memory=True)
        else:
            self._gathered[name] = part.new_empty(shape)

    def _stream(self, place: Torch, part: Torch) -> None:
        part = part.to(place.dtype)
        stream = _copiers.setdefault(part.device, torch.cuda.Stream(part.device))
        stream.wait_stream(torch.cuda.current_stream(part.device))
        with torch.cuda.stream(stream):
            place.copy_(part, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(stream)
        self._held.append((copied, part))
        while sum(waiting.nbytes for _, waiting in self._held) > self._held_bytes and len(self._held) > 1:
            self._held.popleft()[0].synchronize()

    def end(self) -> HostRows:
        """All entries have been added; begins what copies are left."""
        short = [name for name, filled in self._filled.items() if filled != self._totals[axis_of(name)]]
        assert not short, f"rows are missing of {short}"
        self._rest = ToHost(self._gathered) if self._gathered else None
        self._gathered = {}
        return self

    def wait(self) -> dict[str, Torch]:
        """The tensors on the host; other threads run while this one waits."""
        while self._held:
            self._held.popleft()[0].synchronize()
        return {**self._streamed, **(self._rest.wait() if self._rest is not None else {})}


def to_wire(host: Torch, ids: str = "") -> Tensor:
    """A host tensor as a wire tensor, without a copy where the types allow; `ids` is the wire type of whole numbers of 32 bits."""
    if host.dtype == torch.bfloat16:
        return Tensor("bfloat16", host.view(torch.int16).numpy().view(np.uint16))
    if host.dtype == torch.int32:
        array = host.numpy().view(np.uint32)
        return Tensor(ids, array.astype(DTYPES[ids][0], copy=False))
    return Tensor(str(host.dtype).removeprefix("torch."), host.numpy())
