"""The losses again, from the formulas, with plain autograd and full logits: what the hand-written ones must equal.

In: float64 logits. Out: one loss a row, differentiable. Must never import the code under test.
Axes: N rows, V ids, K kept ids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def generalized_jsd(student_NV: Tensor, teacher_NV: Tensor, beta: float, tau: float) -> Tensor:
    """TRL's `GKDTrainer.generalized_jsd_loss` (experimental/gkd/gkd_trainer.py), before its reduction: [N]."""
    log_q, log_p = F.log_softmax(student_NV / tau, -1), F.log_softmax(teacher_NV / tau, -1)
    if beta == 0:
        jsd = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=log_q.dtype)
        log_m = torch.logsumexp(torch.stack([log_q + torch.log1p(-b), log_p + torch.log(b)]), dim=0)
        to_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        to_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
        jsd = b * to_teacher + (1 - b) * to_student
    return jsd.sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p | q) over the last axis, of probabilities, without the outcomes of p = 0."""
    safe = torch.where(p > 0, p, torch.ones_like(p))
    return torch.where(p > 0, safe * (safe.log() - torch.where(p > 0, q, torch.ones_like(q)).log()), 0.0).sum(-1)


def divergence(p: Tensor, q: Tensor, kind: str, beta: float = 0.5, alpha: float = 0.1, unit: bool = False) -> Tensor:
    """Every kind, of probabilities [N, V] (docs/concepts/method.md 1.1)."""
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(p, q)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl(q, p)
    if kind == "jsd":
        m = beta * p + (1 - beta) * q
        return (beta * kl(p, m) + (1 - beta) * kl(q, m)) / (beta * (1 - beta) if unit else 1)
    if kind == "skew_kl":
        return kl(p, alpha * p + (1 - alpha) * q)
    if kind == "skew_rkl":
        return kl(q, (1 - alpha) * p + alpha * q)
    assert kind == "adaptive_kl"
    losses = []
    for p_V, q_V in zip(p, q, strict=True):
        head, tail, mass = 0.0, 0.0, 0.0
        for i in p_V.argsort().tolist():
            mass += float(p_V[i])
            gap = abs(float(p_V[i].detach()) - float(q_V[i].detach()))
            head, tail = (head, tail + gap) if mass <= alpha else (head + gap, tail)
        losses.append((head * kl(p_V, q_V) + tail * kl(q_V, p_V)) / (head + tail))
    return torch.stack(losses)


def coarsen(p_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Probabilities over the K kept ids and, last, everything else: [N, K+1]."""
    inside = torch.zeros_like(p_NV, dtype=torch.bool).scatter(-1, ids_NK, True)
    return torch.cat([p_NV.gather(-1, ids_NK), torch.where(inside, 0.0, p_NV).sum(-1, keepdim=True)], -1)


def tempered_head(
    student_NV: Tensor, teacher_NV: Tensor, ids_NK: Tensor, tau: float, tau_squared: bool, **kind: float | str
) -> Tensor:
    """docs/concepts/method.md 2.4, option 4."""
    p, q = coarsen(teacher_NV.softmax(-1), ids_NK), coarsen(student_NV.softmax(-1), ids_NK)
    p_2 = torch.stack([p[:, :-1].sum(-1), p[:, -1]], -1)
    q_2 = torch.stack([q[:, :-1].sum(-1), q[:, -1]], -1)
    heads = [(logits.gather(-1, ids_NK) / tau).softmax(-1) for logits in (teacher_NV, student_NV)]
    return kl(p_2, q_2) + p_2[:, 0] * divergence(*heads, **kind) * (tau**2 if tau_squared else 1)


def binary_entropy(x: float) -> float:
    """In nats; 0 at the ends."""
    return -sum(y * math.log(y) for y in (x, 1 - x) if y > 0)
