"""Are these labels the teacher's word on these tokens? Two numbers per row, recomputed and compared.

In: log-sum-exp and logp(label) as served and as seen by the student. Out: nothing, or `TeacherHeadMismatch`.
Must never wait for the device before `check()`, nor let a NaN pass.

A row in a thousand may be out of tolerance, counted over all calls of a run (`Tally`): with a row a call, a row forgiven in every
call would check nothing.

Axes: N rows of one call. Catches shifted rows, a state before the final norm, a foreign head, an unsliced vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from student_trainer.losses import fused
from teacher_wire.core.errors import LabelError

FORGIVEN_SHARE = 0.001  # of right rows may be out of tolerance
CHANCE = 1e-4  # that so many of a run's right rows are out of tolerance as `forgiven` allows, and one more
GROSS = 10.0  # a single row this many tolerances off is never forgiven
_NORMAL_FROM = 100.0  # expected rows, from which on a normal distribution with its skew is close enough
_QUANTILE, _SKEW = 3.72, (3.72**2 - 1) / 6 + 1  # of CHANCE


@lru_cache(maxsize=4096)
def forgiven(rows: int) -> int:
    """How many of `rows` may be out of tolerance: right rows exceed it with a chance below CHANCE (binomial)."""
    mean = rows * FORGIVEN_SHARE
    if mean >= _NORMAL_FROM:
        return math.ceil(mean + _QUANTILE * math.sqrt(mean) + _SKEW)
    odds = FORGIVEN_SHARE / (1 - FORGIVEN_SHARE)
    mass = (1 - FORGIVEN_SHARE) ** rows  # of exactly `count`
    above, count = 1 - mass, 0
    while above >= CHANCE:
        mass *= (rows - count) / (count + 1) * odds
        above -= mass
        count += 1
    return count


class TeacherHeadMismatch(LabelError):  # noqa: N818
    """Served rows disagree with what the student recomputes from them: wrong rows, head, norm or vocabulary.

    Attributes:
        row: number of the worst row in its call, for whoever knows which sample that is.
        teacher: whose rows they are, as of `Integrity`.
    """

    row: int = 0
    teacher: str = ""


@dataclass(frozen=True)
class Tolerance:
    """Nats by which served and recomputed figures may differ (docs/concepts/method.md 3.6).

    |d lse| <= lse_abs + lse_rel |lse| and |d logp| <= logp_abs + logp_rel |lse|. The defaults, `BFLOAT16`, allow for a
    teacher whose logits are rounded to bfloat16, by up to 2^-8 of themselves: one such error in lse, two in logp. Less
    would refuse true rows (CONTRIBUTING.md); a shifted row is off by nats.
    """

    lse_abs: float = 0.02
    lse_rel: float = 2**-8
    logp_abs: float = 0.05
    logp_rel: float = 2**-7


BFLOAT16 = Tolerance()
FLOAT32 = Tolerance(lse_abs=1e-3, lse_rel=1e-4, logp_abs=2e-3, logp_rel=1e-4)


@dataclass
class Tally:
    """Rows looked at in all calls so far.

    Attributes:
        rows: how many.
        failing: how many of them were out of tolerance, as far as it has been read from the device.
    """

    rows: int = 0
    failing: int = 0


@dataclass(frozen=True, eq=False)
class Integrity:
    """Evidence of one call; all tensors [N] on the student's device, `row_N` numbers the rows of the call.

    `checked` is how many rows have served figures, if not all: those of the others are NaN, and nothing is said of these rows.
    `teacher` is its name in a run with several, each of which is judged by its own rows; empty with one.
    """

    row_N: Tensor
    served_lse_N: Tensor
    seen_lse_N: Tensor
    served_logp_N: Tensor
    seen_logp_N: Tensor
    tolerance: Tolerance = BFLOAT16
    checked: int | None = None
    teacher: str = ""

    def begin(self) -> None:
        """Compares on the device and sends the result on its way, so that a later `check` waits for nothing else."""
        _ = self._compared

    @property
    def arrived(self) -> bool:
        """Whether `check` would not wait."""
        event = self._compared[2]
        return event is None or event.query()

    @property
    def rows(self) -> int:
        """How many rows are compared."""
        return self.row_N.numel() if self.checked is None else self.checked

    @property
    def figures_2(self) -> Tensor:
        """float64 [2], on the device, without waiting for it: rows out of tolerance, and 1 if one is grossly so."""
        return self._compared[1]

    def check(self, before: Tally | None = None) -> None:
        """Compares; waits once, for the device to reach `begin` (or now, if that was not called).

        Args:
            before: of the calls before this one; this one is counted in.

        Raises:
            TeacherHeadMismatch: more rows are out of tolerance than chance explains (`forgiven`), in all calls so far, or one is
                out by ten times the tolerance; names the worst row of this call and its figures.
        """
        tally, rows, allowed = before or Tally(), self.rows, self.tolerance
        if not rows:
            return
        told, _, arrived = self._compared
        if arrived is not None:
            arrived.synchronize()
        failing, row, served_lse, seen_lse, served_logp, seen_logp, error = told.tolist()
        tally.rows += rows
        tally.failing += int(failing)
        if error <= GROSS and (not failing or tally.failing <= forgiven(tally.rows)):
            return
        earlier = f" (and {tally.failing - int(failing)} of {tally.rows - rows} before)" if tally.rows > rows else ""
        of = f"{self.teacher!r} " if self.teacher else ""
        mismatch = TeacherHeadMismatch(
            f"{int(failing)} of {rows} {of}teacher rows{earlier} do not belong to these tokens or this output head",
            field=f"row {int(row)}",
            value=f"served lse {served_lse:.4g} and logp(label) {served_logp:.4g}, "
            f"recomputed {seen_lse:.4g} and {seen_logp:.4g}",
            limit=f"|d lse| <= {allowed.lse_abs:g} + {allowed.lse_rel:.2g} |lse|, "
            f"|d logp| <= {allowed.logp_abs:g} + {allowed.logp_rel:.2g} |lse|",
        )
        mismatch.row, mismatch.teacher = int(row), self.teacher
        raise mismatch

    @cached_property
    def _compared(self) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """Rows out of tolerance and the figures of the worst one, from a GPU on their way until the event; and `figures_2`."""
        if not self.rows:
            return self.served_lse_N.double(), self.served_lse_N.new_zeros(2, dtype=torch.float64), None
        told_7, figures_2 = self._figures()
        if not told_7.is_cuda:
            return told_7, figures_2, None
        host_7 = torch.empty_like(told_7, device="cpu", pin_memory=True).copy_(told_7, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return host_7, figures_2, arrived

    def _figures(self) -> tuple[Tensor, Tensor]:
        """As `fused.worst_row` gives them, by it where kernels run."""
        allowed, evidence = self.tolerance, (self.served_lse_N, self.seen_lse_N, self.served_logp_N, self.seen_logp_N)
        if all(fused.usable(figure) and figure.dtype == torch.float32 for figure in evidence):
            limits = allowed.lse_abs, allowed.lse_rel, allowed.logp_abs, allowed.logp_rel
            served_lse_N, seen_lse_N, served_logp_N, seen_logp_N = (figure.contiguous() for figure in evidence)
            return fused.worst_row(
                self.row_N,
                served_lse_N,
                seen_lse_N,
                served_logp_N,
                seen_logp_N,
                limits,
                GROSS,
                self.checked is not None,
            )
        size_N = self.served_lse_N.abs()
        lse_N = (self.seen_lse_N - self.served_lse_N).abs() / (allowed.lse_abs + allowed.lse_rel * size_N)
        logp_N = (self.seen_logp_N - self.served_logp_N).abs() / (allowed.logp_abs + allowed.logp_rel * size_N)
        error_N = torch.maximum(lse_N, logp_N).nan_to_num(nan=torch.inf)  # NaN must fail every comparison in `check`
        if self.checked is not None:
            error_N = error_N.masked_fill(self.served_lse_N.isnan(), 0.0)
        figures = (self.row_N, self.served_lse_N, self.seen_lse_N, self.served_logp_N, self.seen_logp_N, error_N)
        worst_6 = torch.stack([figure.double() for figure in figures])[:, error_N.argmax()[None]][:, 0]
        told_7 = torch.cat([(error_N > 1).sum().double()[None], worst_6])
        figures_2 = torch.stack([told_7[0], (told_7[-1] > GROSS).double()])
        return told_7, figures_2
