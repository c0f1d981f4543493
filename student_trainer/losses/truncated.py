"""Losses on truncated labels: K kept ids and the exact mass of all the others, as one further outcome.

In: the teacher's K log-probabilities and tail, the student's full log-probabilities. Out: loss a row, exact gradient.
Must never renormalise over the kept ids alone (blind to the student's mass outside) nor form log(1 - sum).

Axes: C rows of a chunk, K kept ids, V ids. Losses on coarser outcomes are lower bounds: do not compare transports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.errors import ConfigError
from student_trainer.losses.divergence import Divergence, divergence_and_grad


def check_temperature(transport: str, temperature: float, tempered_head: bool) -> None:
    """Refuses a temperature at which the labels have no exact meaning.

    Top-k labels are taken at temperature 1 and do not determine the tail's mass at any other (docs/concepts/method.md 2.4), so
    even 1 < tau <= 1.5 would be a guess: it is refused like the rest. Only labels computed by the server at tau could
    serve there, which the wire does not carry.

    Args:
        transport: `hidden`, `full` or `top_k`.
        temperature: of the loss; for a schedule, call with its start and its end.
    Raises:
        ConfigError: names the choices.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature must be above 0, not {temperature}")
    if transport != "top_k" and tempered_head:
        raise ConfigError(f"tempered_head is an objective on top_k labels; {transport} is exact at every temperature")
    if transport == "top_k" and temperature != 1 and not tempered_head:
        raise ConfigError(
            f"top_k labels do not determine the teacher at temperature {temperature:g}; choose labels.transport=hidden "
            "(exact at every temperature), temperature 1, or tempered_head=true (a different objective)"
        )


def bucket_and_grad(
    topk_ids_CK: Tensor, topk_logp_CK: Tensor, tail_logp_C: Tensor, log_q_CV: Tensor, spec: Divergence
) -> tuple[Tensor, Tensor]:
    """Divergence over K+1 outcomes: each kept id, and everything else.

    Args:
        topk_ids_CK: int64, distinct in a row.
        topk_logp_CK, tail_logp_C: the teacher's log-probabilities at temperature 1; with the tail they sum to 1.
            A tail of -inf (K = V) is exact.
        log_q_CV: the student's log-probabilities over all ids, at temperature 1.
    Returns:
        loss_C in nats; grad_CV with respect to the student's logits: tail token i gets grad[tail] * q_i / q_tail.

    Source: docs/concepts/method.md 2.1.
    """
    rest_CV, log_q_tail_C = _rest(topk_ids_CK, log_q_CV)
    log_q_CK = log_q_CV.gather(-1, topk_ids_CK)
    loss_C, grad_CK1 = divergence_and_grad(
        torch.cat([topk_logp_CK, tail_logp_C[:, None]], -1), torch.cat([log_q_CK, log_q_tail_C[:, None]], -1), spec
    )
    return loss_C, _spread(topk_ids_CK, rest_CV, log_q_tail_C, grad_CK1)


def tempered_head_and_grad(
    topk_ids_CK: Tensor,
    topk_logp_CK: Tensor,
    tail_logp_C: Tensor,
    log_q_CV: Tensor,
    temperature: float,
    tau_squared: bool,
    spec: Divergence,
) -> tuple[Tensor, Tensor]:
    """Another objective, with a meaning at any temperature: the head's mass at 1 and the head's shape at tau.

    L = KL((P_K, 1 - P_K) | (Q_K, 1 - Q_K)) + P_K * s(tau) * D(softmax(z^T_K / tau) | softmax(z^S_K / tau)); zero iff
    head mass and head shape agree. At tau = 1 with forward KL it is the bucket form.

    Args:
        log_q_CV: the student's log-probabilities at temperature 1; the other arguments as in `bucket_and_grad`.
        tau_squared: s(tau) = tau^2 instead of 1.
    Returns:
        loss_C in nats; grad_CV with respect to the student's raw logits (tau is dealt with inside).

    Source: docs/concepts/method.md 2.4, option 4.
    """
    rest_CV, log_q_tail_C = _rest(topk_ids_CK, log_q_CV)
    log_q_CK = log_q_CV.gather(-1, topk_ids_CK)
    log_p_head_C, log_q_head_C = topk_logp_CK.logsumexp(-1), log_q_CK.logsumexp(-1)
    mass_C, mass_grad_C2 = divergence_and_grad(
        torch.stack([log_p_head_C, tail_logp_C], -1), torch.stack([log_q_head_C, log_q_tail_C], -1), Divergence()
    )
    shape_C, shape_grad_CK = divergence_and_grad(
        (topk_logp_CK / temperature).log_softmax(-1), (log_q_CK / temperature).log_softmax(-1), spec
    )
    scale_C = log_p_head_C.exp() * (temperature**2 if tau_squared else 1.0)
    share_CK = (log_q_CK - log_q_head_C[:, None]).exp_()
    grad_CK = share_CK.mul_(mass_grad_C2[:, :1]).add_(shape_grad_CK.mul_(scale_C[:, None] / temperature))
    grad_CK1 = torch.cat([grad_CK, mass_grad_C2[:, 1:]], -1)
    return mass_C + scale_C * shape_C, _spread(topk_ids_CK, rest_CV, log_q_tail_C, grad_CK1)


def _rest(topk_ids_CK: Tensor, log_q_CV: Tensor) -> tuple[Tensor, Tensor]:
    """The student outside the kept ids (-inf inside), and the log of its mass there.

    A sum over the rest, not log(1 - sum over the head): that cancels when the head holds nearly everything, and with
    it goes the gradient that would pull the tail back (docs/concepts/method.md 2.1).
    """
    rest_CV = log_q_CV.scatter(-1, topk_ids_CK, -torch.inf)
    return rest_CV, rest_CV.logsumexp(-1)


def _spread(topk_ids_CK: Tensor, rest_CV: Tensor, log_q_tail_C: Tensor, grad_CK1: Tensor) -> Tensor:
    """A gradient over outcomes as one over ids; overwrites `rest_CV`."""
    empty_C = torch.isneginf(log_q_tail_C)
    share_CV = rest_CV.sub_(log_q_tail_C.masked_fill(empty_C, 0)[:, None]).exp_()  # q_i / q_tail, 0 at kept ids
    return share_CV.mul_(grad_CK1[:, -1:]).scatter_(-1, topk_ids_CK, grad_CK1[:, :-1])
