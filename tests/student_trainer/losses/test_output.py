from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head, Lora
from student_trainer.losses.output.loss import OutputLoss, output_loss
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import TopKRows
from tests.student_trainer.losses import oracle
from tests.student_trainer.losses.worlds import world

W = world()
N, V, D = 40, 23, 6
SMALL = 1  # chunk_bytes: chunks of 16 rows, so 40 rows make three, the last one ragged
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
EXACT = dict(rtol=1e-10, atol=1e-13)
ONES = torch.ones(N, dtype=torch.float64)


def ragged_weights() -> Tensor:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    return weights * (torch.arange(N) % 3 != 1)


def spec(beta: float = 0.0, tau: float = 1.0, **settings: object) -> OutputLossSpec:
    return OutputLossSpec(Divergence("jsd", beta), tau, chunk_bytes=SMALL, **settings)  # type: ignore[arg-type]


def run(
    head: Head,
    weights: Tensor = ONES,
    z: float = 7.0,
    s: OutputLossSpec | None = None,
    hidden: Tensor = W.hidden_ND,
) -> OutputLoss:
    return output_loss(hidden, head, W.hidden_rows(), W.labels_N, weights, z, s or spec())


def want_total(logits: Tensor, weights: Tensor, z: float, s: OutputLossSpec) -> Tensor:
    kd = oracle.generalized_jsd(logits, W.teacher_logits_NV, s.divergence.beta, s.temperature)
    kd = kd * (s.temperature**2 if s.tau_squared else 1)
    ce = -logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    return (weights * (s.kd_weight * kd + s.sft_weight * ce)).sum() / z


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tau", [1.0, 2.0, 1.2, 8.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("z", [1.0, 123.0])
@pytest.mark.parametrize("sft", [0.0, 0.3])
def test_loss_and_gradients_are_the_oracles(beta: float, tau: float, masked: bool, z: float, sft: float) -> None:
    weights = ragged_weights() if masked else ONES
    s = spec(beta, tau, sft_weight=sft, kd_weight=0.7, tau_squared=masked)
    hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
    total = run(Head(weight), weights, z, s, hidden=hidden).total
    want = want_total(hidden @ weight.T, weights, z, s)
    torch.testing.assert_close(total, want, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), **EXACT
    )


@pytest.mark.parametrize("form", ["full_rows", "topk_rows"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "adaptive_kl"])
def test_other_forms_of_labels_and_every_divergence(form: str, kind: str) -> None:
    rows = W.full_rows() if form == "full_rows" else W.topk_rows(5)
    hidden = W.hidden_ND.clone().requires_grad_()
    s = OutputLossSpec(Divergence(kind, alpha=0.4), sft_weight=0.2, chunk_bytes=SMALL)
    weights = ragged_weights()
    total = output_loss(hidden, Head(W.weight_VD), rows, W.labels_N, weights, 3.0, s).total
    logits = hidden @ W.weight_VD.T
    p, q = W.teacher_logits_NV.softmax(-1), logits.softmax(-1)
    if isinstance(rows, TopKRows):
        p, q = oracle.coarsen(p, rows.topk_ids_NK), oracle.coarsen(q, rows.topk_ids_NK)
    ce = -logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    want = (weights * (oracle.divergence(p, q, kind, alpha=0.4) + 0.2 * ce)).sum() / 3.0
    torch.testing.assert_close(total, want, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(total, hidden), torch.autograd.grad(want, hidden), **EXACT)


def test_tempered_head() -> None:
    hidden, rows = W.hidden_ND.clone().requires_grad_(), W.topk_rows(5)
    s = spec(0.5, 4.0, tau_squared=True, tempered_head=True, kd_weight=2.0)
    total = output_loss(hidden, Head(W.weight_VD), rows, W.labels_N, ONES, 3.0, s).total
    logits = hidden @ W.weight_VD.T
    each = oracle.tempered_head(logits, W.teacher_logits_NV, rows.topk_ids_NK, 4.0, True, kind="jsd", beta=0.5)
    want = 2.0 * each.sum() / 3.0
    torch.testing.assert_close(total, want, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(total, hidden), torch.autograd.grad(want, hidden), **EXACT)


@pytest.mark.parametrize("frozen", [(), ("a",), ("b",), ("w",), ("h",), ("w", "bias", "h")])
def test_every_part_of_a_head_gets_its_gradient(frozen: tuple[str, ...]) -> None:
    g = torch.Generator().manual_seed(5)
    shapes = {"h": (N, D), "w": (V, D), "bias": (V,), "a": (2, D), "b": (V, 2)}
    parts = {name: torch.randn(*shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    trained = [parts[name].requires_grad_() for name in shapes if name not in frozen]
    h, w, bias, a, b = parts.values()
    head = Head(w, bias, logit_scale=0.8, final_softcap=2.5, lora=Lora(a, b, 1.5))
    s = spec(0.5, 2.0, sft_weight=0.4)
    total = run(head, ragged_weights(), 5.0, s, hidden=h).total
    logits = 2.5 * torch.tanh(0.8 * (h @ (w + 1.5 * b @ a).T + bias) / 2.5)
    want = want_total(logits, ragged_weights(), 5.0, s)
    torch.testing.assert_close(total, want, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(total, trained), torch.autograd.grad(want, trained), **EXACT)


def test_a_tied_and_sliced_head_adds_to_the_embedding() -> None:
    embedding = torch.randn(V + 4, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    ids = torch.randint(V + 4, (N,), generator=torch.Generator().manual_seed(7))
    grads = []
    for fused in (True, False):
        hidden = torch.tanh(embedding[ids])
        total = (
            run(Head(embedding).slice(V), hidden=hidden).total
            if fused
            else want_total(hidden @ embedding[:V].T, ONES, 7.0, spec())
        )
        grads.append(torch.autograd.grad(total, embedding)[0])
    torch.testing.assert_close(*grads, **EXACT)
    assert grads[0][V:].any()  # as an embedding


@pytest.mark.parametrize("windows", [[40], [20, 20], [1, 39], [3, 30, 7], [5] * 8])
def test_uneven_windows_give_the_same_gradient(windows: list[int]) -> None:
    weights = ragged_weights()
    z = torch.tensor(float((weights > 0).sum()))
    weight = W.weight_VD.clone().requires_grad_()
    s, rows, start = spec(0.5, sft_weight=0.5), W.hidden_rows(), 0
    for size in windows:
        part = torch.arange(start, start + size)
        loss = output_loss(W.hidden_ND[part], Head(weight), rows.take(part), W.labels_N[part], weights[part], z, s)
        loss.total.backward()
        start += size
    assert start == N
    whole = W.weight_VD.clone().requires_grad_()
    want = torch.autograd.grad(want_total(W.hidden_ND @ whole.T, weights, float(z), s), whole)[0]
    torch.testing.assert_close(weight.grad, want, **EXACT)


def test_grad_out_and_repeated_backward() -> None:
    hidden = W.hidden_ND.clone().requires_grad_()
    total = run(Head(W.weight_VD), hidden=hidden).total
    once = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(total * 8.0, hidden)[0], 8.0 * once)


@pytest.mark.parametrize("tau", [0.5, 0.7, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("form", ["hidden_rows", "full_rows"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(tau: float, beta: float, form: str) -> None:
    hidden = W.teacher_hidden_ND.clone().requires_grad_()
    loss = output_loss(
        hidden, Head(W.teacher_weight_VD), getattr(W, form)(), W.labels_N, ONES, 1.0, spec(beta, tau, tau_squared=True)
    )
    assert abs(loss.total.item()) < 1e-12
    assert torch.autograd.grad(loss.total, hidden)[0].abs().max() < 1e-12
    assert loss.parts.ce_sum > 1  # the data's own tokens are another matter


def test_tau_squared_scales_the_gradient_and_not_only_the_loss() -> None:
    hidden = W.hidden_ND.clone().requires_grad_()
    losses = [run(Head(W.weight_VD), s=spec(0.5, 4.0, tau_squared=on), hidden=hidden).total for on in (False, True)]
    plain, squared = (torch.autograd.grad(loss, hidden)[0] for loss in losses)
    torch.testing.assert_close(losses[1], 16 * losses[0])
    torch.testing.assert_close(squared, 16 * plain)


def test_a_label_outside_the_kept_ids_displaces_nothing() -> None:
    rows = W.topk_rows(3)
    outside = ~(rows.topk_ids_NK == W.labels_N[:, None]).any(-1)
    assert outside.sum() > 10
    others = W.teacher_logits_NV.argmin(-1)  # other labels, also outside: the divergence must not move
    moved = output_loss(W.hidden_ND, Head(W.weight_VD), rows, others, outside.double(), 1.0, spec()).parts.kd_sum
    kept = output_loss(W.hidden_ND, Head(W.weight_VD), rows, W.labels_N, outside.double(), 1.0, spec()).parts.kd_sum
    assert moved == kept
    p, q = (oracle.coarsen(z.softmax(-1), rows.topk_ids_NK) for z in (W.teacher_logits_NV, W.hidden_ND @ W.weight_VD.T))
    torch.testing.assert_close(kept, oracle.kl(p, q)[outside].sum())


def test_student_mass_outside_the_kept_ids_has_a_gradient() -> None:
    ids = W.topk_rows(3).topk_ids_NK
    logits = W.teacher_logits_NV.scatter(-1, ids, W.teacher_logits_NV.gather(-1, ids) - 4).requires_grad_()
    identity = torch.eye(V, dtype=torch.float64)
    loss = output_loss(logits, Head(identity), W.topk_rows(3), W.labels_N, ONES, 1.0, spec())
    grad = torch.autograd.grad(loss.total, logits)[0]
    outside = torch.ones(N, V, dtype=torch.bool).scatter_(-1, ids, False)
    assert (grad[outside] > 0).all()
    assert (grad[~outside] < 0).all()


def test_parts_are_sums_that_make_the_total() -> None:
    weights, s = ragged_weights(), spec(0.5, 2.0, tau_squared=True, kd_weight=0.7, sft_weight=0.3)
    loss = run(Head(W.weight_VD.clone().requires_grad_()), weights, 11.0, s)
    parts, logits = loss.parts, W.hidden_ND @ W.weight_VD.T
    torch.testing.assert_close(loss.total.detach(), (0.7 * parts.kd_sum + 0.3 * parts.ce_sum) / 11.0)
    kept = weights > 0
    top = logits.topk(3).indices == W.labels_N[:, None]
    assert parts.acc1_hits == top[kept, 0].sum()
    assert parts.acc3_hits == top[kept].sum() > parts.acc1_hits
    assert parts.rows == kept.sum()
    assert not any(t.requires_grad for t in vars(parts).values())


def test_hard_labels_alone() -> None:
    hidden = W.hidden_ND.clone().requires_grad_()
    s = OutputLossSpec(kd_weight=0.0, sft_weight=1.0, chunk_bytes=SMALL)
    loss = output_loss(hidden, Head(W.weight_VD), None, W.labels_N, ONES, 40, s)
    want = torch.nn.functional.cross_entropy(hidden @ W.weight_VD.T, W.labels_N)
    torch.testing.assert_close(loss.total, want, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss.total, hidden), torch.autograd.grad(want, hidden), **EXACT)
    assert loss.integrity is None


@pytest.mark.parametrize("masked", [True, False])
def test_no_valid_row_is_zero_with_a_graph(masked: bool) -> None:
    hidden = torch.full((N, D), math.nan, dtype=torch.float64) if masked else torch.zeros(0, D, dtype=torch.float64)
    hidden, weight = hidden.requires_grad_(), W.weight_VD.clone().requires_grad_()
    labels = torch.full((len(hidden),), -100)
    rows = W.hidden_rows().take(torch.arange(len(hidden)))
    loss = output_loss(hidden, Head(weight), rows, labels, torch.zeros(len(hidden)), 0.0, spec(sft_weight=1.0))
    assert loss.total.item() == 0
    for grad in torch.autograd.grad(loss.total, (hidden, weight)):
        assert not grad.any()
    assert loss.integrity is not None
    loss.integrity.check()
    assert loss.parts.rows == 0


def test_masked_rows_are_never_read() -> None:
    weights = ragged_weights()
    w = replace(W, hidden_ND=W.hidden_ND.clone(), labels_N=torch.where(weights > 0, W.labels_N, 0))
    w.hidden_ND[weights == 0] = math.nan
    hidden = w.hidden_ND.clone().requires_grad_()
    labels = torch.where(weights > 0, W.labels_N, -100)
    loss = output_loss(hidden, Head(w.weight_VD), w.hidden_rows(), labels, weights, 1.0, spec(sft_weight=1.0))
    assert torch.isfinite(loss.total)
    assert not torch.autograd.grad(loss.total, hidden)[0][weights == 0].any()


def test_nothing_is_computed_for_the_backward_pass_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
    want = run(Head(weight), hidden=hidden).total.detach()
    monkeypatch.setattr("student_trainer.losses.output.gradients.project_back", None)
    monkeypatch.setattr("student_trainer.losses.output.gradients.add_outer", None)
    with torch.no_grad():
        total = run(Head(weight), hidden=hidden).total
    assert not total.requires_grad
    assert total == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_inputs_get_narrow_gradients_near_the_exact_ones(dtype: torch.dtype, autocast: bool) -> None:
    hidden, weight = W.hidden_ND.to(dtype).requires_grad_(), W.weight_VD.to(dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    s = spec(0.5, 2.0, sft_weight=0.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = run(Head(weight), ragged_weights(), 5.0, s, hidden=hidden).total
    assert total.dtype == torch.float32
    want = want_total(exact[0] @ exact[1].T, ragged_weights(), 5.0, s)
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(total, (hidden, weight))
    assert all(g.dtype == dtype for g in grads)
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-5
    for got, true in zip(grads, torch.autograd.grad(want, exact), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=bound, atol=1e-6)


def test_the_size_of_a_chunk_changes_nothing() -> None:
    sizes = (1, 16 * V * 20, 1 << 30)
    totals = [run(Head(W.weight_VD), s=replace(spec(0.5), chunk_bytes=size)).total for size in sizes]
    torch.testing.assert_close(totals[0], totals[1])
    torch.testing.assert_close(totals[0], totals[2])
    assert [replace(spec(), chunk_bytes=b).chunk_rows(151_936) for b in (1, 256 << 20, 1 << 40)] == [16, 110, 1024]


def test_calls_that_do_not_fit_are_refused() -> None:
    head, rows, s = Head(W.weight_VD), W.hidden_rows(), spec()
    with pytest.raises(DataError, match=r"label id 23 lies outside 0\.\.22"):
        output_loss(W.hidden_ND, head, rows, torch.full((N,), V), ONES, 1.0, s)
    with pytest.raises(DataError, match="label id -100"):
        output_loss(W.hidden_ND, head, rows, torch.full((N,), -100), ONES, 1.0, s)
    with pytest.raises(DataError, match="23 and 20 ids"):
        output_loss(W.hidden_ND, head.slice(20), rows, W.labels_N, ONES, 1.0, s)
    with pytest.raises(DataError, match="39 labels for 40 student states"):
        output_loss(W.hidden_ND, head, rows, W.labels_N[1:], ONES, 1.0, s)
    with pytest.raises(DataError, match="39 rows for 40"):
        output_loss(W.hidden_ND, head, rows.take(torch.arange(39)), W.labels_N, ONES, 1.0, s)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="weights must be finite"):
            output_loss(W.hidden_ND, head, rows, W.labels_N, ONES * bad, 1.0, s)
        with pytest.raises(DataError, match="normalizer"):
            output_loss(W.hidden_ND, head, rows, W.labels_N, ONES, bad, s)
    with pytest.raises(ConfigError, match="kd_weight to 0"):
        output_loss(W.hidden_ND, head, None, W.labels_N, ONES, 1.0, spec(sft_weight=1.0))
    with pytest.raises(ConfigError, match="top_k labels"):
        output_loss(W.hidden_ND, head, W.topk_rows(3), W.labels_N, ONES, 1.0, spec(tau=1.2))
    with pytest.raises(ConfigError, match="tempered_head"):
        output_loss(W.hidden_ND, head, rows, W.labels_N, ONES, 1.0, spec(tempered_head=True))


@pytest.mark.parametrize("name", ["temperature", "chunk_bytes", "kd_weight", "sft_weight"])
def test_settings_name_their_limit(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be (at least|above) 0, not -1"):
        OutputLossSpec(**{name: -1})
