"""Reverse KL as a policy gradient: its expectation, its clipping, and what becomes of rows that were not sampled.

Expectations are exact sums over the vocabulary in float64, so nothing here is a matter of luck (docs/concepts/method.md 10).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head
from student_trainer.losses.output.loss import OutputLoss, output_loss
from student_trainer.losses.output.policy_gradient import PolicyGradient, surrogate
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import GivenRows, TeacherRows
from tests.student_trainer.losses import oracle
from tests.student_trainer.losses.worlds import world

N, V = 6, 50
W = world(rows=N, vocab=V, seed=4)
EXACT = dict(rtol=1e-10, atol=1e-13)
PG = OutputLossSpec(policy_gradient=PolicyGradient(), chunk_bytes=1)


def every_outcome() -> tuple[Tensor, Tensor, Tensor]:
    """Each row V times, once with each id as its sample: row numbers, samples, and their probabilities under the student."""
    row_NV = torch.arange(N).repeat_interleave(V)
    label_NV = torch.arange(V).repeat(N)
    q_NV = (W.hidden_ND @ W.weight_VD.T).softmax(-1)
    return row_NV, label_NV, q_NV.reshape(-1)


def given(rows: Tensor, labels: Tensor) -> GivenRows:
    logp = W.teacher_logits_NV.log_softmax(-1)[rows, labels]
    return GivenRows(W.teacher_logits_NV.logsumexp(-1)[rows], logp)


def expected_gradients(spec: OutputLossSpec, rows: TeacherRows | None = None) -> tuple[Tensor, Tensor, OutputLoss]:
    """E[dL] on states and head over samples of the student as it is, by enumeration."""
    row_NV, label_NV, q_NV = every_outcome()
    hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
    found = output_loss(
        hidden[row_NV], Head(weight), rows or given(row_NV, label_NV), label_NV, q_NV, 3.0, spec, q_NV.log()
    )
    found.total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad, found


def reverse_kl_gradients(z: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
    kl_N = oracle.divergence(W.teacher_logits_NV.softmax(-1), (hidden @ weight.T).softmax(-1), "reverse_kl")
    (kl_N.sum() / z).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad, kl_N.detach()


def test_its_expectation_is_the_gradient_of_the_reverse_kl_over_the_whole_vocabulary() -> None:
    hidden, weight, found = expected_gradients(PG)
    want_hidden, want_weight, kl_N = reverse_kl_gradients()
    torch.testing.assert_close(hidden, want_hidden, **EXACT)
    torch.testing.assert_close(weight, want_weight, **EXACT)
    torch.testing.assert_close(found.parts.kd_sum, kl_N.sum(), **EXACT)  # the logged figure estimates the reverse KL
    assert float(found.parts.clipped) == 0 and found.integrity is None


@pytest.mark.parametrize("form", ["hidden", "full", "top_k"])
def test_every_transport_gives_the_same(form: str) -> None:
    row_NV, label_NV, _ = every_outcome()
    served = given(row_NV, label_NV)
    whole = {"hidden": W.hidden_rows(), "full": W.full_rows(), "top_k": W.topk_rows(3)}[form]
    rows = replace(whole.take(row_NV), lse_N=served.lse_N, label_logp_N=served.label_logp_N)
    hidden, weight, found = expected_gradients(PG, rows)
    want_hidden, want_weight, _ = reverse_kl_gradients()
    torch.testing.assert_close(hidden, want_hidden, **EXACT)
    torch.testing.assert_close(weight, want_weight, **EXACT)
    assert found.integrity is not None
    found.integrity.check()


def test_as_one_more_divergence_reverse_kl_agrees_in_total_and_gradient() -> None:
    """The product's own full-vocabulary loss, not only the oracle's."""
    hidden = W.hidden_ND.clone().requires_grad_()
    spec = OutputLossSpec(Divergence("reverse_kl"), chunk_bytes=1)
    full = output_loss(hidden, Head(W.weight_VD), W.full_rows(), W.labels_N, torch.ones(N).double(), 3.0, spec)
    full.total.backward()
    assert hidden.grad is not None
    ours, _, found = expected_gradients(PG)
    torch.testing.assert_close(ours, hidden.grad, **EXACT)
    torch.testing.assert_close(found.total, full.total, **EXACT)


def test_estimators_that_are_propagated_directly() -> None:
    """k1 teaches nothing, k2 is the reverse KL's gradient, and k3, whose value estimates the reverse KL, has that of the forward KL."""
    z_NV = (W.hidden_ND @ W.weight_VD.T).requires_grad_()
    log_q, log_p = z_NV.log_softmax(-1), W.teacher_logits_NV.log_softmax(-1)
    q, r = log_q.exp().detach(), log_p - log_q

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.sum(), z_NV, retain_graph=True)[0]

    p_NV, q_NV = log_p.exp(), z_NV.softmax(-1)
    reverse, forward = (gradient(oracle.divergence(p_NV, q_NV, kind)) for kind in ("reverse_kl", "forward_kl"))
    k1, k2, k3 = (gradient(q * k) for k in (-r, r.square() / 2, r.exp() - 1 - r))
    torch.testing.assert_close(k1, torch.zeros_like(k1), **EXACT)
    torch.testing.assert_close(k2, reverse, **EXACT)
    torch.testing.assert_close(k3, forward, **EXACT)
    assert (k3 - reverse).norm() > 0.1 * reverse.norm()


def test_samples_of_older_weights_are_weighed_by_their_ratio() -> None:
    """Unclipped, the expectation over the old policy's samples has the gradient of E_q[A], A of the old policy."""
    row_NV, label_NV, _ = every_outcome()
    old = W.hidden_ND @ W.weight_VD.T + 0.3 * torch.randn(N, V, generator=torch.Generator().manual_seed(1)).double()
    old_logp = old.log_softmax(-1)
    hidden = W.hidden_ND.clone().requires_grad_()
    spec = replace(PG, policy_gradient=PolicyGradient(math.inf))
    weights = old_logp.exp().reshape(-1)
    found = output_loss(
        hidden[row_NV], Head(W.weight_VD), given(row_NV, label_NV), label_NV, weights, 1.0, spec, old_logp.reshape(-1)
    )
    found.total.backward()
    other = W.hidden_ND.clone().requires_grad_()
    advantage = W.teacher_logits_NV.log_softmax(-1) - old_logp
    (-((other @ W.weight_VD.T).softmax(-1) * advantage).sum()).backward()
    torch.testing.assert_close(hidden.grad, other.grad, **EXACT)


@pytest.mark.parametrize("reuse", [1, 3], ids=["on_policy", "three_steps_off"])
def test_it_learns_from_samples_alone(reuse: int) -> None:
    """Tables of logits come to the teacher's, also where each sample is learned from several times, clipped."""
    g = torch.Generator().manual_seed(0)
    teacher_NV, ids, samples = 2 * torch.randn(3, 8, generator=g).double(), Head(torch.eye(8).double()), 64
    table_NV = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    row_S = torch.arange(3).repeat_interleave(samples)

    def apart() -> float:
        q = table_NV.detach().softmax(-1)
        return float(oracle.divergence(teacher_NV.softmax(-1), q, "reverse_kl").sum())

    before, clipped = apart(), 0.0
    for _ in range(120):
        log_q = table_NV.detach().log_softmax(-1)
        label_S = log_q.exp().multinomial(samples, replacement=True, generator=g).reshape(-1)
        p = teacher_NV.log_softmax(-1)[row_S, label_S]
        for _ in range(reuse):
            table_NV.grad = None
            weights = torch.ones(len(row_S)).double()
            rows = GivenRows(torch.zeros_like(p), p)
            found = output_loss(table_NV[row_S], ids, rows, label_S, weights, samples, PG, log_q[row_S, label_S])
            found.total.backward()
            assert table_NV.grad is not None
            table_NV.data -= 0.3 * table_NV.grad
            clipped += float(found.parts.clipped)
    assert apart() < 0.1 * before and (clipped > 0) == (reuse > 1)


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.5])
def test_clipping_is_ppos(clip: float) -> None:
    g = torch.Generator().manual_seed(2)
    log_q = -torch.rand(500, generator=g).double() * 4
    sampled, teacher = log_q + torch.randn(500, generator=g).double() / 3, -torch.rand(500, generator=g).double() * 5
    log_q.requires_grad_()
    ratio, advantage = (log_q - sampled).exp(), (teacher - sampled).detach()
    want = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    want.sum().backward()
    found = surrogate(log_q.detach(), sampled, teacher, PolicyGradient(clip))
    torch.testing.assert_close(found.loss_C, want.detach(), **EXACT)
    torch.testing.assert_close(found.slope_C, log_q.grad, **EXACT)
    assert torch.equal(found.clipped_C, (log_q.grad == 0))
    assert 0 < int(found.clipped_C.sum()) < 500 or clip == 1.5


def test_rows_of_the_data_have_a_cross_entropy_and_samples_have_none() -> None:
    sampled = (W.hidden_ND @ W.weight_VD.T).log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0] - 0.1
    of_data = torch.arange(N) % 2 == 0
    sampled = sampled.masked_fill(of_data, math.nan)
    weights = torch.arange(1, N + 1).double()
    spec = replace(PG, sft_weight=0.3, kd_weight=0.7)
    hidden, rows = W.hidden_ND.clone().requires_grad_(), given(torch.arange(N), W.labels_N)
    found = output_loss(hidden, Head(W.weight_VD), rows, W.labels_N, weights, 5.0, spec, sampled)
    found.total.backward()
    other = W.hidden_ND.clone().requires_grad_()
    logp = (other @ W.weight_VD.T).log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    old = sampled.nan_to_num(-1.0)  # a NaN would reach the oracle's gradient through `where`
    ratio, advantage = (logp - old).exp(), rows.label_logp_N - old
    pg = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    want = (weights * torch.where(of_data, -0.3 * logp, 0.7 * pg)).sum() / 5
    want.backward()
    torch.testing.assert_close(found.total, want.detach(), **EXACT)
    torch.testing.assert_close(hidden.grad, other.grad, **EXACT)
    parts = found.parts
    assert float(parts.ce_weights) == float(weights[of_data].sum())
    assert float(parts.kd_weights) == float(weights[~of_data].sum())
    torch.testing.assert_close(parts.ce_sum, (weights * -logp.detach())[of_data].sum(), **EXACT)


def test_a_divergence_is_of_all_rows_and_only_its_cross_entropy_spares_samples() -> None:
    sampled = torch.full((N,), -1.0).double().masked_fill(torch.arange(N) < 4, math.nan)
    spec = OutputLossSpec(Divergence("jsd", 0.5), sft_weight=0.4, chunk_bytes=1)

    def run(weights: Tensor, spec: OutputLossSpec, logp: Tensor | None) -> tuple[Tensor, OutputLoss]:
        hidden = W.hidden_ND.clone().requires_grad_()
        found = output_loss(hidden, Head(W.weight_VD), W.full_rows(), W.labels_N, weights, 5.0, spec, logp)
        found.total.backward()
        assert hidden.grad is not None
        return hidden.grad, found

    ones = torch.ones(N).double()
    mixed, found = run(ones, spec, sampled)
    kd, _ = run(ones, replace(spec, sft_weight=0.0), None)
    both, _ = run(ones, spec, None)
    torch.testing.assert_close(mixed, torch.where((torch.arange(N) < 4)[:, None], both, kd), **EXACT)
    assert (float(found.parts.kd_weights), float(found.parts.ce_weights)) == (6.0, 4.0)
    assert float(found.parts.clipped) == 0


def test_without_samples_nothing_changes_by_a_bit() -> None:
    spec = OutputLossSpec(Divergence("jsd", 0.5), sft_weight=0.4, chunk_bytes=1)
    runs = []
    for sampled in (None, torch.full((N,), math.nan)):
        hidden = W.hidden_ND.clone().requires_grad_()
        found = output_loss(
            hidden, Head(W.weight_VD), W.full_rows(), W.labels_N, torch.ones(N).double(), 5.0, spec, sampled
        )
        found.total.backward()
        runs.append((hidden.grad, found.total.detach(), found.parts.ce_sum, found.parts.ce_weights))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_batch_without_samples_teaches_a_policy_gradient_nothing() -> None:
    hidden = W.hidden_ND.clone().requires_grad_()
    rows = given(torch.arange(N), W.labels_N)
    found = output_loss(hidden, Head(W.weight_VD), rows, W.labels_N, torch.ones(N).double(), 5.0, PG, None)
    found.total.backward()
    assert hidden.grad is not None and not hidden.grad.any() and float(found.total) == 0
    assert float(found.parts.kd_weights) == 0


def test_what_cannot_be_meant_is_refused() -> None:
    rows, ones = given(torch.arange(N), W.labels_N), torch.ones(N).double()

    def ask(spec: OutputLossSpec, sampled: Tensor | None = None) -> OutputLoss:
        return output_loss(W.hidden_ND, Head(W.weight_VD), rows, W.labels_N, ones, 1.0, spec, sampled)

    with pytest.raises(ConfigError, match="given labels hold no distribution"):
        ask(OutputLossSpec())
    with pytest.raises(ConfigError, match="temperature must be 1, not 2"):
        replace(PG, temperature=2.0)
    with pytest.raises(ConfigError, match="clip of pg_rkl must be above 0"):
        PolicyGradient(0.0)
    with pytest.raises(DataError, match=r"sampled_logp must be log-probabilities.*found 0\.5"):
        ask(PG, torch.full((N,), 0.5))
    with pytest.raises(DataError, match="3 sampled_logp for 6 student states"):
        ask(PG, torch.full((3,), -0.5))
