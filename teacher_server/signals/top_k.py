"""`top_k`: the likeliest ids of each row, with the exact mass of all others."""

from __future__ import annotations

from torch import Tensor

from teacher_server.signals import output
from teacher_server.signals.base import Chunk, Reduction
from teacher_wire.score.signals.top_k import TopK


class TopKReduction(Reduction[TopK]):
    """See `output.top_k`."""

    def chunk(self, chunk: Chunk) -> dict[str, Tensor]:
        ids_CK, values_CK, lse_C, tail_C = output.top_k(chunk.logits_CV, self.signal.k, chunk.extra_CM)
        chunk.lse_C = lse_C
        return {"topk_ids_NK": ids_CK, "topk_logits_NK": values_CK, "tail_logp_N": tail_C}
