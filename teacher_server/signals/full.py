"""`full`: every logit of each row, as the model gives it."""

from __future__ import annotations

from torch import Tensor

from teacher_server.signals.base import Chunk, Reduction
from teacher_wire.score.signals.full import Full


class FullReduction(Reduction[Full]):
    """The logits themselves."""

    def chunk(self, chunk: Chunk) -> dict[str, Tensor]:
        return {"logits_NV": chunk.logits_CV}
