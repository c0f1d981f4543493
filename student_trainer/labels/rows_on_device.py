"""The teacher's answer and its output head as the losses want them, on the student's device.

In: labels as they were transferred and the head as it was fetched; out: TeacherRows and a Head over the shared ids.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from student_trainer.labels.device_transfer import LabelTensors, to_torch
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import BFLOAT16, FLOAT32, Tolerance
from student_trainer.losses.rows import FullRows, GivenRows, HiddenRows, TeacherRows, TopKRows
from teacher_wire.artifacts.kinds.output_head import TeacherHead
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.core.tensor import Tensor

CHECKED_ROWS = "row_C"


def with_checked_rows(signals: TeacherSignals, batch: TokenBatch) -> TeacherSignals:
    """An answer with the numbers of the rows that it has lse and logp(label) of (int32, "row_C"), if these are not all rows."""
    if "lse_C" not in signals:
        return signals
    row_C = np.flatnonzero(checked_rows(batch)).astype(np.int32)
    return replace(signals, tensors=signals.tensors | {CHECKED_ROWS: Tensor("int32", row_C)})


def head_on(head: TeacherHead, vocab_rows: int, device: torch.device) -> Head:
    """The teacher's output head on the student's device, over the shared ids."""
    bias = None if head.bias_V is None else to_torch(head.bias_V, device)
    whole = Head(to_torch(head.weight_VD, device), bias, head.logit_scale, head.final_softcap)
    return whole.slice(vocab_rows)


def rows_on(
    labels: LabelTensors,
    head: Head | None,
    device: torch.device,
    likeliest: int = 0,
    checked_row: np.ndarray | None = None,
) -> TeacherRows:
    """An answer as the output losses want it, on the student's device; `likeliest` is k if the student named ids beside them.

    `checked_row` is what "row_C" of the answer holds, on the host, for losses that use a part of the rows.

    Of an answer with states beside logits the logits are meant: then it is another term that has asked for the states.
    """
    labels = labels.to(device)
    found = labels.named
    if "topk_logits_NK" in found:
        lse_N, label_N, logits_NK = found["lse_N"], found["label_logp_N"], found["topk_logits_NK"]
        tail_N, tolerance = found["tail_logp_N"], _tolerance(logits_NK.dtype)
        return TopKRows(found["topk_ids_NK"].long(), logits_NK, tail_N, lse_N, label_N, tolerance, likeliest)
    if "logits_NV" in found:
        logits_NV = found["logits_NV"]
        return FullRows(logits_NV, found["lse_N"], found["label_logp_N"], _tolerance(logits_NV.dtype))
    if "hidden_ND" not in found and "state_int8_ND" not in found:
        return GivenRows(found["lse_N"], found["label_logp_N"])
    assert head is not None, "hidden labels need the teacher's head"
    dtype = head.weight_VD.dtype  # the teacher's
    state_ND, checked = labels.state(dtype), None
    if CHECKED_ROWS in found:
        row_C = found[CHECKED_ROWS].long()
        lse_N, label_N = (
            found[name].new_full((len(state_ND),), torch.nan).index_copy_(0, row_C, found[name])
            for name in ("lse_C", "label_logp_C")
        )
        checked = len(row_C)
    else:
        lse_N, label_N = found["lse_N"], found["label_logp_N"]
    return HiddenRows(state_ND, head, lse_N, label_N, _tolerance(dtype), checked, checked_row)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    """How closely two computations in the teacher's dtype must agree."""
    return FLOAT32 if dtype == torch.float32 else BFLOAT16
