"""The body's passes as recordings: one launch forward and one back a micro-batch, where the host would launch thousands of kernels.

In: the student's pass and the parameters it trains; out: the same pass, taps included. A shape is run eagerly until it has come often
enough, then recorded (`cuda_recorder.py`), tried against the plain passes, and replayed from then on. Whatever a recording reads and writes
keeps its place in memory: parameters, and gradients as views of one buffer.

Axes: B sequences, L padded length, D width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from student_trainer.errors import StudentError
from student_trainer.losses.term import StudentOutputs, Tap
from student_trainer.model.forward import StudentForward

STEPS_AN_OCTAVE = 8
SHORTEST = 32
WORTH_RECORDING = 6  # a recording takes 0.4 s, what six to twelve replays save (docs/results/speed.md)
MOST_SHAPES = 64  # recordings share one pool of memory; each keeps its states and some 10 MB of its own
# Between a replay and the plain passes, as a share of the norm of what they give; of a gradient near nothing, of a hundredth of the largest.
_TOLERANCE, _NEAR_NOTHING = 1e-2, 1e-2
Outputs = tuple[Tensor, ...]  # the final states [B, L, D], then the taps
Body = Callable[[Tensor], Outputs]
_Kind = tuple[torch.Size, tuple[Tap, ...]]  # of passes: the shape of the ids, and the taps


def padded_length(longest: int) -> int:
    """The length to pad to: few different ones, none more than an eighth too long."""
    step = max(SHORTEST // STEPS_AN_OCTAVE, 2 ** math.ceil(math.log2(max(longest, SHORTEST))) // (2 * STEPS_AN_OCTAVE))
    return -(-longest // step) * step


class NoRoomError(RuntimeError):
    """There is no memory for another recording now."""


class Gradients:
    """`.grad` of parameters as views of one buffer a dtype, so that a recording can add to them for ever."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.flat = {
            dtype: torch.zeros(sum(p.numel() for p in parameters if p.dtype == dtype), dtype=dtype, device=device)
            for dtype in {p.dtype for p in parameters}
        }
        self._views = self._cut(self.flat)

    def _cut(self, flat: dict[torch.dtype, Tensor]) -> list[Tensor]:
        """A view a parameter."""
        used, views = dict.fromkeys(flat, 0), []
        for parameter in self.parameters:
            start, dtype = used[parameter.dtype], parameter.dtype
            used[dtype] += parameter.numel()
            views.append(flat[dtype][start : used[dtype]].view_as(parameter))
        return views

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

    def zero(self) -> None:
        """Nothing in any."""
        for flat in self.flat.values():
            flat.zero_()

    def copied(self) -> dict[torch.dtype, Tensor]:
        """What they are now; see `put`."""
        return {dtype: flat.clone() for dtype, flat in self.flat.items()}

    def put(self, copied: dict[torch.dtype, Tensor]) -> None:
        """What they were."""
        for dtype, flat in self.flat.items():
            flat.copy_(copied[dtype])

    def off(self, expected: dict[torch.dtype, Tensor]) -> float:
        """The largest distance of any parameter's gradient from what is expected, as a share of its norm."""
        pairs = list(zip(self._views, self._cut(expected), strict=True))
        distance = torch.stack([_norm(view - plain) for view, plain in pairs])
        norm = torch.stack([_norm(plain) for _, plain in pairs])
        return float((distance / norm.maximum((norm.max() * _NEAR_NOTHING).clamp(min=1e-30))).max())


def gradients_of(outputs: Outputs, grads: Outputs, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """What gradients of the outputs make of the parameters; an output without a graph, as an embedding may be, adds nothing."""
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    with_graph, theirs = zip(*pairs, strict=True)
    return torch.autograd.grad(with_graph, parameters, theirs, allow_unused=True)


class Passes(Protocol):
    """One shape's recordings, and the tensors they read and write in place."""

    @property
    def ids_BL(self) -> Tensor:
        """Read by `forward`."""

    @property
    def outputs(self) -> Outputs:
        """Written by `forward`."""

    @property
    def grads(self) -> Outputs:
        """Read by `backward`, one for each of the outputs."""

    def forward(self) -> None:
        """`outputs` of `ids_BL`."""

    def backward(self) -> None:
        """Adds what `grads` make of the last `forward` to the gradients."""


class Recorder(Protocol):
    """Makes recordings."""

    def check_room(self) -> None:
        """Raises NoRoomError if there may be too little memory for another recording."""

    def record(self, run: Body, gradients: Gradients, ids_BL: Tensor) -> Passes:
        """Passes for ids of this shape; `ids_BL` becomes theirs. Raises RuntimeError if something in `run` cannot be recorded."""

    def settle(self) -> None:
        """Gives back what only recording and trying needed."""


class GraphedBody:
    """See module. States it gives are overwritten by the next call; gradients are added to the parameters' `.grad`.

    Nobody may hold the graph of another pass over the same parameters while one is recorded: it is of another stream, and the recording
    fails (and is told of).

    Args:
        run: the pass, with a graph of autograd; no random numbers, no wait for the device.
        parameters: what `run` trains, at least one; others get no gradient from a replay.
        recorder: makes the passes of a shape.
        on_trouble: called with one sentence if a shape cannot be captured (it and later shapes run eagerly), if there is no room for
            it now, or if replays do not give the very bits of the plain passes though torch is told to be deterministic.
        is_ready: asked before a shape is recorded whether all that will lie in memory does.
        worth: a shape is recorded when it comes for this time.
    """

    def __init__(
        self,
        run: StudentForward,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        on_trouble: Callable[[str], None],
        is_ready: Callable[[], bool] = lambda: True,
        worth: int = WORTH_RECORDING,
    ) -> None:
        self._run = run
        self._parameters = list(parameters)
        self._gradients: Gradients | None = None  # of those that get any, once something is recorded
        self._recorder = recorder
        self._on_trouble = on_trouble
        self._told: set[str] = set()
        self._is_ready = is_ready
        self._worth = worth
        self._came: Counter[_Kind] = Counter()
        self._passes: dict[_Kind, Passes] = {}
        self._works = True
        self._anchor = torch.zeros((), device=self._parameters[0].device, requires_grad=True)

    @property
    def recorded(self) -> int:
        """How many kinds of passes, by shape and taps, are replayed."""
        return len(self._passes)

    def __call__(self, input_ids_BL: Tensor, taps: Sequence[Tap] = ()) -> StudentOutputs:
        """The pass of ids on the device."""
        kind = input_ids_BL.shape, tuple(taps)
        self._came[kind] += 1
        if kind not in self._passes and (self._came[kind] < self._worth or not self._can_record(kind, input_ids_BL)):
            if self._gradients is not None:
                self._gradients.attach()
            return self._run(input_ids_BL, taps)
        final_BLD, *tapped = _Replay.apply(self._anchor, self._passes[kind], self._gradients, input_ids_BL)
        return StudentOutputs(final_BLD, dict(zip(taps, tapped, strict=True)))

    def _can_record(self, kind: _Kind, ids_BL: Tensor) -> bool:
        """Whether this kind of pass can be replayed now."""
        if not self._works or len(self._passes) >= MOST_SHAPES or not self._is_ready():
            return False

        def run(ids_BL: Tensor) -> Outputs:
            return self._run(ids_BL, kind[1]).tensors()

        try:
            self._recorder.check_room()
        except NoRoomError as error:
            self._came[kind] = 0  # asked again when it has come as often again
            self._tell("room", f"passes of more lengths are not recorded while memory is short: {error}")
            return False
        try:
            if self._gradients is None:
                self._gradients = Gradients(self._trained(run, ids_BL))
            passes = self._recorder.record(run, self._gradients, ids_BL.clone())
            off = self._try(run, passes, self._gradients)
        except StudentError:  # layers that must be compiled, and are not
            raise
        except Exception as error:  # whatever it is, a run goes on without
            self._works = False
            if not self._passes:
                self._gradients = None
            said = " ".join(str(error.__context__ or error).split())[:200]  # a broken recording hides what broke it
            self._tell("works", f"the student's passes cannot be recorded and are launched kernel by kernel: {said}")
            return False
        finally:
            self._recorder.settle()
        if off and torch.are_deterministic_algorithms_enabled():
            self._tell(
                "rounding",
                f"recorded passes round otherwise than plain ones here (by {off:.2g} of what they give), so a resumed run will not end with "
                "the bits of an unbroken one; with model.graphs=false it would",
            )
        self._passes[kind] = passes
        return True

    def _tell(self, what: str, sentence: str) -> None:
        """Once of each kind."""
        if what not in self._told:
            self._told.add(what)
            self._on_trouble(sentence)

    def _trained(self, run: Body, ids_BL: Tensor) -> list[nn.Parameter]:
        """The parameters that get a gradient; others keep none, so that an optimizer leaves them alone."""
        outputs = run(ids_BL)
        gradients = gradients_of(outputs, tuple(map(torch.zeros_like, outputs)), self._parameters)
        return [p for p, gradient in zip(self._parameters, gradients, strict=True) if gradient is not None]

    def _try(self, run: Body, passes: Passes, gradients: Gradients) -> float:
        """Replays both passes and compares them with the plain ones; leaves the gradients as they were, whatever happens.

        Returns:
            the largest distance of outputs and gradients, as a share of their norms; 0 if all bits are the same.

        Raises:
            RuntimeError: they differ by more than rounding.
        """
        gradients.attach()
        before = gradients.copied()
        try:
            gradients.zero()
            plain = run(passes.ids_BL)
            for plain_BLD, grad_BLD in zip(plain, passes.grads, strict=True):
                slope_BLD = torch.linspace(-1, 1, plain_BLD.numel(), device=plain_BLD.device)
                grad_BLD.copy_(slope_BLD.view_as(plain_BLD))
            gradients.add(gradients_of(plain, passes.grads, gradients.parameters))
            expected, plain = gradients.copied(), tuple(plain_BLD.detach() for plain_BLD in plain)
            for _ in range(2):  # the second time over what the first has left behind
                gradients.zero()
                passes.forward()
                passes.backward()
            state_off = max(
                float(_norm(found_BLD - plain_BLD) / _norm(plain_BLD).clamp(min=1e-30))
                for found_BLD, plain_BLD in zip(passes.outputs, plain, strict=True)
            )
            gradient_off = gradients.off(expected)
        finally:
            gradients.put(before)
        for what, off in (("states", state_off), ("gradients", gradient_off)):
            if not off <= _TOLERANCE:  # nor what is no number
                raise RuntimeError(f"a replay's {what} differ from the plain passes' by {off:.2g} of their norm")
        return max(state_off, gradient_off)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32)


class _Replay(torch.autograd.Function):
    """Both passes of one micro-batch; `anchor` makes autograd call the second."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: Passes, gradients: Gradients, ids_BL: Tensor) -> Outputs:
        ctx.passes, ctx.gradients = passes, gradients
        passes.ids_BL.copy_(ids_BL)
        passes.forward()
        return tuple(output_BLD.detach() for output_BLD in passes.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        for grad_BLD, given_BLD in zip(ctx.passes.grads, grads, strict=True):
            grad_BLD.copy_(given_BLD)
        ctx.gradients.attach()
        ctx.passes.backward()
        return None, None, None, None
