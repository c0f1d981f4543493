from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.errors import ConfigError
from student_trainer.losses.divergence import Divergence, divergence_and_grad
from student_trainer.losses.truncated import bucket_and_grad, check_temperature, tempered_head_and_grad
from tests.student_trainer.losses import oracle

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
KINDS = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "adaptive_kl"]
V = 17


def logits(seed: int, rows: int = 6, vocab: int = V, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def kept(teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k ids, their log-probabilities and the log of the rest's mass, summed from the smallest."""
    log_p, ids = teacher.log_softmax(-1).sort(-1, descending=True)
    tail = log_p[:, k:].logsumexp(-1) if k < teacher.shape[1] else torch.full((len(teacher),), -math.inf).double()
    return ids[:, :k], log_p[:, :k], tail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_loss_and_gradient_are_those_of_the_coarse_outcomes(kind: str, k: int) -> None:
    teacher, student = logits(0), logits(1).requires_grad_()
    ids, logp, tail = kept(teacher, k)
    p, q = (oracle.coarsen(z.softmax(-1), ids) for z in (teacher, student))
    if k == V:
        p, q = p[:, :-1], q[:, :-1]
    want = oracle.divergence(p, q, kind, alpha=0.3)
    loss, grad = bucket_and_grad(ids, logp, tail, student.detach().log_softmax(-1), Divergence(kind, alpha=0.3))
    torch.testing.assert_close(loss, want.detach(), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), student)[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_every_id_is_the_full_divergence(kind: str) -> None:
    teacher, student = logits(2), logits(3)
    spec = Divergence(kind, alpha=0.4)
    bucket = bucket_and_grad(*kept(teacher, V), student.log_softmax(-1), spec)
    torch.testing.assert_close(bucket, divergence_and_grad(teacher.log_softmax(-1), student.log_softmax(-1), spec))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail_mass", [1e-9, 1e-30])
def test_a_vanishing_student_tail_keeps_its_gradient(kind: str, tail_mass: float) -> None:
    # log(1 - sum over the head) would be log(0) here, or clamped with a gradient of 0
    k, rest = 3, V - 3
    q = torch.tensor([[1 / k] * k + [tail_mass / rest] * rest], dtype=torch.float64)
    student_logp = q.log() + 0.05 * logits(4, rows=1)
    ids = torch.arange(k)[None]
    logp, tail = torch.tensor([[0.2] * k], dtype=torch.float64).log(), torch.tensor([0.4], dtype=torch.float64).log()
    student = student_logp.clone().requires_grad_()
    log_q = student.log_softmax(-1)
    log_q_b = torch.cat([log_q[:, :k], log_q[:, k:].logsumexp(-1, keepdim=True)], -1)  # in logs: nothing cancels
    log_p_b = torch.cat([logp, tail[:, None]], -1)
    log_m = torch.logaddexp(log_p_b, log_q_b) - math.log(2)
    forward = (log_p_b.exp() * (log_p_b - log_q_b)).sum()
    reverse = (log_q_b.exp() * (log_q_b - log_p_b)).sum()
    jsd = 0.5 * (log_p_b.exp() * (log_p_b - log_m)).sum() + 0.5 * (log_q_b.exp() * (log_q_b - log_m)).sum()
    want = {"forward_kl": forward, "reverse_kl": reverse, "jsd": jsd}[kind]
    loss, grad = bucket_and_grad(ids, logp, tail, log_q.detach(), Divergence(kind))
    torch.testing.assert_close(loss[0], want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(want, student)[0], rtol=1e-10, atol=1e-40)
    assert (grad[:, k:] < 0).all()  # every tail token is pulled up


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_kl", "skew_rkl"])
def test_an_empty_teacher_tail_is_exact(kind: str) -> None:
    ids, logp = torch.tensor([[1, 4]]), torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()
    tail = torch.tensor([-math.inf], dtype=torch.float64)
    student = logits(5, rows=1).requires_grad_()
    want = oracle.divergence(torch.tensor([[0.7, 0.3, 0.0]]).double(), oracle.coarsen(student.softmax(-1), ids), kind)
    loss, grad = bucket_and_grad(ids, logp, tail, student.detach().log_softmax(-1), Divergence(kind))
    torch.testing.assert_close(loss, want.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), student)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_two_empty_tails_agree(kind: str) -> None:
    # neither side can produce the other ids: the same as if the vocabulary were the kept ones alone
    teacher, student = logits(13, vocab=4), logits(14, vocab=4)
    ids, spec = torch.arange(4).expand(6, 4), Divergence(kind, alpha=0.4)
    tail, walls = torch.full((6,), -math.inf).double(), torch.full((6, 3), -math.inf).double()
    log_q = torch.cat([student, walls], -1).log_softmax(-1)
    loss, grad = bucket_and_grad(ids, teacher.log_softmax(-1), tail, log_q, spec)
    want_loss, want_grad = divergence_and_grad(teacher.log_softmax(-1), student.log_softmax(-1), spec)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(grad, torch.cat([want_grad, torch.zeros(6, 3).double()], -1))


@pytest.mark.parametrize("kind", KINDS)
def test_student_mass_outside_the_kept_ids_is_seen(kind: str) -> None:
    # the renormalised form is identically blind here: inside the kept ids both agree in shape
    teacher = logits(6, rows=1)
    ids, logp, tail = kept(teacher, 4)
    student = teacher.clone().scatter_(-1, ids, teacher.gather(-1, ids) - 3)
    loss, grad = bucket_and_grad(ids, logp, tail, student.log_softmax(-1), Divergence(kind))
    assert loss.item() > 0.05
    outside = torch.ones(1, V, dtype=torch.bool).scatter_(-1, ids, False)
    assert (grad[outside] > 1e-4 * student.softmax(-1)[outside]).all()  # pushed down, each by its share
    assert grad[~outside].sum() < -0.01


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, V - 1), st.floats(0.2, 6), st.sampled_from(BETAS))
def test_chain_rule_and_the_bound_on_what_truncation_loses(seed: int, k: int, spread: float, beta: float) -> None:
    teacher, student = logits(seed, 3, spread=spread), logits(seed + 1, 3, spread=spread)
    ids, logp, tail = kept(teacher, k)
    p, q = teacher.softmax(-1), student.softmax(-1)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
    p_rest, q_rest = torch.where(inside, 0.0, p), torch.where(inside, 0.0, q)
    p_tail, q_tail = p_rest.sum(-1), q_rest.sum(-1)
    bucket, _ = bucket_and_grad(ids, logp, tail, student.log_softmax(-1), Divergence("jsd", beta))
    full = oracle.divergence(p, q, "jsd", beta)
    if beta == 0:
        lost = p_tail * oracle.kl(p_rest / p_tail[:, None], q_rest / q_tail[:, None])
        torch.testing.assert_close(full, bucket + lost, rtol=1e-9, atol=1e-12)
        head = oracle.kl(p.gather(-1, ids) / (1 - p_tail)[:, None], q.gather(-1, ids) / (1 - q_tail)[:, None])
        binary = oracle.kl(torch.stack([1 - p_tail, p_tail], -1), torch.stack([1 - q_tail, q_tail], -1))
        torch.testing.assert_close(bucket, binary + (1 - p_tail) * head, rtol=1e-9, atol=1e-12)
    elif beta == 1:
        lost = q_tail * oracle.kl(q_rest / q_tail[:, None], p_rest / p_tail[:, None])
        torch.testing.assert_close(full, bucket + lost, rtol=1e-9, atol=1e-12)
    else:
        m_tail = beta * p_tail + (1 - beta) * q_tail
        shares = (beta * p_tail / m_tail).tolist()
        bound = m_tail * torch.tensor([oracle.binary_entropy(share) for share in shares], dtype=torch.float64)
        assert (full - bucket > -1e-12).all()
        assert (full - bucket <= bound + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("tau_squared", [False, True])
def test_tempered_head_is_its_formula(kind: str, tau: float, tau_squared: bool) -> None:
    teacher, student = logits(7), logits(8).requires_grad_()
    ids, logp, tail = kept(teacher, 5)
    want = oracle.tempered_head(student, teacher, ids, tau, tau_squared, kind=kind, alpha=0.3)
    log_q = student.detach().log_softmax(-1)
    loss, grad = tempered_head_and_grad(ids, logp, tail, log_q, tau, tau_squared, Divergence(kind, alpha=0.3))
    torch.testing.assert_close(loss, want.detach(), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), student)[0], rtol=1e-10, atol=1e-13)


def test_tempered_head_at_one_is_the_bucket() -> None:
    teacher, log_q = logits(9), logits(10).log_softmax(-1)
    labels = kept(teacher, 5)
    tempered = tempered_head_and_grad(*labels, log_q, 1.0, True, Divergence())
    torch.testing.assert_close(tempered, bucket_and_grad(*labels, log_q, Divergence()))


def test_tempered_head_with_every_id_kept() -> None:
    teacher, student = logits(11), logits(12)
    loss, grad = tempered_head_and_grad(*kept(teacher, V), student.log_softmax(-1), 3.0, False, Divergence())
    want = oracle.generalized_jsd(student, teacher, 0.0, 3.0)
    torch.testing.assert_close(loss, want)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("tau", [0.5, 1.2, 1.5, 8.0])
def test_truncated_labels_away_from_one_are_refused_with_the_choices(tau: float) -> None:
    with pytest.raises(ConfigError, match=r"transport=hidden .*temperature 1, or tempered_head=true"):
        check_temperature("top_k", tau, False)
    check_temperature("top_k", tau, True)
    check_temperature("hidden", tau, False)
    check_temperature("full", tau, False)


def test_other_refusals_of_temperature() -> None:
    check_temperature("top_k", 1.0, False)
    with pytest.raises(ConfigError, match="above 0"):
        check_temperature("hidden", 0.0, False)
    with pytest.raises(ConfigError, match="exact at every temperature"):
        check_temperature("hidden", 1.0, True)
