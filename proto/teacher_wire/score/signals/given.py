"""Nothing but the evidence of each row: log-sum-exp and the log-probability of the token that is there (docs/concepts/method.md 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from teacher_wire.core.signals import AnswerShape, Field, Signal


@dataclass(frozen=True)
class Given(Signal):
    """`lse_N` and `label_logp_N` at temperature 1 of every wanted row, 8 bytes a row: what a policy gradient needs of a teacher.

    It adds no tensor of its own to those that every answer has.
    """

    kind: ClassVar[str] = "given"
    needs_every_row: ClassVar[bool] = True

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        return ()
