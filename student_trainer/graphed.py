"""The body's passes as CUDA graphs: one launch forward and one back a micro-batch, where the host would launch thousands of kernels.

In: a function from ids to states and the parameters it trains; out: the same function. A shape is run as ever when it is first seen,
recorded when it comes again, and replayed from then on. Must never outlive an update of what it reads by copy: parameters keep their
place in memory, gradients are views of one buffer.

Axes: B sequences, L padded length, D width, P trained numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STEPS_AN_OCTAVE = 8
SHORTEST = 32
MOST_SHAPES = 64  # a graph of a 28-layer student takes some 10 MB beside its memory, which all share


def padded_length(longest: int) -> int:
    """The length to pad to: few different ones, none more than an eighth too long."""
    step = max(SHORTEST // STEPS_AN_OCTAVE, 2 ** math.ceil(math.log2(max(longest, SHORTEST))) // (2 * STEPS_AN_OCTAVE))
    return -(-longest // step) * step


@dataclass(frozen=True)
class _Passes:
    """One shape's recordings, and the tensors they read and write in place."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    ids_BL: Tensor
    state_BLD: Tensor
    grad_BLD: Tensor


class GraphedBody:
    """See module. States it gives are overwritten by the next call; gradients are added to the parameters' `.grad`.

    Args:
        run: ids [B, L] -> states [B, L, D] with a graph of autograd; no random numbers, no wait for the device.
        parameters: what `run` trains; others get no gradient from a replay.
        on_trouble: told in a sentence if a shape cannot be recorded; everything is then run as ever.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], on_trouble: Callable[[str], None]
    ) -> None:
        self._run = run
        self._gradients = _Gradients(parameters)
        self._on_trouble = on_trouble
        self._seen: set[torch.Size] = set()
        self._passes: dict[torch.Size, _Passes] = {}
        self._works = True
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor = torch.zeros((), device="cuda", requires_grad=True)

    def __call__(self, ids_BL: Tensor) -> Tensor:
        """States [B, L, D] of ids on the device."""
        shape = ids_BL.shape
        if shape not in self._passes and (shape not in self._seen or not self._recorded(ids_BL)):
            self._seen.add(shape)
            self._gradients.attach()
            return self._run(ids_BL)
        return _Replay.apply(self._anchor, self._passes[shape], self._gradients, ids_BL)

    def _recorded(self, ids_BL: Tensor) -> bool:
        """Whether the shape has passes now."""
        if not self._works or len(self._passes) >= MOST_SHAPES:
            return False
        try:
            self._passes[ids_BL.shape] = self._record(ids_BL.clone())
        except RuntimeError as error:
            self._works = False
            said = " ".join(str(error.__context__ or error).split())[:200]  # a broken recording hides what broke it
            self._on_trouble(f"the student's passes cannot be recorded and are launched kernel by kernel: {said}")
        return self._works

    def _record(self, ids_BL: Tensor) -> _Passes:
        parameters = self._gradients.parameters
        working = torch.cuda.current_stream()
        self._stream.wait_stream(working)
        with torch.cuda.stream(self._stream):  # libraries set up what they need for a stream the first time they see it
            state_BLD = self._run(ids_BL)
            torch.autograd.grad(state_BLD, parameters, torch.zeros_like(state_BLD), allow_unused=True)
            del state_BLD
        working.wait_stream(self._stream)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        recording: dict[str, Any] = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(forward, **recording):
            state_BLD = self._run(ids_BL)
        grad_BLD = torch.empty_like(state_BLD, memory_format=torch.contiguous_format)
        with torch.cuda.graph(backward, **recording):
            self._gradients.add(torch.autograd.grad(state_BLD, parameters, grad_BLD, allow_unused=True))
        return _Passes(forward, backward, ids_BL, state_BLD.detach(), grad_BLD)


class _Gradients:
    """`.grad` of parameters as views of one buffer a dtype, so that a recording can add to them for ever."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._flat = {
            dtype: torch.zeros(
                sum(p.numel() for p in parameters if p.dtype == dtype), dtype=dtype, device=parameters[0].device
            )
            for dtype in {p.dtype for p in parameters}
        }
        used = dict.fromkeys(self._flat, 0)
        self._views = []
        for parameter in self.parameters:
            start, dtype = used[parameter.dtype], parameter.dtype
            used[dtype] += parameter.numel()
            self._views.append(self._flat[dtype][start : used[dtype]].view_as(parameter))

    def attach(self) -> None:
        """Puts the views in place; zero where a gradient was taken away, what was there elsewhere."""
        absent = [p.grad is None for p in self.parameters]
        if all(absent):
            for flat in self._flat.values():
                flat.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is view:
                continue
            if parameter.grad is not None:
                view.copy_(parameter.grad)
            elif not all(absent):
                view.zero_()
            parameter.grad = view

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds to all views."""
        pairs = [(v, g) for v, g in zip(self._views, gradients, strict=True) if g is not None]
        torch._foreach_add_([view for view, _ in pairs], [gradient.to(view.dtype) for view, gradient in pairs])


class _Replay(torch.autograd.Function):
    """Both passes of one micro-batch; `anchor` makes autograd call the second."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: _Passes, gradients: _Gradients, ids_BL: Tensor) -> Tensor:
        ctx.passes, ctx.gradients = passes, gradients
        passes.ids_BL.copy_(ids_BL)
        passes.forward.replay()
        return passes.state_BLD.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[None, ...]:
        ctx.passes.grad_BLD.copy_(grad_BLD)
        ctx.gradients.attach()
        ctx.passes.backward.replay()
        return None, None, None, None
