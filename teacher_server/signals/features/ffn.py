"""`ffn`: how active the feed-forward network of chosen blocks is at each row."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from teacher_server.signals.base import Reduction
from teacher_server.signals.captured import Wish
from teacher_wire.score.signals.ffn import Ffn


class FfnReduction(Reduction[Ffn]):
    """Needs no logits."""

    needs_logits: ClassVar[bool] = False
    captures: ClassVar[str] = "ffn"

    @classmethod
    def wish(cls, signal: Ffn) -> Wish:
        return Wish(ffn=signal.layers, quantiles=signal.reduction == "quantiles")

    def rest(self) -> dict[str, Tensor]:
        captured, made = self.rows.captured, {}
        assert captured is not None, "wished"
        for layer in self.signal.layers:
            figures = captured.ffn[layer]
            made[f"ffn{layer}_energy_N"] = figures.energy_R.half()
            if self.signal.reduction == "quantiles":
                means_RQ = figures.quantiles_RQ
                assert means_RQ is not None, "wished"
                # A mean over thousands of channels is below what float16 tells apart; shares of 1 are not, and need no width.
                shares_RQ = means_RQ / means_RQ.sum(-1, keepdim=True).clamp_min(1e-30)
                made[f"ffn{layer}_quantiles_NQ"] = shares_RQ.half()
        return {name: self.rows.kept(part) for name, part in made.items()}
