"""Every logit of a row: for small vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from teacher_wire.core.axes import Axis
from teacher_wire.core.signals import AnswerShape, Field, Signal


@dataclass(frozen=True)
class Full(Signal):
    """The logits over ids 0..V-1, in the model's own dtype."""

    kind: ClassVar[str] = "full"
    needs_every_row: ClassVar[bool] = True  # its students compare lse before anything is computed from the logits

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        return (Field("logits_NV", Axis.ROW, shape.dtype, (shape.vocab_rows,)),)
