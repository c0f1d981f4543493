"""The output distribution reduced: lse, label log-probability, top-k with its exact tail mass.

In: logits [C, V] of a chunk of rows, on the model's device; out: tensors on the same device.
Axes: C rows of a chunk, V vocabulary, K kept ids. Log-sums are float32; values keep the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lse_and_label(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [C] and log-probability of the label [C], float32, at temperature 1 (algorithms.md 3.6)."""
    wide_CV = logits_CV.float()
    lse_C = torch.logsumexp(wide_CV, dim=-1)
    return lse_C, wide_CV.gather(-1, labels_C[:, None]).squeeze(-1) - lse_C


def top_k(logits_CV: Tensor, lse_C: Tensor, k: int, extra_CM: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest logits, exactly: ids [C, K], values [C, K], log of the mass outside them [C].

    With `extra_CM` (ids, distinct in a row) these are kept too, beside the k largest of all others: K = k + M distinct ids.

    Order is by falling logit, then rising id, and a tie at the border keeps the lower ids: bf16 logits
    tie often, and the answer must not depend on the kernel. The tail is a log-sum-exp of what is left,
    never log(1 - sum), which cancels (algorithms.md 2.1).
    """
    others_CV = logits_CV if extra_CM is None else logits_CV.scatter(-1, extra_CM, -torch.inf)
    values_CK, ids_CK = torch.topk(others_CV, k, dim=-1)
    border_C1 = values_CK[:, -1:]
    crowded_C = (others_CV >= border_C1).sum(-1) > k  # more candidates at the border than places
    if bool(crowded_C.any()):
        ids_CK[crowded_C] = _lowest_ids(others_CV[crowded_C], border_C1[crowded_C], k)
    if extra_CM is not None:
        ids_CK = torch.cat([ids_CK, extra_CM], dim=-1)
    ids_CK = ids_CK.sort(dim=-1).values
    values_CK = logits_CV.gather(-1, ids_CK)
    order_CK = torch.sort(values_CK, dim=-1, descending=True, stable=True).indices
    ids_CK, values_CK = ids_CK.gather(-1, order_CK), values_CK.gather(-1, order_CK)
    rest_CV = logits_CV.float().scatter(-1, ids_CK, -torch.inf)
    return ids_CK, values_CK, torch.logsumexp(rest_CV, dim=-1) - lse_C


def _lowest_ids(logits_CV: Tensor, border_C1: Tensor, k: int) -> Tensor:
    """Ids above the border and, of those on it, the lowest, k in all."""
    vocab = logits_CV.shape[-1]
    rank_V = torch.arange(vocab, device=logits_CV.device)
    # above the border: 0..V-1; on it: V..2V-1; below: out of reach. The k smallest keys are the answer.
    key_CV = rank_V + vocab * (logits_CV == border_C1) + 2 * vocab * (logits_CV < border_C1)
    return torch.topk(key_CV, k, dim=-1, largest=False).values % vocab
