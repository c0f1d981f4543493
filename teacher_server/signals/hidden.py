"""`hidden`: the states after the final norm, as they are or as int8. Needs no logits."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from teacher_server.signals import state
from teacher_server.signals.base import Reduction
from teacher_wire.score.signals.hidden import Hidden


class HiddenReduction(Reduction[Hidden]):
    """States, and what a student will see of them."""

    needs_logits: ClassVar[bool] = False
    _parts: dict[str, Tensor]

    def seen(self, states_RD: Tensor) -> Tensor:
        if self.signal.reduction == "none":
            self._parts = {"hidden_ND": states_RD}
            return states_RD
        packed = state.pack(states_RD)
        self._parts = {"state_int8_ND": packed.int8_CD, "state_scales_NG": packed.scales_CG}
        self._parts |= {"outlier_ids_NO": packed.outlier_ids_CO, "outlier_values_NO": packed.outlier_values_CO}
        return packed.unpack(states_RD.dtype)  # lse and logp(label) are of the state that travels

    def rest(self) -> dict[str, Tensor]:
        return {name: self.rows.kept(part) for name, part in self._parts.items()}
