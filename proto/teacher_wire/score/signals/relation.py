"""Keys and values of chosen blocks, from which a student forms relations between tokens by itself (docs/concepts/method.md 5, MiniLMv2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from teacher_wire.core.axes import Axis
from teacher_wire.core.signals import AnswerShape, Field
from teacher_wire.score.signals.chosen_layers import LayerSignal


@dataclass(frozen=True)
class Relation(LayerSignal):
    """Keys before rotation and before their norm, and values, of every token up to the last wanted row of its sequence.

    Attributes:
        reduction: "int8" with a scale for each token and tensor, or "none".
    """

    kind: ClassVar[str] = "relation"
    reductions: ClassVar[tuple[str, ...]] = ("int8", "none")

    reduction: str = "int8"

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        return tuple(
            part for layer in self.layers for name in ("keys", "values") for part in self._of(f"{name}{layer}", shape)
        )

    def _of(self, name: str, shape: AnswerShape) -> tuple[Field, ...]:
        if self.reduction == "none":
            return (Field(f"{name}_TF", Axis.TOKEN, shape.dtype, (shape.kv_width,)),)
        return (
            Field(f"{name}_int8_TF", Axis.TOKEN, "int8", (shape.kv_width,)),
            Field(f"{name}_scale_T", Axis.TOKEN, "float16"),
        )

    def captured_numbers(self, shape: AnswerShape) -> int:
        return len(self.layers) * (shape.hidden_size + 3 * shape.kv_width)
