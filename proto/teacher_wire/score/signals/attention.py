"""Where a row looks, in blocks of positions and averaged over heads, so that numbers of heads need not agree (docs/concepts/method.md 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from teacher_wire.core.axes import BLOCK_POSITIONS, Axis
from teacher_wire.core.errors import RequestError
from teacher_wire.core.signals import AnswerShape, Field
from teacher_wire.score.signals.chosen_layers import LayerSignal

SINK_POSITIONS = 4  # whose probabilities are set to 0: most of the mass goes there, and teaches nothing


@dataclass(frozen=True)
class Attention(LayerSignal):
    """Probabilities averaged over query heads, without those of the first four positions, summed over blocks of positions.

    They are not normalised again: what is missing to 1 went to the first four positions.

    Attributes:
        reduction: "pooled".
        block: positions of one entry; the axis BLOCK has 64.
    """

    kind: ClassVar[str] = "attention"
    reductions: ClassVar[tuple[str, ...]] = ("pooled",)

    reduction: str = "pooled"
    block: int = BLOCK_POSITIONS

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        return tuple(Field(f"attention{layer}_K", Axis.BLOCK, "float16") for layer in self.layers)

    def check(self, vocab_rows: int) -> None:
        super().check(vocab_rows)
        if self.block != BLOCK_POSITIONS:
            raise RequestError(
                "attention is pooled in blocks of one size", field="block", value=self.block, limit=BLOCK_POSITIONS
            )

    def captured_numbers(self, shape: AnswerShape) -> int:
        return len(self.layers) * (shape.hidden_size + 3 * shape.kv_width)
