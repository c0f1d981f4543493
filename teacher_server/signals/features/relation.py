"""`relation`: keys and values of chosen blocks, of all tokens up to the last answered row of each sequence."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from teacher_server.signals import state
from teacher_server.signals.base import Reduction, Rows
from teacher_server.signals.captured import Wish
from teacher_server.signals.transfer import to_device
from teacher_wire.score.signals.relation import Relation


class RelationReduction(Reduction[Relation]):
    """Needs no logits."""

    needs_logits: ClassVar[bool] = False
    captures: ClassVar[str] = "attention"

    @classmethod
    def wish(cls, signal: Relation) -> Wish:
        return Wish(attention=signal.layers)

    def rest(self) -> dict[str, Tensor]:
        captured, made = self.rows.captured, {}
        assert captured is not None, "wished"
        index_T = to_device(tokens_sent(self.rows), self.rows.hidden_RD.device)
        for layer in self.signal.layers:
            inputs = captured.attention[layer]
            for name, all_TGd in (("keys", inputs.plain_key_TGd), ("values", inputs.value_TGd)):
                sent_TF = all_TGd.index_select(0, index_T).flatten(1)
                if self.signal.reduction == "none":
                    made[f"{name}{layer}_TF"] = sent_TF
                else:
                    made[f"{name}{layer}_int8_TF"], made[f"{name}{layer}_scale_T"] = state.pack_rows(sent_TF)
        return made


def tokens_sent(rows: Rows) -> np.ndarray:
    """int64: which of the captured tokens an answer has entries of on the axis TOKEN."""
    captured = rows.captured
    assert captured is not None, "wished"
    answered_R = np.ones(rows.count, np.bool_) if rows.kept_R is None else rows.kept_R
    ends_B = np.zeros(len(captured.cu_tokens_B1) - 1, np.int64)
    np.maximum.at(ends_B, captured.sequence_R[answered_R], captured.position_R[answered_R] + 1)
    starts_B = captured.cu_tokens_B1[:-1]
    return np.concatenate(
        [np.arange(start, start + count) for start, count in zip(starts_B.tolist(), ends_B.tolist(), strict=True)]
    )
