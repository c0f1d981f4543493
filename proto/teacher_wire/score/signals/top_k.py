"""The k likeliest ids of a row with their logits, and the exact mass of all others (docs/concepts/method.md 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from teacher_wire.core.axes import Axis
from teacher_wire.core.errors import LimitError, RequestError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import AnswerShape, Field, Signal
from teacher_wire.core.tensor import token_id_dtype


@dataclass(frozen=True)
class TopK(Signal):
    """K = k + extra distinct ids per row, by falling logit, then rising id.

    Attributes:
        k: likeliest ids that are kept.
        extra: ids per row that the student names (`TokenBatch.extra_ids_NM`), kept beside the k likeliest others.
    """

    kind: ClassVar[str] = "top_k"
    needs_every_row: ClassVar[bool] = True  # the logits mean something only with lse

    k: int = 0
    extra: int = 0

    @property
    def kept(self) -> int:
        """K."""
        return self.k + self.extra

    @property
    def extra_ids(self) -> int:
        return self.extra

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        return (
            Field("topk_ids_NK", Axis.ROW, token_id_dtype(shape.vocab_rows), (self.kept,)),
            Field("topk_logits_NK", Axis.ROW, shape.dtype, (self.kept,)),
            Field("tail_logp_N", Axis.ROW, "float32"),  # log of the mass outside the kept ids; -inf if there is none
        )

    def check(self, vocab_rows: int) -> None:
        if not (self.k >= 1 and self.extra >= 0 and self.kept <= vocab_rows):
            limit = f"1..{vocab_rows - self.extra}"
            raise RequestError("k must lie within the vocabulary", field="k", value=self.k, limit=limit)

    def check_teacher(self, info: TeacherInfo) -> None:
        if self.kept > info.limits.max_k:
            raise LimitError(
                f"above the limit of teacher {info.name!r}", field="k", value=self.kept, limit=info.limits.max_k
            )
