"""The state after the final norm, from which a student with the teacher's head has every logit (docs/concepts/method.md 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from teacher_wire.core.axes import Axis
from teacher_wire.core.errors import RequestError
from teacher_wire.core.signals import AnswerShape, Field, Signal

# States as int8: channels of one scale, and the channels of largest magnitude that are sent as they are (docs/concepts/method.md 3.4).
BLOCK_CHANNELS = 128
OUTLIER_CHANNELS = 16
REDUCTIONS = ("none", "int8")


def blocks_of(hidden_size: int) -> int:
    """G, scales per row of a compressed state."""
    return -(-hidden_size // BLOCK_CHANNELS)


def outliers_of(hidden_size: int) -> int:
    """O, channels per row of a compressed state that are sent as they are."""
    return min(OUTLIER_CHANNELS, hidden_size)


@dataclass(frozen=True)
class Hidden(Signal):
    """The state as it is, or reduced: then lse and logp(label) are of the state that travels.

    Attributes:
        reduction: "none", or "int8": in blocks of 128 channels with a scale each, beside the 16 largest channels as they are.
    """

    kind: ClassVar[str] = "hidden"
    needs_head: ClassVar[bool] = True

    reduction: str = "none"

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        width = shape.hidden_size
        if self.reduction == "none":
            return (Field("hidden_ND", Axis.ROW, shape.dtype, (width,)),)
        return (
            Field("state_int8_ND", Axis.ROW, "int8", (width,)),  # 0 at the outliers
            Field("state_scales_NG", Axis.ROW, "float16", (blocks_of(width),)),
            Field("outlier_ids_NO", Axis.ROW, "uint16", (outliers_of(width),)),  # rising
            Field("outlier_values_NO", Axis.ROW, "bfloat16", (outliers_of(width),)),
        )

    def check(self, vocab_rows: int) -> None:
        if self.reduction not in REDUCTIONS:
            raise RequestError(
                "unknown reduction of hidden", field="reduction", value=self.reduction, limit="|".join(REDUCTIONS)
            )
