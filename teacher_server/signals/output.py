"""The output distribution reduced: lse, label log-probability, top-k with its exact tail mass.

In: logits [C, V] of a chunk of rows, on the model's device; out: tensors on the same device.
Axes: C rows of a chunk, V vocabulary, B blocks of neighbouring ids, K kept ids, M named ids. Log-sums are float32;
values keep the model's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teacher_server.signals import kernels

_LEAST_BLOCK = 4  # with smaller ones, two stages cost more than one
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def lse_and_label(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [C] and log-probability of the label [C], float32, at temperature 1 (docs/concepts/method.md 3.6)."""
    lse_C = log_sum_exp(logits_CV)
    return lse_C, label_logp(logits_CV, lse_C, labels_C)


def label_logp(logits_CV: Tensor, lse_C: Tensor, labels_C: Tensor) -> Tensor:
    """Log-probability [C] of the label, float32."""
    return logits_CV.gather(-1, labels_C[:, None]).squeeze(-1).float() - lse_C


def top_k(logits_CV: Tensor, k: int, extra_CM: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest logits, exactly: ids [C, K], values [C, K], lse [C], log of the mass outside the ids [C].

    With `extra_CM` (ids, distinct in a row) these are kept too, beside the k largest of all others: K = k + M distinct ids.

    Order is by falling logit, then rising id, and a tie at the border keeps the lower ids: bf16 logits
    tie often, and the answer must not depend on the kernel. The tail is a log-sum-exp of what is left,
    never log(1 - sum), which cancels (docs/concepts/method.md 2.1).
    """
    others_CV = logits_CV if extra_CM is None else logits_CV.scatter(-1, extra_CM, -torch.inf)
    if kernels.usable(logits_CV, k):
        small_CK, lse_C, rest_C = kernels.top_k(others_CV, k)
        ids_CK = small_CK.long()
        if extra_CM is not None:
            lse_C = torch.logaddexp(lse_C, logits_CV.gather(-1, extra_CM).float().logsumexp(-1))
    else:
        ids_CK = largest_ids(others_CV, k)
        lse_C, rest_C = log_sum_exp(logits_CV), log_sum_exp(others_CV.scatter(-1, ids_CK, -torch.inf))
    if extra_CM is not None:
        ids_CK = torch.cat([ids_CK, extra_CM], dim=-1).sort(dim=-1).values
    values_CK = logits_CV.gather(-1, ids_CK)
    order_CK = torch.sort(values_CK, dim=-1, descending=True, stable=True).indices
    return ids_CK.gather(-1, order_CK), values_CK.gather(-1, order_CK), lse_C, rest_C - lse_C


def log_sum_exp(logits_CV: Tensor) -> Tensor:
    """Log-sum-exp [C], float32."""
    return kernels.lse(logits_CV) if kernels.usable(logits_CV) else torch.logsumexp(logits_CV.float(), dim=-1)


def largest_ids(logits_CV: Tensor, k: int) -> Tensor:
    """Ids [C, k] of the k largest logits, at a tie the lower ids, in rising order.

    Two stages: a block that holds one of the k largest is among the k blocks of largest maxima, lower blocks first at
    a tie, since each of k others ahead of it would hold an entry ahead of it.
    """
    rows, vocab = logits_CV.shape
    block = 1 << round(math.log2(max(1.0, vocab / k)) / 2)  # as many blocks as candidates
    if block < _LEAST_BLOCK:
        return _first(logits_CV, k).sort(dim=-1).values
    padded_CV = torch.nn.functional.pad(logits_CV, (0, -vocab % block), value=-torch.inf)
    blocks_CBS = padded_CV.view(rows, -1, block)
    chosen_Ck = _first(blocks_CBS.amax(-1), k).sort(dim=-1).values
    ids_Ck1 = chosen_Ck[..., None] * block
    ids_CS = (ids_Ck1 + torch.arange(block, device=logits_CV.device)).view(rows, -1)
    seats_CK = _first(padded_CV.gather(-1, ids_CS), k)  # seats rise with ids, and k <= vocab keeps padding out
    return ids_CS.gather(-1, seats_CK).sort(dim=-1).values


def _first(values_CX: Tensor, k: int) -> Tensor:
    """Places [C, k] of the largest values, lower places first at a tie: by a key that no two places share."""
    bits_CX = (values_CX + 0.0).view(_BITS[values_CX.dtype]).long()  # -0 becomes 0
    top = torch.iinfo(_BITS[values_CX.dtype]).max
    order_CX = torch.where(bits_CX < 0, -1 - (bits_CX & top), bits_CX)
    key_CX = (order_CX << 31) - torch.arange(values_CX.shape[-1], device=values_CX.device)
    return torch.topk(key_CX, k, dim=-1, sorted=False).indices
