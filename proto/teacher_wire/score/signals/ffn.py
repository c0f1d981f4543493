"""How strongly a row moves the feed-forward network of chosen blocks: one number a row, or a profile (docs/concepts/method.md 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from teacher_wire.core.axes import Axis
from teacher_wire.core.signals import AnswerShape, Field
from teacher_wire.score.signals.chosen_layers import LayerSignal

QUANTILES = 16


@dataclass(frozen=True)
class Ffn(LayerSignal):
    """Of u, the input of the network's last matrix.

    Attributes:
        reduction: "energy" is log(norm(u) / sqrt(width) + 1e-6); "quantiles" adds, for |u| sorted from the largest and divided into 16
            equal parts, each part's share of the sum.
    """

    kind: ClassVar[str] = "ffn"
    reductions: ClassVar[tuple[str, ...]] = ("energy", "quantiles")

    reduction: str = "energy"

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        return tuple(part for layer in self.layers for part in self._of(layer))

    def _of(self, layer: int) -> tuple[Field, ...]:
        energy = Field(f"ffn{layer}_energy_N", Axis.ROW, "float16")
        if self.reduction == "energy":
            return (energy,)
        return energy, Field(f"ffn{layer}_quantiles_NQ", Axis.ROW, "float16", (QUANTILES,))
