"""The body's passes as CUDA graphs: one launch forward and one back a micro-batch, where the host would launch thousands of kernels.

In: a function from ids to states and the parameters it trains; out: the same function. A shape is run as ever until it has come often
enough, then recorded, tried against the plain passes, and replayed from then on. Whatever a recording reads and writes keeps its
place in memory: parameters, and gradients as views of one buffer.

Axes: B sequences, L padded length, D width.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STEPS_AN_OCTAVE = 8
SHORTEST = 32
WORTH_RECORDING = 6  # a recording takes 0.4 s, what about six replays save (docs/speed.md): at worst twice the time of knowing beforehand
MOST_SHAPES = 64  # recordings share one pool of memory; each keeps its states and some 10 MB of its own
_TOLERANCE = 1e-2  # of the largest entry, between a replay and the plain passes; the kernels are the same
Body = Callable[[Tensor], Tensor]


def padded_length(longest: int) -> int:
    """The length to pad to: few different ones, none more than an eighth too long."""
    step = max(SHORTEST // STEPS_AN_OCTAVE, 2 ** math.ceil(math.log2(max(longest, SHORTEST))) // (2 * STEPS_AN_OCTAVE))
    return -(-longest // step) * step


class Gradients:
    """`.grad` of parameters as views of one buffer a dtype, so that a recording can add to them for ever."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.flat = {
            dtype: torch.zeros(sum(p.numel() for p in parameters if p.dtype == dtype), dtype=dtype, device=device)
            for dtype in {p.dtype for p in parameters}
        }
        used = dict.fromkeys(self.flat, 0)
        self._views = []
        for parameter in self.parameters:
            start, dtype = used[parameter.dtype], parameter.dtype
            used[dtype] += parameter.numel()
            self._views.append(self.flat[dtype][start : used[dtype]].view_as(parameter))

    def attach(self) -> None:
        """Puts the views in place; zero where a gradient was taken away, what was there elsewhere."""
        absent = [p.grad is None for p in self.parameters]
        if all(absent):
            for flat in self.flat.values():
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


class Passes(Protocol):
    """One shape's recordings, and the tensors they read and write in place."""

    @property
    def ids_BL(self) -> Tensor:
        """Read by `forward`."""

    @property
    def state_BLD(self) -> Tensor:
        """Written by `forward`."""

    @property
    def grad_BLD(self) -> Tensor:
        """Read by `backward`."""

    def forward(self) -> None:
        """`state_BLD` of `ids_BL`."""

    def backward(self) -> None:
        """Adds what `grad_BLD` makes of the last `forward` to the gradients."""

    def settle(self) -> None:
        """Gives back what only recording and trying needed."""


Record = Callable[[Body, Gradients, Tensor], Passes]


class GraphedBody:
    """See module. States it gives are overwritten by the next call; gradients are added to the parameters' `.grad`.

    Nobody may hold the graph of another pass over the same parameters while one is recorded: it is of another stream, and the recording
    fails (and is told of).

    Args:
        run: ids [B, L] -> states [B, L, D] with a graph of autograd; no random numbers, no wait for the device.
        parameters: what `run` trains; others get no gradient from a replay.
        on_trouble: told in a sentence if a shape cannot be recorded (everything is then run as ever), or if replays do not give the very
            bits of the plain passes though torch is told to be deterministic.
        record: makes the passes of a shape; `CudaRecorder` if not given.
        worth: a shape is recorded when it comes for this time.
    """

    def __init__(
        self,
        run: Body,
        parameters: Sequence[nn.Parameter],
        on_trouble: Callable[[str], None],
        record: Record | None = None,
        worth: int = WORTH_RECORDING,
    ) -> None:
        self._run = run
        self._parameters = list(parameters)
        self._gradients: Gradients | None = None  # of those that get any, once something is recorded
        self._on_trouble = on_trouble
        self._record = record or CudaRecorder()
        self._worth = worth
        self._came: Counter[torch.Size] = Counter()
        self._passes: dict[torch.Size, Passes] = {}
        self._works = True
        self._rounds_alike = True
        self._anchor = torch.zeros((), device=self._parameters[0].device, requires_grad=True)

    @property
    def recorded(self) -> int:
        """How many shapes are replayed."""
        return len(self._passes)

    def __call__(self, ids_BL: Tensor) -> Tensor:
        """States [B, L, D] of ids on the device."""
        shape = ids_BL.shape
        self._came[shape] += 1
        if shape not in self._passes and (self._came[shape] < self._worth or not self._can_record(ids_BL)):
            if self._gradients is not None:
                self._gradients.attach()
            return self._run(ids_BL)
        return _Replay.apply(self._anchor, self._passes[shape], self._gradients, ids_BL)

    def _can_record(self, ids_BL: Tensor) -> bool:
        """Whether the shape has passes now."""
        if not self._works or len(self._passes) >= MOST_SHAPES:
            return False
        try:
            if self._gradients is None:
                self._gradients = Gradients(self._trained(ids_BL))
            passes = self._record(self._run, self._gradients, ids_BL.clone())
            self._try(passes, self._gradients)
            passes.settle()
        except RuntimeError as error:
            self._works = False
            said = " ".join(str(error.__context__ or error).split())[:200]  # a broken recording hides what broke it
            self._on_trouble(f"the student's passes cannot be recorded and are launched kernel by kernel: {said}")
            return False
        self._passes[ids_BL.shape] = passes
        return True

    def _trained(self, ids_BL: Tensor) -> list[nn.Parameter]:
        """The parameters that get a gradient; others keep none, so that an optimizer leaves them alone."""
        state_BLD = self._run(ids_BL)
        gradients = torch.autograd.grad(state_BLD, self._parameters, torch.zeros_like(state_BLD), allow_unused=True)
        return [p for p, gradient in zip(self._parameters, gradients, strict=True) if gradient is not None]

    def _try(self, passes: Passes, gradients: Gradients) -> None:
        """Replays both passes and compares them with the plain ones; leaves the gradients as they were.

        Raises:
            RuntimeError: they differ.
        """
        gradients.attach()
        before = {dtype: flat.clone() for dtype, flat in gradients.flat.items()}
        plain_BLD = self._run(passes.ids_BL)
        passes.grad_BLD.copy_(torch.linspace(-1, 1, plain_BLD.numel(), device=plain_BLD.device).view_as(plain_BLD))
        gradients.add(torch.autograd.grad(plain_BLD, gradients.parameters, passes.grad_BLD, allow_unused=True))
        expected = {dtype: flat.clone() for dtype, flat in gradients.flat.items()}
        for _ in range(2):  # the second time over what the first has left behind
            for dtype, flat in gradients.flat.items():
                flat.copy_(before[dtype])
            passes.forward()
            passes.backward()
        pairs = [(passes.state_BLD, plain_BLD), *((flat, expected[dtype]) for dtype, flat in gradients.flat.items())]
        off = [_distance(found, plain.detach()) for found, plain in pairs]
        for dtype, flat in gradients.flat.items():
            flat.copy_(before[dtype])
        if not all(distance <= _TOLERANCE for distance in off):
            raise RuntimeError(f"a replay differs from the plain passes by {max(off):.2g} of the largest entry")
        if any(off) and self._rounds_alike and torch.are_deterministic_algorithms_enabled():
            self._rounds_alike = False
            self._on_trouble(
                f"recorded passes round otherwise than plain ones here (by {max(off):.2g} of the largest entry), so a resumed run will not end "
                "with the bits of an unbroken one; model.graphs=false would"
            )


def _distance(found: Tensor, plain: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found.float() - plain.float()).abs().max() / plain.float().abs().max().clamp(min=1e-30))


class CudaRecorder:
    """Records passes as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Body, gradients: Gradients, ids_BL: Tensor) -> Passes:
        """Passes for ids of this shape; `ids_BL` becomes theirs.

        Raises:
            RuntimeError: something in `run` cannot be recorded, or there is no memory for it.
        """
        _check_room()
        working = torch.cuda.current_stream()
        self._stream.wait_stream(working)
        with torch.cuda.stream(self._stream):  # libraries set up what they need for a stream the first time they see it
            state_BLD = run(ids_BL)
            torch.autograd.grad(state_BLD, gradients.parameters, torch.zeros_like(state_BLD), allow_unused=True)
            del state_BLD
        working.wait_stream(self._stream)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._recording(forward):
            state_BLD = run(ids_BL)
        grad_BLD = torch.zeros_like(state_BLD, memory_format=torch.contiguous_format)
        with self._recording(backward):
            gradients.add(torch.autograd.grad(state_BLD, gradients.parameters, grad_BLD, allow_unused=True))
        return _CudaPasses(ids_BL, state_BLD.detach(), grad_BLD, forward, backward)

    @contextlib.contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Any:
        """Other threads go on copying labels meanwhile, hence "thread_local"."""
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            # When a capture ends badly, torch (2.11) leaves its allocator recording, so that no memory that two streams have used is
            # ever given back, and its generator too, so that nothing random can be drawn again.
            device = torch.cuda.current_device()
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device, self._pool)
            generator, fresh = torch.cuda.default_generators[device], torch.Generator(f"cuda:{device}")
            fresh.set_state(generator.get_state())
            generator.graphsafe_set_state(fresh)
            raise


def _check_room() -> None:
    """A recording holds on to what its passes need, and the losses beside them may need as much as ever.

    Raises:
        RuntimeError: less is free than twice of what a step has needed so far beyond what always lies there.
    """
    lying, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - lying
    if free < 2 * (most - lying):
        raise RuntimeError(
            f"{free / 2**30:.1f} GiB of the GPU are free, and {2 * (most - lying) / 2**30:.1f} may be needed"
        )


@dataclass(frozen=True)
class _CudaPasses:
    ids_BL: Tensor
    state_BLD: Tensor
    grad_BLD: Tensor
    _forward: torch.cuda.CUDAGraph
    _backward: torch.cuda.CUDAGraph

    def forward(self) -> None:
        self._forward.replay()

    def backward(self) -> None:
        self._backward.replay()

    def settle(self) -> None:
        torch.cuda.empty_cache()  # the plain passes beside which these were tried; a recording cannot use what others hold


class _Replay(torch.autograd.Function):
    """Both passes of one micro-batch; `anchor` makes autograd call the second."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: Passes, gradients: Gradients, ids_BL: Tensor) -> Tensor:
        ctx.passes, ctx.gradients = passes, gradients
        passes.ids_BL.copy_(ids_BL)
        passes.forward()
        return passes.state_BLD.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[None, ...]:
        ctx.passes.grad_BLD.copy_(grad_BLD)
        ctx.gradients.attach()
        ctx.passes.backward()
        return None, None, None, None
