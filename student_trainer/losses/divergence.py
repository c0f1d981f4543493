"""How far the student's distribution is from the teacher's, with the derivative written by hand.

In: log-probabilities of both over the same ids. Out: one divergence a row and its exact gradient.
Must never clamp a probability, average over rows, or know where the rows came from.

Axes: C rows of a chunk, V ids (or K+1 outcomes). p is the teacher, q the student, m a mixture of both.
Everywhere an outcome of probability 0 has weight 0, so log 0 = -inf is an ordinary input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from student_trainer.errors import ConfigError

NORMALIZATIONS = ("paper", "unit")
ALPHA_KINDS = ("skew_kl", "skew_rkl", "adaptive_kl")


@dataclass(frozen=True)
class Divergence:
    """Which divergence.

    Attributes:
        kind: a key of `KINDS`.
        beta: of `jsd`, 0..1; 0 is forward KL and 1 reverse KL, exactly.
        alpha: of `skew_kl`, `skew_rkl` (0.1 in DistiLLM) and `adaptive_kl` (0.5), strictly between 0 and 1.
        normalization: of `jsd`; `unit` divides by beta (1 - beta), which joins the two ends continuously.
    Raises:
        ConfigError: an unknown name, or a number out of range.

    Source: docs/concepts/method.md 1.1, 1.2.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    normalization: Literal["paper", "unit"] = "paper"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"divergence {self.kind!r} is unknown; choose from {', '.join(KINDS)}")
        if self.normalization not in NORMALIZATIONS:
            raise ConfigError(f"normalization must be {' or '.join(NORMALIZATIONS)}, not {self.normalization!r}")
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"beta must lie in 0..1, not {self.beta}")
        if self.kind in ALPHA_KINDS and not 0 < self.alpha < 1:
            raise ConfigError(f"alpha of {self.kind} must lie strictly between 0 and 1, not {self.alpha}")


def advice(spec: Divergence) -> str | None:
    """One sentence for the user if `spec` is legal but rarely meant, else None (docs/concepts/method.md 1.2)."""
    near_an_end = 0 < spec.beta < 0.05 or 0.95 < spec.beta < 1
    if spec.kind != "jsd" or spec.normalization != "paper" or not near_an_end:
        return None
    return (
        f"jsd with beta={spec.beta:g} in the paper's form is about {spec.beta * (1 - spec.beta):.3g} times a KL, and "
        "so is its gradient; use normalization=unit, or beta 0 or 1"
    )


def divergence_and_grad(log_p_CV: Tensor, log_q_CV: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    """Divergence of every row and its derivative.

    Args:
        log_p_CV: the teacher's log-probabilities, normalised over the last axis; left as they are.
        log_q_CV: the student's, likewise.
    Returns:
        loss_C in nats, +inf where the divergence is infinite;
        grad_CV with respect to the logits whose softmax is q (for tempered logits z / tau, the caller divides by tau).
        A row of infinite divergence has no derivative; where inf - inf would appear, its gradient is 0.

    Holds two further [C, V] buffers at a time, `adaptive_kl` four. Source: docs/concepts/method.md 1.1.
    """
    return KINDS[spec.kind](log_p_CV, log_q_CV, spec)


def _forward_kl(log_p: Tensor, log_q: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return _expected(p, log_p - log_q), log_q.exp().sub_(p)


def _reverse_kl(log_p: Tensor, log_q: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    ratio = (log_q - log_p).masked_fill_(q == 0, 0)
    loss = (q * ratio).sum(-1)
    return loss, _centred(ratio, loss, q)


def _jsd(log_p: Tensor, log_q: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    beta = spec.beta
    if beta == 0:
        return _forward_kl(log_p, log_q, spec)
    if beta == 1:
        return _reverse_kl(log_p, log_q, spec)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    to_teacher = _expected(log_p.exp(), log_p - log_m)
    q = log_q.exp()
    ratio = torch.sub(log_q, log_m, out=log_m).masked_fill_(q == 0, 0)
    to_student = (q * ratio).sum(-1)
    scale = 1 / (beta * (1 - beta)) if spec.normalization == "unit" else 1.0
    loss = (beta * to_teacher + (1 - beta) * to_student) * scale
    return loss, _centred(ratio, to_student, q).mul_((1 - beta) * scale)


def _skew_kl(log_p: Tensor, log_q: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    """KL(p | alpha p + (1 - alpha) q)."""
    log_m = torch.logaddexp(log_p + math.log(spec.alpha), log_q + math.log1p(-spec.alpha))
    p, q = log_p.exp(), log_q.exp()
    loss = _expected(p, log_p - log_m)
    share = torch.sub(log_p, log_m, out=log_m).exp_().masked_fill_(p == 0, 0)  # p / m, at most 1 / alpha
    return loss, _centred(share, (q * share).sum(-1), q).mul_(spec.alpha - 1)


def _skew_rkl(log_p: Tensor, log_q: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    """KL(q | (1 - alpha) p + alpha q)."""
    log_m = torch.logaddexp(log_p + math.log1p(-spec.alpha), log_q + math.log(spec.alpha))
    q = log_q.exp()
    ratio = torch.sub(log_q, log_m, out=log_m).masked_fill_(q == 0, 0)
    loss = (q * ratio).sum(-1)
    slope = ratio.sub_(ratio.exp().mul_(spec.alpha))  # log(q/m) - alpha q/m; the constant 1 cancels
    return loss, _centred(slope, (q * slope).sum(-1), q)


def _adaptive_kl(log_p: Tensor, log_q: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL, weighted by the gap on the teacher's head and on its tail (weights are constants)."""
    forward, forward_grad = _forward_kl(log_p, log_q, spec)
    reverse, reverse_grad = _reverse_kl(log_p, log_q, spec)
    p = log_p.exp()
    gap = (p - log_q.exp()).abs_()
    rising_p, order = p.sort(-1)
    in_tail = rising_p.cumsum_(-1) <= spec.alpha
    total = gap.sum(-1)
    tail = gap.gather(-1, order).mul_(in_tail).sum(-1)
    to_reverse = torch.where(total > 0, tail / total, torch.full_like(total, 0.5))  # equal rows: both terms are 0
    loss = (1 - to_reverse) * forward + to_reverse * reverse
    grad = forward_grad.mul_((1 - to_reverse)[..., None]).add_(reverse_grad.mul_(to_reverse[..., None]))
    return loss, grad


def _expected(p: Tensor, values: Tensor) -> Tensor:
    """Sum of p * values over the last axis, without the outcomes of probability 0; overwrites `values`."""
    return values.mul_(p).masked_fill_(p == 0, 0).sum(-1)


def _centred(slope: Tensor, mean: Tensor, q: Tensor) -> Tensor:
    """q * (slope - mean): a slope in q as a slope in logits; overwrites `slope`."""
    return slope.sub_(mean[..., None]).mul_(q).masked_fill_(torch.isposinf(mean)[..., None], 0)


KINDS: dict[str, Callable[[Tensor, Tensor, Divergence], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_rkl": _skew_rkl,
    "adaptive_kl": _adaptive_kl,
}
