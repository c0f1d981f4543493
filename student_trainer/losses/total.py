"""The loss of a run as the sum of its terms.

In: terms, and for each micro-batch what `LossTerm.term` is given; out: one differentiable number, the figures and the evidence of all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from student_trainer.errors import ConfigError
from student_trainer.losses.integrity import Integrity
from student_trainer.losses.narrowing import narrowed
from student_trainer.losses.term import (
    FfnTap,
    JoinedLabels,
    JoiningTerm,
    LossTerm,
    Mean,
    StudentOutputs,
    SupervisedRows,
    Tap,
    TeacherLabels,
    TermResult,
    block_of,
)
from teacher_wire.core.signals import Signal


@dataclass(frozen=True, eq=False)
class Total:
    """The loss of one micro-batch.

    Attributes:
        loss: [], with a graph.
        parts: figures of all terms by their name in the log, in the order of the terms.
        evidence: of the terms that have looked at the teacher's rows; checked before the optimizer learns from them.
    """

    loss: Tensor
    parts: dict[str, Mean]
    evidence: tuple[Integrity, ...]


def total(
    terms: Sequence[LossTerm],
    outputs: StudentOutputs,
    labels: TeacherLabels | JoinedLabels | None,
    rows: SupervisedRows,
    normalizer: float | Tensor,
    step: int,
) -> Total:
    """The sum over at least one term; arguments as of `LossTerm.term`, `labels` of one teacher or of several.

    Raises:
        ConfigError: two terms give a figure of the same name.
    """
    loss: Tensor | None = None
    parts: dict[str, Mean] = {}
    evidence: list[Integrity] = []
    for term in terms:
        result = _of(term, outputs, labels, rows, normalizer, step)
        loss = result.total if loss is None else loss + result.total
        if twice := parts.keys() & result.parts.keys():
            raise ConfigError(f"loss.{term.name}: another term logs {', '.join(sorted(twice))} too; rename one of them")
        parts |= result.parts
        if result.evidence is not None:
            evidence.extend(result.evidence if isinstance(result.evidence, tuple) else (result.evidence,))
    assert loss is not None, "a run has a term"
    return Total(loss, parts, tuple(evidence))


def _of(
    term: LossTerm,
    outputs: StudentOutputs,
    labels: TeacherLabels | JoinedLabels | None,
    rows: SupervisedRows,
    normalizer: float | Tensor,
    step: int,
) -> TermResult:
    """One term: of the labels of all teachers if it joins them, else of those of the teacher that it names."""
    if not isinstance(labels, JoinedLabels):
        return term.term(outputs, labels, rows, normalizer, step)
    if isinstance(term, JoiningTerm):
        return term.joined(outputs, labels, rows, normalizer, step)
    return term.term(*narrowed(getattr(term, "teacher", None), outputs, labels, rows), normalizer, step)


def taps_of(terms: Sequence[LossTerm]) -> tuple[Tap, ...]:
    """What any of the terms taps, by block; outputs of blocks first."""
    taps = {tap for term in terms for tap in term.needs().taps}
    return tuple(sorted(taps, key=lambda tap: (isinstance(tap, FfnTap), block_of(tap), tap)))


def signals_of(terms: Sequence[LossTerm]) -> tuple[Signal, ...]:
    """The distinct signals that the terms need, in the order of the terms: what a request asks for."""
    return tuple(dict.fromkeys(signal for term in terms for signal in term.needs().signals))


def check_needs(terms: Sequence[LossTerm], teacher: str | None, offered: Collection[str], blocks: int) -> None:
    """Refuses terms that cannot be computed, before anything is.

    Args:
        teacher: its name; None if the run has none.
        offered: kinds of signals that it gives.
        blocks: how many the student has.

    Raises:
        ConfigError: naming the term, what it lacks and what there is.
    """
    for term in terms:
        needs = term.needs()
        for signal in needs.signals:
            if teacher is None:
                raise ConfigError(
                    f"loss.{term.name}: needs the signal {signal.kind} of a teacher: set the section teacher"
                )
            if signal.kind not in offered:
                raise ConfigError(
                    f"loss.{term.name}: needs the signal {signal.kind}, which teacher {teacher!r} does not give; it gives "
                    f"{', '.join(sorted(offered)) or 'none'}"
                )
        inside = range(blocks + 1)  # an FFN's from 1: the embedding has none
        outside = [block_of(tap) for tap in needs.taps if block_of(tap) not in inside[isinstance(tap, FfnTap) :]]
        if outside:
            raise ConfigError(
                f"loss.{term.name}: taps block {outside[0]} of the student, whose blocks are 1..{blocks} (0: the embedding)"
            )
