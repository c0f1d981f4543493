"""The teacher's answer and its output head as the losses want them, on the student's device.

In: labels as they were transferred and the head as it was fetched; out: TeacherRows and a Head over the shared ids.
"""

from __future__ import annotations

import torch

from student_trainer.labels.device_transfer import LabelTensors, to_torch
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import BFLOAT16, FLOAT32, Tolerance
from student_trainer.losses.rows import FullRows, HiddenRows, TeacherRows, TopKRows
from teacher_wire.artifacts.kinds.output_head import TeacherHead


def head_on(head: TeacherHead, vocab_rows: int, device: torch.device) -> Head:
    """The teacher's output head on the student's device, over the shared ids."""
    bias = None if head.bias_V is None else to_torch(head.bias_V, device)
    whole = Head(to_torch(head.weight_VD, device), bias, head.logit_scale, head.final_softcap)
    return whole.slice(vocab_rows)


def rows_on(labels: LabelTensors, head: Head | None, device: torch.device, likeliest: int = 0) -> TeacherRows:
    """An answer as the losses want it, on the student's device; `likeliest` is k if the student named ids beside them."""
    labels = labels.to(device)
    found = labels.named
    lse_N, label_N = found["lse_N"], found["label_logp_N"]
    if "hidden_ND" in found or "state_int8_ND" in found:
        assert head is not None, "hidden labels need the teacher's head"
        dtype = head.weight_VD.dtype  # the teacher's
        return HiddenRows(labels.state(dtype), head, lse_N, label_N, _tolerance(dtype))
    if "logits_NV" in found:
        logits_NV = found["logits_NV"]
        return FullRows(logits_NV, lse_N, label_N, _tolerance(logits_NV.dtype))
    logits_NK = found["topk_logits_NK"]
    tail_N, tolerance = found["tail_logp_N"], _tolerance(logits_NK.dtype)
    return TopKRows(found["topk_ids_NK"].long(), logits_NK, tail_N, lse_N, label_N, tolerance, likeliest)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    """How closely two computations in the teacher's dtype must agree."""
    return FLOAT32 if dtype == torch.float32 else BFLOAT16
