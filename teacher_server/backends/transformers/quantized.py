"""What float8 products change in the labels, measured at loading on text that every Python installation carries.

In: a body before and after; out: figures to log and to show.
Axes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_server.signals.reduce import OutputHead

_SEQUENCES, _TOKENS = 4, 256


@dataclass(frozen=True)
class LabelError:
    """Labels of the quantized teacher against its own unquantized ones.

    Attributes:
        kl_nats, kl_nats_max: KL(unquantized || quantized) of a row, mean and largest.
        top1_agreement: share of rows whose likeliest token is the same.
        lse, lse_max: absolute difference of the log-sum-exp, mean and largest.
        rows: measured.
    """

    kl_nats: float
    kl_nats_max: float
    top1_agreement: float
    lse: float
    lse_max: float
    rows: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl_nats:.2g} nats (at most {self.kl_nats_max:.2g}), same likeliest token {self.top1_agreement:.2%}, "
            f"log-sum-exp off by {self.lse:.2g} (at most {self.lse_max:.2g}), {self.rows} rows"
        )


def probe_text(tokenizer: Any, vocab_rows: int) -> list[np.ndarray]:
    """A few sequences of Python's own documentation as token ids."""
    texts = sorted(topics.values(), key=len, reverse=True)[:_SEQUENCES]
    ids = [tokenizer(text[: 16 * _TOKENS])["input_ids"][:_TOKENS] for text in texts]
    return [np.minimum(np.array(row, np.int32), vocab_rows - 1) for row in ids]


def label_error(head: OutputHead, before_ND: Tensor, after_ND: Tensor) -> LabelError:
    """Compares labels of the same rows."""
    kl, same, lse = [], [], []
    rows = head.weight_VD.shape[0]
    wide: Callable[[Tensor], Tensor] = lambda x: head.logits(x, rows).float()  # noqa: E731
    for one_CD, other_CD in zip(before_ND.split(64), after_ND.split(64), strict=True):
        one_CV, other_CV = wide(one_CD), wide(other_CD)
        lse.append((one_CV.logsumexp(-1) - other_CV.logsumexp(-1)).abs())
        same.append(one_CV.argmax(-1) == other_CV.argmax(-1))
        logp_CV = one_CV.log_softmax(-1)
        kl.append((logp_CV.exp() * (logp_CV - other_CV.log_softmax(-1))).sum(-1))
    kl_N, same_N, lse_N = torch.cat(kl), torch.cat(same).float(), torch.cat(lse)
    return LabelError(
        kl_nats=float(kl_N.mean()),
        kl_nats_max=float(kl_N.max()),
        top1_agreement=float(same_N.mean()),
        lse=float(lse_N.mean()),
        lse_max=float(lse_N.max()),
        rows=len(kl_N),
    )
