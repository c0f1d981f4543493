"""States to signals, in chunks of rows: the head, and what a spec asks of the logits.

In: states after the final norm [R, D] and the tokens they describe; out: tensors on the same device by name.
The logits of one chunk are all of [rows, vocabulary] that ever exists.
Axes: R rows, N rows kept of them, C rows of a chunk, M named ids, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from teacher_server.signals import output, state
from teacher_server.signals.transfer import HostRows, to_device
from teacher_wire.core.signals import SignalSpec


@dataclass(frozen=True)
class OutputHead:
    """The output projection with what an architecture does to logits afterwards (algorithms.md 3.1)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    logit_scale: float
    final_softcap: float

    def logits(self, hidden_CD: Tensor, vocab_rows: int) -> Tensor:
        """[C, V] in the model's dtype."""
        bias = None if self.bias_V is None else self.bias_V[:vocab_rows]
        logits_CV = nn.functional.linear(hidden_CD, self.weight_VD[:vocab_rows], bias)
        if self.logit_scale != 1.0:
            logits_CV = logits_CV * self.logit_scale
        if self.final_softcap:
            logits_CV = torch.tanh(logits_CV / self.final_softcap) * self.final_softcap
        return logits_CV


def reduce(
    head: OutputHead,
    hidden_RD: Tensor,
    labels_R: Tensor,
    extra_RM: Tensor | None,
    spec: SignalSpec,
    chunk_bytes: int,
    kept_R: np.ndarray | None = None,
    into: HostRows | None = None,
) -> dict[str, Tensor]:
    """The signals of rows: gathered on the device, or handed to `into` chunk by chunk (then nothing is returned).

    Args:
        head: of the model.
        hidden_RD: states after the final norm.
        labels_R: int64, the token each row describes.
        extra_RM: int64, ids whose logits are wanted beside the likeliest, or None.
        spec: what is asked.
        chunk_bytes: bound on the logits held at a time.
        kept_R: bool, rows to answer; the others are still computed where they share a chunk with one of these, so that
            a row's bits do not depend on which others are wanted. None keeps all.
        into: takes the rows of `full` and `top_k` answers to the host while further chunks are computed, so that no more
            of them is held than it says.
    """
    fixed: dict[str, Tensor] = {}
    if spec.compression == "int8":
        packed = state.pack(hidden_RD)
        fixed = {"state_int8_ND": packed.int8_CD, "state_scales_NG": packed.scales_CG}
        fixed |= {"outlier_ids_NO": packed.outlier_ids_CO, "outlier_values_NO": packed.outlier_values_CO}
        hidden_RD = packed.unpack(hidden_RD.dtype)  # lse and logp(label) are of the state that travels
    elif spec.transport == "hidden":
        fixed = {"hidden_ND": hidden_RD}
    found: dict[str, Tensor] = {}
    if kept_R is not None:
        fixed = {name: _kept(part, kept_R) for name, part in fixed.items()}
    answered = hidden_RD.shape[0] if kept_R is None else int(kept_R.sum())
    start = 0
    for rows in _chunks(hidden_RD.shape[0], spec.vocab_rows * hidden_RD.element_size(), chunk_bytes):
        if kept_R is not None and not kept_R[rows].any():
            continue
        named_CM = None if extra_RM is None else extra_RM[rows]
        parts = _of_chunk(head.logits(hidden_RD[rows], spec.vocab_rows), labels_R[rows], named_CM, spec)
        if kept_R is not None:
            parts = {name: _kept(part, kept_R[rows]) for name, part in parts.items()}
        if into is not None:
            into.add(parts)
            continue
        stop = start + len(parts["lse_N"])
        for name, part in parts.items():
            if name not in found:
                found[name] = part.new_empty((answered, *part.shape[1:]))
            found[name][start:stop] = part
        start = stop
    if into is not None:
        into.add(fixed)
        return {}
    return found | fixed


def _of_chunk(logits_CV: Tensor, labels_C: Tensor, extra_CM: Tensor | None, spec: SignalSpec) -> dict[str, Tensor]:
    if spec.transport == "top_k":
        ids_CK, values_CK, lse_C, tail_C = output.top_k(logits_CV, spec.k, extra_CM)
        kept = {"topk_ids_NK": ids_CK, "topk_logits_NK": values_CK, "tail_logp_N": tail_C}
        return {"lse_N": lse_C, "label_logp_N": output.label_logp(logits_CV, lse_C, labels_C), **kept}
    lse_C, label_C = output.lse_and_label(logits_CV, labels_C)
    figures = {"lse_N": lse_C, "label_logp_N": label_C}
    return figures | ({"logits_NV": logits_CV} if spec.transport == "full" else {})


def _kept(rows: Tensor, kept: np.ndarray) -> Tensor:
    return rows if kept.all() else rows.index_select(0, to_device(np.flatnonzero(kept), rows.device))


def _chunks(rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of rows under the bound; large ones of whole thousands, as matrix units like them."""
    step = max(1, chunk_bytes // row_bytes)
    step = step // 1024 * 1024 if step >= 1024 else step
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
