"""`layers`: the residual stream of chosen blocks, projected, as int8, or as it is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from teacher_server.signals import state
from teacher_server.signals.base import Reduction
from teacher_server.signals.captured import Wish
from teacher_wire.score.signals.layer_states import LayerStates


class LayerStatesReduction(Reduction[LayerStates]):
    """Needs no logits; `pca` needs the projections that the backend has calibrated."""

    needs_logits: ClassVar[bool] = False
    captures: ClassVar[str] = "states"

    @classmethod
    def wish(cls, signal: LayerStates) -> Wish:
        return Wish(states=signal.layers)

    def rest(self) -> dict[str, Tensor]:
        captured = self.rows.captured
        assert captured is not None, "wished"
        made: dict[str, Tensor] = {}
        for layer in self.signal.layers:
            made |= {f"layer{layer}_{name}": part for name, part in self._of(layer, captured.states[layer]).items()}
        return {name: self.rows.kept(part) for name, part in made.items()}

    def _of(self, layer: int, state_RD: Tensor) -> dict[str, Tensor]:
        if self.signal.reduction == "none":
            return {"state_ND": state_RD}
        if self.signal.reduction == "pca":
            parts_RR = self.rows.projections[layer].coordinates(state_RD, self.signal.rank)
            int8_RR, scale_R = state.pack_rows(parts_RR)
            return {"int8_NR": int8_RR, "scale_N": scale_R}
        packed = state.pack(state_RD)
        return {
            "int8_ND": packed.int8_CD,
            "scales_NG": packed.scales_CG,
            "outlier_ids_NO": packed.outlier_ids_CO,
            "outlier_values_NO": packed.outlier_values_CO,
        }
