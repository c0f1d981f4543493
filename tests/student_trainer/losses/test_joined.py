"""Several teachers in one pass: sums of their losses, whatever rows each of them has, held against the single loss and plain autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.losses.output.joined.loss import JoinedLoss, joined_loss
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.parts import Joining
from student_trainer.losses.output.policy_gradient import PolicyGradient
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.output.term import OutputTerm
from student_trainer.losses.rows import FullRows, GivenRows, TeacherRows
from student_trainer.losses.term import JoinedLabels, StudentOutputs, SupervisedRows, TeacherLabels, TeacherShare
from student_trainer.losses.total import total
from tests.student_trainer.losses import oracle
from tests.student_trainer.losses.worlds import World, world

W = world()
B = replace(
    world(seed=1), hidden_ND=W.hidden_ND, weight_VD=W.weight_VD, labels_N=W.labels_N
)  # another teacher of the same student
N, V = 40, 23
EXACT = dict(rtol=1e-10, atol=1e-13)
ONES = torch.ones(N, dtype=torch.float64)
FORMS = ["hidden", "full", "top_k"]
KINDS = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "adaptive_kl"]


def rows_of(w: World, form: str) -> TeacherRows:
    return {"hidden": w.hidden_rows, "full": w.full_rows, "top_k": lambda: w.topk_rows(5)}[form]()


def share(rows: TeacherRows, weight: float | Tensor = 1.0, row_M: np.ndarray | None = None) -> TeacherShare:
    """A teacher of some rows with one share of all of them, or a share of each of the N."""
    if row_M is not None:
        rows = rows.take(torch.from_numpy(row_M))
    if not isinstance(weight, Tensor):
        described = np.arange(N) if row_M is None else row_M
        weight = torch.zeros(N).index_fill_(0, torch.from_numpy(described), weight)
    return TeacherShare(TeacherLabels(rows, {}), weight.float(), row_M=row_M)


def run(s: OutputLossSpec, hidden: Tensor = W.hidden_ND, head: Head | None = None, weights: Tensor = ONES, z: float = 7.0,
        combine: str = "loss_sum", sampled: Tensor | None = None, **teachers: TeacherShare) -> JoinedLoss:  # fmt: skip
    joining = Joining(tuple(teachers), combine=combine)
    return joined_loss(
        hidden, head or Head(W.weight_VD), JoinedLabels(teachers), joining, W.labels_N, weights, z, s, sampled
    )


def spec(kind: str = "forward_kl", **settings: object) -> OutputLossSpec:
    return OutputLossSpec(Divergence(kind, alpha=0.4), chunk_bytes=1, **settings)  # type: ignore[arg-type]


def ragged_weights() -> Tensor:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    return weights * (torch.arange(N) % 3 != 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_teacher_alone_is_the_single_loss_bit_by_bit(form: str, kind: str, masked: bool) -> None:
    weights = ragged_weights() if masked else ONES
    s, rows = spec(kind, sft_weight=0.3, kd_weight=0.7), rows_of(W, form)
    found, want = [], []
    for into, of in ((found, True), (want, False)):
        hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
        if of:
            loss = run(s, hidden, Head(weight), weights, a=share(rows))
        else:
            loss = output_loss(hidden, Head(weight), rows, W.labels_N, weights, 7.0, s)
        into += [loss.total, *torch.autograd.grad(loss.total, (hidden, weight)), *vars(loss.parts).values()]
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("forms", [("hidden", "full"), ("top_k", "hidden"), ("top_k", "top_k")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_shares(forms: tuple[str, str], kind: str) -> None:
    s, rows = spec(kind, sft_weight=0.2), [rows_of(w, form) for w, form in zip((W, B), forms, strict=True)]
    hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
    loss = run(s, hidden, Head(weight), ragged_weights(), a=share(rows[0], 0.6), b=share(rows[1], 0.4))
    logits = hidden @ weight.T
    each = []
    for w, r, form in zip((W, B), rows, forms, strict=True):
        p, q = w.teacher_logits_NV.softmax(-1), logits.softmax(-1)
        if form == "top_k":
            p, q = oracle.coarsen(p, r.topk_ids_NK), oracle.coarsen(q, r.topk_ids_NK)
        each.append(oracle.divergence(p, q, kind, alpha=0.4))
    ce = -logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    shares = torch.tensor([0.6, 0.4]).double()  # float32 on the way
    want = (ragged_weights() * (shares[0] * each[0] + shares[1] * each[1] + 0.2 * ce)).sum() / 7.0
    torch.testing.assert_close(loss.total, want, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), **EXACT
    )
    for name, own, own_share in zip("ab", each, shares, strict=True):
        found = loss.by_teacher[name]
        torch.testing.assert_close(
            found.kd_sum / found.kd_weights, (ragged_weights() @ own.detach()) / ragged_weights().sum()
        )
        torch.testing.assert_close(found.kd_weights, ragged_weights().sum() * own_share)
        torch.testing.assert_close(found.covered, ragged_weights().sum())
    for evidence in loss.integrity:
        evidence.check()
    assert [evidence.teacher for evidence in loss.integrity] == ["a", "b"]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_teachers_of_some_rows(kind: str, interleaved: bool) -> None:
    """Each row goes to the teachers that have it; a row of none keeps its cross-entropy alone, and Z stays."""
    place = torch.arange(N)
    has_a, has_b = (place % 3 != 0, place % 2 == 0) if interleaved else (place < 25, (place >= 12) & (place < 37))
    total = 0.6 * has_a + 0.4 * has_b
    share_a, share_b = (torch.where(total > 0, part / total, 0.0) for part in (0.6 * has_a, 0.4 * has_b))
    s = spec(kind, sft_weight=0.2)
    hidden = W.hidden_ND.clone().requires_grad_()
    rows_a, rows_b = np.flatnonzero(has_a.numpy()), np.flatnonzero(has_b.numpy())
    loss = run(
        s, hidden, weights=ragged_weights(),
        a=share(W.hidden_rows(), share_a, rows_a), b=share(B.full_rows(), share_b, rows_b),
    )  # fmt: skip
    logits = hidden @ W.weight_VD.T
    of_a, of_b = (oracle.divergence(w.teacher_logits_NV.softmax(-1), logits.softmax(-1), kind) for w in (W, B))
    ce = -logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    want = (ragged_weights() * (share_a.float() * of_a + share_b.float() * of_b + 0.2 * ce)).sum() / 7.0
    torch.testing.assert_close(loss.total, want, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss.total, hidden), torch.autograd.grad(want, hidden), **EXACT)
    torch.testing.assert_close(loss.by_teacher["b"].covered, (ragged_weights() * has_b).sum())
    both = has_a & has_b & (ragged_weights() > 0)
    agree = W.teacher_logits_NV.argmax(-1) == B.teacher_logits_NV.argmax(-1)
    for found in loss.by_teacher.values():
        assert found.compared == both.sum() and found.agreeing == (both & agree).sum()


def test_agreement_is_with_the_heaviest_other_teacher_that_has_the_row() -> None:
    third = replace(W, teacher_hidden_ND=W.teacher_hidden_ND * 2)  # agrees with W in every row
    some = np.arange(10, 30)
    light = torch.zeros(N).index_fill_(0, torch.from_numpy(some), 0.2)
    loss = run(
        spec(),
        a=share(W.full_rows(), 0.3),
        b=share(B.full_rows(), 0.5 * torch.ones(N)),
        c=share(third.full_rows(), light, some),
    )
    agree = W.teacher_logits_NV.argmax(-1) == B.teacher_logits_NV.argmax(-1)
    assert loss.by_teacher["a"].agreeing == agree.sum() and loss.by_teacher["a"].compared == N
    assert loss.by_teacher["b"].agreeing == agree.sum()
    assert loss.by_teacher["c"].agreeing == agree[10:30].sum() and loss.by_teacher["c"].compared == 20


def test_a_teacher_that_has_not_answered_has_figures_of_no_rows() -> None:
    joining = Joining(("a", "b"))
    loss = joined_loss(
        W.hidden_ND,
        Head(W.weight_VD),
        JoinedLabels({"b": share(B.full_rows())}),
        joining,
        W.labels_N,
        ONES,
        7.0,
        spec(),
    )
    assert list(loss.by_teacher) == ["a", "b"]
    assert all(value == 0 for value in vars(loss.by_teacher["a"]).values())
    nobody = joined_loss(
        W.hidden_ND, Head(W.weight_VD), JoinedLabels({}), joining, W.labels_N, ONES, 7.0, spec(sft_weight=1.0)
    )
    assert nobody.parts.kd_sum == 0 and nobody.integrity == ()
    torch.testing.assert_close(
        nobody.total * 7.0, torch.nn.functional.cross_entropy(W.hidden_ND @ W.weight_VD.T, W.labels_N, reduction="sum")
    )


def test_no_row_of_weight_is_zero_with_a_graph() -> None:
    hidden = W.hidden_ND.clone().requires_grad_()
    loss = run(
        spec(sft_weight=1.0), hidden, weights=torch.zeros(N), z=0.0, a=share(W.hidden_rows()), b=share(B.topk_rows(4))
    )
    assert loss.total.item() == 0 and not torch.autograd.grad(loss.total, hidden)[0].any()


@pytest.mark.parametrize("form", FORMS)
def test_wrong_rows_of_one_teacher_are_found_and_named(form: str) -> None:
    rows = rows_of(B, form)
    shifted = rows.take(torch.arange(N).roll(1))
    loss = run(spec(), a=share(W.hidden_rows(), 0.5), b=share(shifted, 0.5))
    loss.integrity[0].check()
    with pytest.raises(TeacherHeadMismatch, match="of 40 'b' teacher rows"):
        loss.integrity[1].check()


def test_a_wrong_row_is_numbered_as_its_teacher_counts() -> None:
    some = np.arange(20, 30)
    rows = B.full_rows().take(torch.from_numpy(some))
    rows.logits_NV[3] += torch.randn(V, dtype=torch.float64) * 50
    weight = torch.zeros(N).index_fill_(0, torch.from_numpy(some), 0.5)
    loss = run(spec(), a=share(W.hidden_rows(), 0.5), b=TeacherShare(TeacherLabels(rows, {}), weight, row_M=some))
    with pytest.raises(TeacherHeadMismatch) as caught:
        loss.integrity[1].check()
    assert caught.value.row == 3


@pytest.mark.parametrize("form", ["full", "given"])
def test_policy_gradients_of_several(form: str) -> None:
    own = torch.arange(N) % 4 != 0
    sampled = torch.where(own, torch.full((N,), -1.5), torch.nan)
    s = spec(sft_weight=0.4, policy_gradient=PolicyGradient(0.5))
    given = [w.full_rows() if form == "full" else GivenRows(*w.served()) for w in (W, B)]
    hidden = W.hidden_ND.clone().requires_grad_()
    loss = run(s, hidden, a=share(given[0], 0.5), b=share(given[1], 0.5), sampled=sampled)
    want = [output_loss(hidden, Head(W.weight_VD), rows, W.labels_N, ONES, 7.0, s, sampled.double()) for rows in given]
    torch.testing.assert_close(loss.total, (want[0].total + want[1].total) / 2, **EXACT)
    grads = [torch.autograd.grad(one.total, hidden)[0] for one in (loss, *want)]
    torch.testing.assert_close(grads[0], (grads[1] + grads[2]) / 2, **EXACT)
    torch.testing.assert_close(loss.parts.clipped, (want[0].parts.clipped + want[1].parts.clipped) / 2)
    assert loss.parts.kd_weights == loss.by_teacher["a"].kd_weights * 2 == own.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    hidden, weight = W.hidden_ND.to(dtype).requires_grad_(), W.weight_VD.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total = run(
            spec("jsd", sft_weight=0.3),
            hidden,
            Head(weight),
            a=share(W.hidden_rows(), 0.5),
            b=share(B.full_rows(), 0.5),
        ).total
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = run(
        spec("jsd", sft_weight=0.3),
        exact[0],
        Head(exact[1]),
        a=share(W.hidden_rows(), 0.5),
        b=share(B.full_rows(), 0.5),
    ).total
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=0)
    for got, true in zip(torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(want, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), true, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    rows = W.full_rows()
    with pytest.raises(DataError, match="teacher 'b': 39 rows for 40 student states"):
        run(spec(), a=share(rows, 0.5), b=share(rows.take(torch.arange(39)), torch.full((N,), 0.5)))
    with pytest.raises(DataError, match="teacher 'b' has a share of row 39, of which it has sent none"):
        run(spec(), b=TeacherShare(TeacherLabels(rows.take(torch.arange(39)), {}), torch.ones(N), row_M=np.arange(39)))
    with pytest.raises(DataError, match="teacher 'b': 40 rows, and places of 3"):
        run(spec(), b=TeacherShare(TeacherLabels(rows, {}), torch.ones(N), row_M=np.arange(3)))
    with pytest.raises(ConfigError, match="teacher 'b': given labels hold no distribution"):
        run(spec(), b=share(GivenRows(*W.served())))
    with pytest.raises(ConfigError, match="top_k labels"):
        run(spec(temperature=2.0), a=share(rows, 0.5), b=share(W.topk_rows(3), 0.5))


def test_the_term_logs_the_whole_and_each_teacher() -> None:
    outputs = StudentOutputs(W.hidden_ND.reshape(4, 10, -1))
    rows = SupervisedRows(torch.arange(N), W.labels_N, torch.ones(N))
    term = OutputTerm(lambda step: spec(sft_weight=0.5), lambda: Head(W.weight_VD), (), Joining(("a", "b")))
    one = total(
        [term], outputs, JoinedLabels({"a": share(W.full_rows(), 0.6), "b": share(B.full_rows(), 0.4)}), rows, 4.0, 0
    )
    assert list(one.parts) == [
        "kd_loss", "sft_loss", "acc1", "acc3",
        "kd_loss.a", "coverage.a", "agreement.a", "kd_loss.b", "coverage.b", "agreement.b",
    ]  # fmt: skip
    mean = {name: float(part.sum / part.over) for name, part in one.parts.items()}
    assert mean["kd_loss"] == pytest.approx(0.6 * mean["kd_loss.a"] + 0.4 * mean["kd_loss.b"])
    assert float(one.loss) == pytest.approx((mean["kd_loss"] + 0.5 * mean["sft_loss"]) * N / 4.0)
    assert mean["coverage.a"] == 1 and len(one.evidence) == 2
    missing = total([term], outputs, JoinedLabels({"a": share(W.full_rows())}), rows, 4.0, 0)
    assert list(missing.parts) == list(one.parts) and float(missing.parts["coverage.b"].sum) == 0


SHARES = 0.75, 0.25  # of whose sum float32 loses nothing
P_A, P_B = W.teacher_logits_NV.softmax(-1), B.teacher_logits_NV.softmax(-1)


def single(log_p_NV: Tensor, s: OutputLossSpec, hidden: Tensor) -> Tensor:
    """The loss with one teacher whose distributions these are."""
    lse = log_p_NV.logsumexp(-1)
    logp = log_p_NV.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    return output_loss(
        hidden, Head(W.weight_VD), FullRows(log_p_NV, lse, logp), W.labels_N, ragged_weights(), 7.0, s
    ).total


def gradient_of(total: Tensor, hidden: Tensor) -> Tensor:
    return torch.autograd.grad(total, hidden)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("form", ["hidden", "full"])
def test_prob_mix_is_one_teacher_that_holds_the_mixture(kind: str, tau: float, form: str) -> None:
    s = spec(kind, temperature=tau, sft_weight=0.3)
    hidden = W.hidden_ND.clone().requires_grad_()
    a, b = (share(rows_of(w, form), part) for w, part in zip((W, B), SHARES, strict=True))
    loss = run(s, hidden, weights=ragged_weights(), combine="prob_mix", a=a, b=b)
    want = single((SHARES[0] * P_A + SHARES[1] * P_B).log(), s, hidden)
    torch.testing.assert_close(loss.total, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient_of(loss.total, hidden), gradient_of(want, hidden), rtol=1e-11, atol=1e-13)
    assert [evidence.check() for evidence in loss.integrity] == [None, None]


def test_the_mixture_of_teachers_of_some_rows() -> None:
    """Rows of one teacher are its own, rows of none have their cross-entropy alone."""
    has_a, has_b = torch.arange(N) < 25, (torch.arange(N) >= 12) & (torch.arange(N) < 37) & (torch.arange(N) != 20)
    both = has_a & has_b
    share_a, share_b = (torch.where(both, part, has.float()) for part, has in zip(SHARES, (has_a, has_b), strict=True))
    hidden, s = W.hidden_ND.clone().requires_grad_(), spec("reverse_kl", sft_weight=0.2)
    loss = run(
        s, hidden, weights=ragged_weights(), combine="prob_mix",
        a=share(W.full_rows(), share_a, np.flatnonzero(has_a.numpy())), b=share(B.hidden_rows(), share_b, np.flatnonzero(has_b.numpy())),
    )  # fmt: skip
    logits = hidden @ W.weight_VD.T
    p = share_a[:, None] * P_A + share_b[:, None] * P_B
    kd = oracle.kl(logits.softmax(-1)[has_a | has_b], p[has_a | has_b])
    ce = -logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    want = ((ragged_weights()[has_a | has_b] * kd).sum() + 0.2 * (ragged_weights() * ce).sum()) / 7.0
    torch.testing.assert_close(loss.total, want, **EXACT)
    torch.testing.assert_close(gradient_of(loss.total, hidden), gradient_of(want, hidden), **EXACT)


def test_sums_of_forward_kls_pull_to_the_arithmetic_mean_and_of_reverse_kls_to_the_geometric() -> None:
    hidden = W.hidden_ND.clone().requires_grad_()
    a, b = (share(w.full_rows(), part) for w, part in zip((W, B), SHARES, strict=True))
    arithmetic = (SHARES[0] * P_A + SHARES[1] * P_B).log()
    geometric = SHARES[0] * P_A.log() + SHARES[1] * P_B.log()
    grads = {
        kind: gradient_of(run(spec(kind), hidden, weights=ragged_weights(), a=a, b=b).total, hidden)
        for kind in ("forward_kl", "reverse_kl", "jsd")
    }
    torch.testing.assert_close(grads["forward_kl"], gradient_of(single(arithmetic, spec(), hidden), hidden), **EXACT)
    torch.testing.assert_close(
        grads["reverse_kl"], gradient_of(single(geometric, spec("reverse_kl"), hidden), hidden), **EXACT
    )
    # And neither of them anything else: the two ways of joining differ for all but the forward KL.
    for kind in ("reverse_kl", "jsd"):
        mixed = gradient_of(single(arithmetic, spec(kind), hidden), hidden)
        assert (grads[kind] - mixed).norm() > 0.05 * mixed.norm()


@pytest.mark.parametrize("forms", [("hidden", "full"), ("top_k", "full")])
def test_confidence_gives_a_row_to_the_surer_teacher(forms: tuple[str, str]) -> None:
    rows = [rows_of(w, form) for w, form in zip((W, B), forms, strict=True)]
    hidden = W.hidden_ND.clone().requires_grad_()
    some = np.arange(5, N)
    share_a = torch.where(torch.arange(N) >= 5, 0.75, 1.0)
    loss = run(
        spec("jsd", sft_weight=0.1), hidden, weights=ragged_weights(), combine="confidence",
        a=share(rows[0], share_a), b=share(rows[1], torch.where(torch.arange(N) >= 5, 0.25, 0.0), some),
    )  # fmt: skip
    logits = hidden @ W.weight_VD.T
    each, entropies = [], []
    for p, r, form in zip((P_A, P_B), rows, forms, strict=True):
        q = logits.softmax(-1)
        if form == "top_k":
            p, q = oracle.coarsen(p, r.topk_ids_NK), oracle.coarsen(q, r.topk_ids_NK)
        each.append(oracle.divergence(p, q, "jsd"))
        entropies.append(-torch.special.xlogy(p, p).sum(-1))
    of_a, of_b = share_a * (-entropies[0]).exp(), (1 - share_a) * (-entropies[1]).exp()
    ce = -logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    want = (ragged_weights() * ((of_a * each[0] + of_b * each[1]) / (of_a + of_b) + 0.1 * ce)).sum() / 7.0
    torch.testing.assert_close(loss.total, want, **EXACT)
    torch.testing.assert_close(gradient_of(loss.total, hidden), gradient_of(want, hidden), **EXACT)


def test_ways_of_joining_that_cannot_be_are_refused() -> None:
    pg = spec(policy_gradient=PolicyGradient())
    with pytest.raises(ConfigError, match=r"combine=prob_mix mixes whole distributions .* teacher 'b' does not give"):
        run(spec(), combine="prob_mix", a=share(W.full_rows(), 0.5), b=share(B.topk_rows(4), 0.5))
    for combine in ("prob_mix", "confidence"):
        with pytest.raises(ConfigError, match=f"combine={combine} needs distributions"):
            run(pg, combine=combine, a=share(W.full_rows()))
    with pytest.raises(ConfigError, match="given labels hold no distribution"):
        run(spec(), combine="confidence", a=share(GivenRows(*W.served())))
    route = run(spec(), combine="route", a=share(W.full_rows(), 0.5))
    assert route.total == run(spec(), a=share(W.full_rows(), 0.5)).total
