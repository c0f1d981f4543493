"""Integrity of labels and finiteness of gradients, read once the results reach the host, so that no step blocks on its own check.

In: the evidence of each micro-batch, and whether each window's loss and gradients are finite; out: an error that names the samples,
some micro-batches or steps later at most. Until then `withheld` keeps the optimizer from learning anything from bad labels or from
numbers that are none, or from what came after them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.errors import NonFiniteError
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.integrity import Integrity, Tally, TeacherHeadMismatch, forgiven

ON_THEIR_WAY = 2  # micro-batches, and steps, that the host may be ahead of what it knows
_SHOWN = 8  # samples named in an error


@dataclass(frozen=True)
class _Window:
    """Whether one optimizer step may be learned from, on its way to the host.

    Attributes:
        step: its number, from 1.
        finite_M1: float32, 1 for each of M micro-batches whose loss is finite, and for the norm of the gradients.
        arrived: when it is on the host; None: it is.
        names: of the samples of each micro-batch.
    """

    step: int
    finite_M1: Tensor
    arrived: torch.cuda.Event | None
    names: tuple[tuple[str, ...], ...]

    @property
    def is_here(self) -> bool:
        return self.arrived is None or self.arrived.query()


class DeferredChecks:
    """Evidence under way.

    Args:
        device: of the student. On the host everything is known at once.
        skip: leave out steps whose numbers are not finite, instead of ending the run.
        max_skipped: steps left out one after another, at most.
        explain: what to say of the weights when numbers are not finite, and what to try.

    Attributes:
        refused: float32 [], 1 from the first micro-batch or step on after which nothing is to be learned any more.
        withheld: float32 [], 1 if the last window is not to be learned from; an optimizer that is given it as `found_inf` updates
            nothing then.
        skipped: steps left out since `take_skipped` was last called, as far as is known.
        in_a_row: steps left out one after another until now.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        skip: bool = False,
        max_skipped: int = 1,
        explain: Callable[[], str] = lambda: "",
    ) -> None:
        self.refused = torch.zeros((), device=device)
        self.withheld = torch.zeros((), device=device)
        self.in_a_row = 0
        self._skip = skip
        self._max_skipped = max_skipped
        self._explain = explain
        self._skipped = 0
        self._ahead = ON_THEIR_WAY if device.type == "cuda" else 0
        self._open: deque[tuple[Integrity, LabelRequest]] = deque()
        self._windows: deque[_Window] = deque()
        # By teacher: rows of one that is wrong are not hidden among those of others.
        self._tally: dict[str, Tally] = {}
        self._rows: dict[str, int] = {}
        self._failing: dict[str, Tensor] = {}

    def add(self, integrity: Integrity, request: LabelRequest) -> None:
        """Takes the evidence of the labels of `request`; raises what is known to be wrong by now.

        Raises:
            TeacherHeadMismatch: labels are not what the teacher's head makes of its states; names the sample.
        """
        failing, gross = integrity.figures_2.unbind()
        whose = integrity.teacher
        self._rows[whose] = self._rows.get(whose, 0) + integrity.rows
        self._failing[whose] = self._failing[whose] + failing if whose in self._failing else failing
        is_bad = (self._failing[whose] > forgiven(self._rows[whose])) | (gross > 0)
        torch.maximum(self.refused, is_bad.float(), out=self.refused)
        self._open.append((integrity, request))
        while self._open and (len(self._open) > self._ahead or self._open[0][0].arrived):
            self._check(*self._open.popleft())

    def end_window(self, step: int, losses: Sequence[Tensor], norm: Tensor, names: Sequence[tuple[str, ...]]) -> Tensor:
        """Decides, where the numbers are, whether optimizer step `step` is taken; before the optimizer is asked.

        Args:
            step: its number, from 1.
            losses: [] each, of its micro-batches.
            norm: [], of its gradients.
            names: of the samples of each micro-batch.

        Returns:
            float32 [], 1 if the window's numbers are not finite.

        Raises:
            NonFiniteError: of a step that is known by now.
            TeacherHeadMismatch: as `add`.
        """
        device = self.refused.device
        finite_M1 = torch.stack([torch.isfinite(value.detach().to(device)) for value in (*losses, norm)]).float()
        bad = 1 - finite_M1.amin()
        if not self._skip:
            torch.maximum(self.refused, bad, out=self.refused)
        torch.maximum(self.refused, bad, out=self.withheld)
        arrived = None
        if finite_M1.is_cuda:
            finite_M1 = torch.empty_like(finite_M1, device="cpu", pin_memory=True).copy_(finite_M1, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._windows.append(_Window(step, finite_M1, arrived, tuple(names)))
        while self._windows and (len(self._windows) > self._ahead or self._windows[0].is_here):
            self._judge(self._windows.popleft())
        return bad

    def settle(self) -> None:
        """Waits for all verdicts; before anything is written down or shown. Raises as `add` and `end_window`."""
        while self._open:
            self._check(*self._open.popleft())
        while self._windows:
            self._judge(self._windows.popleft())

    def take_skipped(self) -> int:
        """Steps that were left out since this was last asked, as far as is known: `settle` first."""
        taken, self._skipped = self._skipped, 0
        return taken

    def _check(self, integrity: Integrity, request: LabelRequest) -> None:
        try:
            integrity.check(self._tally.setdefault(integrity.teacher, Tally()))
        except TeacherHeadMismatch as error:
            error.add_note(f"sample {request.names[request.batch.sequence_of_row(error.row)]}")
            raise

    def _judge(self, window: _Window) -> None:
        if window.arrived is not None:
            window.arrived.synchronize()
        *losses, norm = window.finite_M1.tolist()
        if all(losses) and norm:
            self.in_a_row = 0
            return
        while self._open:  # bad labels make bad numbers: they are to be named first
            self._check(*self._open.popleft())
        self._skipped += 1
        self.in_a_row += 1
        if self._skip and self.in_a_row <= self._max_skipped:
            return
        what = "the norm of the gradients" if all(losses) else "the loss"
        bad = [name for names, is_finite in zip(window.names, losses, strict=True) if not is_finite for name in names]
        bad = bad or [name for names in window.names for name in names]
        shown = ", ".join(bad[:_SHOWN]) + (f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
        row = f", step {self.in_a_row} in a row (train.max_skipped={self._max_skipped})" if self._skip else ""
        raise NonFiniteError(
            f"step {window.step}: {what} is not finite{row}, with the samples {shown}; nothing was learned from it"
            f"{self._explain()}"
        )
