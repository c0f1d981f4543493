"""A teacher with another vocabulary: over classes, and over groups of tokens, against plain autograd in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses.cross_tokenizer.bridge import Bridge, Groups, VocabularyClasses
from student_trainer.losses.cross_tokenizer.likelihood import binarised
from student_trainer.losses.cross_tokenizer.measure import measure_bridged
from student_trainer.losses.cross_tokenizer.projection import SideOfClasses
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.losses.measure import measure
from student_trainer.losses.output.joined.loss import JoinedLoss, joined_loss
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.parts import Index, Joining, LongGroups, chunk_bounds
from student_trainer.losses.output.policy_gradient import PolicyGradient
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import GivenRows, TeacherRows, TopKRows
from student_trainer.losses.term import JoinedLabels, TeacherLabels, TeacherShare
from tests.student_trainer.losses import oracle
from tests.student_trainer.losses.worlds import World, world

W = world()
N, V = 40, 23
EXACT = dict(rtol=1e-10, atol=1e-12)
ONES = torch.ones(N, dtype=torch.float64)
FORMS = ["hidden", "full", "top_k"]
KINDS = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "adaptive_kl"]


def rows_of(w: World, form: str) -> TeacherRows:
    return {"hidden": w.hidden_rows, "full": w.full_rows, "top_k": lambda: w.topk_rows(7)}[form]()


def groups_of(*sizes: tuple[int, int], start: tuple[int, int] = (0, 0)) -> Groups:
    """Neighbours of so many tokens of the student and of the teacher each."""
    ends = np.cumsum(np.array([start, *sizes]), 0)
    return Groups(
        np.stack([ends[:-1, 0], ends[1:, 0]], 1).astype(np.int64),
        np.stack([ends[:-1, 1], ends[1:, 1]], 1).astype(np.int64),
    )


ONE_BY_ONE = groups_of(*[(1, 1)] * N)
SAME = VocabularyClasses(torch.arange(V), torch.arange(V), V)


def other_world(seed: int = 4, rows: int = 40, vocab: int = 31) -> World:
    """A teacher over other ids, with states and labels of its own."""
    return world(rows, vocab, seed=seed)


def some_classes(vocab: int = 31, classes: int = 12, seed: int = 0) -> VocabularyClasses:
    """A random partition; the sizes of classes differ much."""
    g = torch.Generator().manual_seed(seed)
    sides = []
    for ids in (V, vocab):
        first = torch.arange(classes)
        more = torch.minimum(
            torch.randint(classes, (ids - classes,), generator=g), torch.randint(classes, (ids - classes,), generator=g)
        )
        sides.append(torch.cat([first, more])[torch.randperm(ids, generator=g)])
    return VocabularyClasses(*sides, classes)


def bridged(w: World, rows: TeacherRows, classes: VocabularyClasses, groups: Groups, share: float | Tensor = 1.0, **settings: float) -> TeacherShare:  # fmt: skip
    share_N = share if isinstance(share, Tensor) else torch.full((N,), share)
    return TeacherShare(TeacherLabels(rows, {}), share_N, bridge=Bridge(classes, groups, w.labels_N, **settings))


def spec(kind: str = "forward_kl", **settings: object) -> OutputLossSpec:
    return OutputLossSpec(Divergence(kind, alpha=0.4), chunk_bytes=1, **settings)  # type: ignore[arg-type]


def run(s: OutputLossSpec, hidden: Tensor = W.hidden_ND, head: Head | None = None, weights: Tensor = ONES, z: float = 7.0,
        **teachers: TeacherShare) -> JoinedLoss:  # fmt: skip
    labels = JoinedLabels(teachers)
    return joined_loss(hidden, head or Head(W.weight_VD), labels, Joining.of(labels), W.labels_N, weights, z, s)


def ragged_weights() -> Tensor:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    return weights * (torch.arange(N) % 7 != 1)


def masses(p_NV: Tensor, class_V: Tensor, classes: int) -> Tensor:
    """[N, K], by a product with zeros and ones."""
    return p_NV @ torch.nn.functional.one_hot(class_V, classes).to(p_NV.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("permuted", [False, True])
def test_equal_vocabularies_give_the_plain_loss_in_whatever_order_their_ids_are(
    form: str, kind: str, tau: float, permuted: bool
) -> None:
    if form == "top_k" and tau != 1:
        return
    order_V = torch.randperm(V, generator=torch.Generator().manual_seed(1)) if permuted else torch.arange(V)
    class_V = torch.randperm(V, generator=torch.Generator().manual_seed(2))  # and in whatever order the classes
    place_V = order_V.argsort()  # of the student's id among the teacher's
    other = replace(W, teacher_weight_VD=W.teacher_weight_VD[order_V], labels_N=place_V[W.labels_N])
    classes = VocabularyClasses(class_V, class_V[order_V], V)
    s = spec(kind, temperature=tau, tau_squared=True, sft_weight=0.3)
    hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
    loss = run(s, hidden, Head(weight), ragged_weights(), b=bridged(other, rows_of(other, form), classes, ONE_BY_ONE))
    want = output_loss(hidden, Head(weight), rows_of(W, form), W.labels_N, ragged_weights(), 7.0, s)
    torch.testing.assert_close(loss.total, want.total, rtol=1e-12, atol=1e-12)
    for got, true in zip(*(torch.autograd.grad(one.total, (hidden, weight)) for one in (loss, want)), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.parts.kd_sum, want.parts.kd_sum, rtol=1e-12, atol=1e-12)
    loss.integrity[0].check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_masses_of_classes(form: str, kind: str, seed: int) -> None:
    other, classes = other_world(seed + 4), some_classes(seed=seed)
    rows, tau = rows_of(other, form), 1.0 if form == "top_k" else 1.7
    s = spec(kind, temperature=tau, sft_weight=0.3, kd_weight=0.8)
    hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
    loss = run(s, hidden, Head(weight), ragged_weights(), b=bridged(other, rows, classes, ONE_BY_ONE))
    logits = hidden @ weight.T
    q = masses((logits / tau).softmax(-1), classes.student_Vs, classes.classes)
    p_NV = (other.teacher_logits_NV / tau).softmax(-1)
    if isinstance(rows, TopKRows):
        kept_NV = torch.zeros_like(p_NV).scatter(-1, rows.topk_ids_NK, 1.0)
        p = masses(p_NV * kept_NV, classes.teacher_Vt, classes.classes)
        named = p > 0  # classes with a kept id are outcomes of their own, all else is one
        rest = [(p_NV * (1 - kept_NV)).sum(-1, keepdim=True), (q * ~named).sum(-1, keepdim=True)]
        p, q = torch.cat([p, rest[0]], -1), torch.cat([q * named, rest[1]], -1)
    else:
        p = masses(p_NV, classes.teacher_Vt, classes.classes)
    ce = -logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    want = (ragged_weights() * (0.8 * oracle.divergence(p, q, kind, alpha=0.4) + 0.3 * ce)).sum() / 7.0
    torch.testing.assert_close(loss.total, want, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), **EXACT
    )


def mixed_groups() -> Groups:
    """Of all kinds, some rows between them in none; one longer than a chunk of 16."""
    sizes = [(1, 1), (2, 1), (1, 1), (1, 2), (1, 1), (3, 2), (1, 1), (18, 9), (1, 1), (2, 2), (1, 1)]
    found = groups_of(*sizes, start=(1, 2))
    found.student_G2[9:] += 2  # a hole
    found.teacher_G2[9:] += 1
    return found


def alm(logits: Tensor, w: World, groups: Groups, share_N: Tensor, weights: Tensor, tau: float) -> list[Tensor]:
    """Losses of the longer groups, each times its weight, by the formula."""
    log_q = logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    log_p = w.teacher_logits_NV.log_softmax(-1).gather(-1, w.labels_N[:, None])[:, 0]
    found = []
    for (i, j), (k, m) in zip(groups.student_G2.tolist(), groups.teacher_G2.tolist(), strict=True):
        if (j - i, m - k) == (1, 1) or not ((weights[i:j] > 0) & (share_N[i:j] > 0)).all():
            continue
        a, c = (log_p[k:m].sum() / tau).exp(), (log_q[i:j].sum() / tau).exp()
        found.append(-(weights * share_N)[i:j].sum() * (a * c.log() + (1 - a) * (1 - c).log()))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_longer_groups(form: str, weighted: bool) -> None:
    """Beside a teacher of the student's tokenizer; rows in no group and groups with a row of no weight are left out."""
    other, classes, groups = other_world(), some_classes(), mixed_groups()
    weights = ragged_weights() if weighted else ONES
    share_N = torch.where(torch.arange(N) < 36, 0.4, 0.0)
    s = spec("jsd", sft_weight=0.2, kd_weight=0.7)
    hidden, weight = W.hidden_ND.clone().requires_grad_(), W.weight_VD.clone().requires_grad_()
    mine = TeacherShare(TeacherLabels(W.full_rows(), {}), 1 - share_N)
    b = bridged(other, rows_of(other, form), classes, groups, share_N, alm_weight=0.5, alm_temperature=20.0)
    loss = run(s, hidden, Head(weight), weights, a=mine, b=b)
    logits = hidden @ weight.T
    own = oracle.divergence(W.teacher_logits_NV.softmax(-1), logits.softmax(-1), "jsd")
    one = np.flatnonzero((np.diff(groups.student_G2)[:, 0] == 1) & (np.diff(groups.teacher_G2)[:, 0] == 1))
    i, k = torch.from_numpy(groups.student_G2[one, 0]), torch.from_numpy(groups.teacher_G2[one, 0])
    p, q = other.teacher_logits_NV.softmax(-1)[k], logits.softmax(-1)[i]
    q = masses(q, classes.student_Vs, 12)
    if form == "top_k":
        kept = torch.zeros_like(p).scatter(-1, other.topk_rows(7).topk_ids_NK[k], 1.0)
        named = masses(p * kept, classes.teacher_Vt, 12)
        p = torch.cat([named, (p * (1 - kept)).sum(-1, keepdim=True)], -1)
        q = torch.cat([q * (named > 0), (q * (named == 0)).sum(-1, keepdim=True)], -1)
    else:
        p = masses(p, classes.teacher_Vt, 12)
    over_classes = ((weights * share_N)[i] * oracle.divergence(p, q, "jsd")).sum()
    of_groups = alm(logits, other, groups, share_N, weights, 20.0)
    assert len(of_groups) == (3 if weighted else 5)
    ce = -logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    kd = (weights * (1 - share_N) * own).sum() + over_classes + 0.5 * sum(of_groups)
    want = (0.7 * kd + 0.2 * (weights * ce).sum()) / 7.0
    torch.testing.assert_close(loss.total, want, **(EXACT | {"rtol": 1e-7}))
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, (hidden, weight)),
        torch.autograd.grad(want, (hidden, weight)),
        rtol=1e-6,
        atol=1e-8,
    )
    found = loss.by_teacher["b"]
    torch.testing.assert_close(found.kd_sum, over_classes.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.alm_sum, sum(of_groups).detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.parts.kd_sum, kd.detach(), rtol=1e-6, atol=0)
    for evidence in loss.integrity:
        evidence.check()


def test_covered_weight_is_of_the_rows_in_used_groups() -> None:
    loss = run(spec(), b=bridged(other_world(), other_world().full_rows(), some_classes(), mixed_groups()))
    assert loss.by_teacher["b"].covered == 32 and loss.parts.weights == N
    assert loss.by_teacher["b"].alm_weights == 26 and loss.by_teacher["b"].kd_weights == 6


def test_no_group_at_all_is_a_teacher_that_says_nothing() -> None:
    none = Groups(np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64))
    loss = run(spec(sft_weight=1.0), b=bridged(other_world(), other_world().hidden_rows(), some_classes(), none))
    assert loss.parts.kd_sum == 0 and loss.by_teacher["b"].covered == 0 and loss.integrity == ()


def test_agreement_across_vocabularies_is_of_classes() -> None:
    other, classes, groups = other_world(), some_classes(), mixed_groups()
    mine = TeacherShare(TeacherLabels(W.full_rows(), {}), torch.full((N,), 0.6))
    loss = run(spec(), a=mine, b=bridged(other, other.topk_rows(4), classes, groups, 0.4))
    one = (np.diff(groups.student_G2)[:, 0] == 1) & (np.diff(groups.teacher_G2)[:, 0] == 1)
    class_a = classes.student_Vs[W.teacher_logits_NV.argmax(-1)][groups.student_G2[one, 0]]
    class_b = classes.teacher_Vt[other.teacher_logits_NV.argmax(-1)][groups.teacher_G2[one, 0]]
    for found in loss.by_teacher.values():
        assert found.compared == one.sum() and found.agreeing == (class_a == class_b).sum()


@pytest.mark.parametrize("form", FORMS)
def test_wrong_rows_are_found_whether_in_classes_or_groups(form: str) -> None:
    other = other_world()
    shifted = rows_of(other, form).take(torch.arange(N).roll(1))
    for groups in (ONE_BY_ONE, groups_of(*[(2, 2)] * 20)):
        loss = run(spec(), b=bridged(other, shifted, some_classes(), groups))
        with pytest.raises(TeacherHeadMismatch, match="of 40 'b' teacher rows"):
            loss.integrity[0].check()


def test_rows_that_are_not_all_checked() -> None:
    """Hidden labels have lse and logp of some rows alone: evidence is of those, and longer groups do without."""
    other = other_world()
    served = other.hidden_rows()
    checked_N = torch.arange(N) % 3 == 0
    rows = replace(
        served,
        lse_N=served.lse_N.where(checked_N, torch.nan),
        label_logp_N=served.label_logp_N.where(checked_N, torch.nan),
        checked=int(checked_N.sum()),
    )
    for groups in (ONE_BY_ONE, groups_of(*[(2, 2)] * 20), mixed_groups()):
        loss, want = (run(spec(), b=bridged(other, some, some_classes(), groups)) for some in (rows, served))
        assert loss.total == want.total
        (evidence,) = loss.integrity
        evidence.check()
        assert 1 <= evidence.rows <= 14
    told = replace(rows, checked_row=np.flatnonzero(checked_N.numpy()).astype(np.int32))
    for used in (N, 20, 2):  # a tally of fewer rows than were looked at would take a right teacher's few for too many
        (evidence,) = run(spec(), b=bridged(other, told, some_classes(), groups_of(*[(1, 1)] * used))).integrity
        assert evidence.rows == (~evidence.served_lse_N.isnan()).sum()


def test_improbable_classes_do_not_underflow_in_float32() -> None:
    z = torch.zeros(1, V).index_fill_(1, torch.arange(1, V), -300.0)
    side = SideOfClasses.of(torch.tensor([0] + [1] * 4 + [2] * (V - 5)), 3, "student")
    class_CK = side.project(z.log_softmax(-1))
    torch.testing.assert_close(class_CK[0, 1:], torch.tensor([4.0, V - 5.0]).log() - 300)
    spread = side.spread(torch.tensor([[1.0, 2.0, 3.0]]), z.log_softmax(-1), class_CK)
    torch.testing.assert_close(spread.sum(-1), torch.tensor([6.0]), rtol=1e-5, atol=0)  # logits of -300 are this coarse
    torch.testing.assert_close(spread[0, 1:5], torch.full((4,), 0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_projection_of_any_partition(seed: int) -> None:
    """One giant class, many of one id, some between."""
    g = torch.Generator().manual_seed(seed)
    class_V = torch.cat([torch.arange(200), torch.zeros(300).long(), torch.randint(200, (150,), generator=g)])
    class_V = class_V[torch.randperm(len(class_V), generator=g)]
    side = SideOfClasses.of(class_V, 200, "student")
    z = torch.randn(5, len(class_V), generator=g, dtype=torch.float64, requires_grad=True)
    want = masses(z.exp(), class_V, 200).log()
    got = side.project(z.detach())
    torch.testing.assert_close(got, want.detach(), **EXACT)
    grad = torch.randn(5, 200, generator=g, dtype=torch.float64)
    torch.testing.assert_close(
        side.spread(grad, z.detach(), got), torch.autograd.grad((want * grad).sum(), z)[0], **EXACT
    )
    single = torch.bincount(class_V) == 1
    assert single.any() and torch.equal(got[:, single], z.detach()[:, side.first_K[single]])  # exactly
    assert torch.equal(class_V[side.first_K], torch.arange(200))


def test_classes_without_an_id_are_refused() -> None:
    with pytest.raises(DataError, match="class 1 of 3 has no id of the student"):
        SideOfClasses.of(torch.tensor([0, 2]), 3, "student")
    with pytest.raises(DataError, match=r"classes of the teacher must lie in 0\.\.1, found 0\.\.2"):
        SideOfClasses.of(torch.tensor([0, 2]), 2, "teacher")


def test_a_student_that_is_sure_of_a_group_has_a_finite_loss() -> None:
    tokens = torch.tensor([2.0, 3.0, 1.0]).double()
    log_q = torch.tensor([0.0, 0.0, -1e-9]).double()
    log_p = torch.tensor([-0.2, 0.0, -0.1]).double()
    loss, slope = binarised(log_q, log_p, tokens, 100.0, torch.finfo(torch.float32).eps)
    assert loss.isfinite().all() and slope.isfinite().all()
    assert slope[1].abs() < 0.011 and loss[1] < 1e-6  # both are sure


def test_how_sure_a_student_may_be_of_a_group_grows_with_its_tokens() -> None:
    """A float32 tells a token's probability from 1 by eps: of three tokens it cannot be surer than of 1 - 3 eps."""
    eps, log_p, sure = 1e-3, torch.full((3,), -0.1).double(), torch.zeros(3).double()
    loss, slope = binarised(sure, log_p, torch.tensor([1, 2, 3]), 1.0, eps)
    at = binarised(-eps * torch.tensor([1, 2, 3]).double(), log_p, torch.ones(3), 1.0, 1e-16)
    torch.testing.assert_close((loss, slope), at)
    assert (loss.diff() < 0).all()


def test_the_slope_of_a_group_is_autograds_and_is_0_where_both_agree() -> None:
    log_q = -torch.logspace(-3, 2, 30, dtype=torch.float64).requires_grad_()
    log_p = -torch.logspace(-3, 2, 30, dtype=torch.float64).flip(0)
    loss, slope = binarised(log_q, log_p, torch.ones(30), 100.0, 1e-16)
    torch.testing.assert_close(slope.detach(), torch.autograd.grad(loss.sum(), log_q)[0])
    assert binarised(log_p, log_p, torch.ones(30), 100.0, 1e-16)[1].abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_chunks_cut_no_group(seed: int) -> None:
    random = np.random.default_rng(seed)
    teachers = []
    for _ in range(2):
        edges = np.flatnonzero(random.random(301) < 0.3)
        ranges = np.stack([edges[:-1], edges[1:]], 1)
        ranges = ranges[random.random(len(ranges)) < 0.7]
        teachers.append(LongGroups.of(ranges, ranges, np.ones(301), torch.device("cpu"), torch.float64))
    bounds = chunk_bounds(301, 16, teachers)
    assert bounds[0] == 0 and bounds[-1] == 301 and (np.diff(bounds) > 0).all()
    for groups in teachers:
        sizes = np.diff(groups.student_start_G1)
        for first, size in zip(groups.first_G, sizes, strict=True):
            assert not any(first < bound < first + size for bound in bounds)
        assert torch.equal(groups.weight_G, torch.from_numpy(sizes).double())
    assert (np.diff(bounds) <= 16).mean() > 0.5
    assert chunk_bounds(0, 16, ()) == [0] and chunk_bounds(40, 16, ()) == [0, 16, 32, 40]


def test_neighbours_are_a_slice() -> None:
    index = Index.of(np.array([3, 4, 5, 9]), torch.device("cpu"))
    assert index.part(0, 3, 2) == slice(1, 4)
    assert Index.of(np.array([0, 2, 1, 3]), torch.device("cpu")).part(0, 4).tolist() == [0, 2, 1, 3]
    assert isinstance(index.part(1, 4, 2), Tensor) and index.part(1, 4, 2).tolist() == [2, 3, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    other, classes, groups = other_world(), some_classes(), mixed_groups()
    hidden, weight = W.hidden_ND.to(dtype).requires_grad_(), W.weight_VD.to(dtype).requires_grad_()
    b = bridged(other, other.hidden_rows(), classes, groups)
    with torch.autocast("cpu", torch.bfloat16):
        total = run(spec("jsd", sft_weight=0.3), hidden, Head(weight), b=b).total
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = run(spec("jsd", sft_weight=0.3), exact[0], Head(exact[1]), b=b).total
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=0)
    for got, true in zip(torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(want, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), true, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    other, classes = other_world(), some_classes()
    rows = other.full_rows()
    with pytest.raises(DataError, match="teacher 'b': classes of 31 ids of the teacher, whose rows are over 23"):
        run(spec(), b=bridged(W, W.full_rows(), classes, ONE_BY_ONE))
    with pytest.raises(DataError, match="teacher 'b': classes of 23 ids of the student, whose rows are over 20"):
        run(
            spec(),
            head=Head(W.weight_VD[:23]).slice(20),
            b=bridged(other, rows, classes, ONE_BY_ONE),
            weights=(W.labels_N < 20).double(),
        )
    with pytest.raises(DataError, match="teacher 'b': 40 rows, and tokens of 39"):
        run(spec(), b=bridged(replace(other, labels_N=other.labels_N[1:]), rows, classes, ONE_BY_ONE))
    with pytest.raises(DataError, match=r"teacher 'b': a token of its rows lies outside 0\.\.30"):
        run(spec(), b=bridged(replace(other, labels_N=other.labels_N + 10), rows, classes, ONE_BY_ONE))
    for bad in (
        groups_of((1, 1), start=(40, 0)),
        groups_of((2, 1), (-1, 1)),
        Groups(ONE_BY_ONE.student_G2[::-1], ONE_BY_ONE.teacher_G2),
    ):
        with pytest.raises(DataError, match="teacher 'b': groups of the student's rows must rise"):
            run(spec(), b=bridged(other, rows, classes, bad))
    with pytest.raises(ConfigError, match="teacher 'b' has another tokenizer, which divergence pg_rkl"):
        run(spec(policy_gradient=PolicyGradient()), b=bridged(other, rows, classes, ONE_BY_ONE))
    with pytest.raises(ConfigError, match="teacher 'b' has another tokenizer"):
        run(spec(tempered_head=True), b=bridged(other, other.topk_rows(4), classes, ONE_BY_ONE))
    with pytest.raises(ConfigError, match="given labels hold no distribution"):
        run(spec(), b=bridged(other, GivenRows(*other.served()), classes, ONE_BY_ONE))
    with pytest.raises(ConfigError, match="top_k labels"):
        run(spec(temperature=2.0), b=bridged(other, other.topk_rows(4), classes, ONE_BY_ONE))


def test_confidence_with_another_tokenizer_is_of_whole_sequences() -> None:
    """Two sequences; each is divided by the mean entropies of the rows that are used of it."""
    other, classes, groups = other_world(), some_classes(), mixed_groups()
    sequence_N = (np.arange(N) >= 20).astype(np.int64)  # a group lies across: its first row decides
    share_N = torch.full((N,), 0.25)
    s, hidden = spec("jsd"), W.hidden_ND.clone().requires_grad_()
    mine = TeacherShare(TeacherLabels(W.full_rows(), {}), 1 - share_N)
    b = bridged(other, other.full_rows(), classes, groups, share_N, alm_temperature=20.0)
    labels = JoinedLabels({"a": mine, "b": b})
    joining = Joining(("a", "b"), frozenset({"b"}), "confidence")
    loss = joined_loss(hidden, Head(W.weight_VD), labels, joining, W.labels_N, ONES, 7.0, s, sequence_N=sequence_N)
    entropy = [-torch.special.xlogy(p, p).sum(-1) for p in (w.teacher_logits_NV.softmax(-1) for w in (W, other))]
    used_b = [np.concatenate([np.arange(k, m) for (i, _), (k, m) in zip(groups.student_G2, groups.teacher_G2, strict=True)
                              if sequence_N[i] == at]) for at in (0, 1)]  # fmt: skip
    sure_a = torch.stack([(-entropy[0][sequence_N == at].mean()).exp() for at in (0, 1)])
    sure_b = torch.stack([(-entropy[1][used_b[at]].mean()).exp() for at in (0, 1)])
    new_b = (0.25 * sure_b / (0.75 * sure_a + 0.25 * sure_b))[torch.from_numpy(sequence_N)]
    logits = hidden @ W.weight_VD.T
    own = oracle.divergence(W.teacher_logits_NV.softmax(-1), logits.softmax(-1), "jsd")
    want = (1 - new_b) @ own
    log_q = logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    log_p = other.teacher_logits_NV.log_softmax(-1).gather(-1, other.labels_N[:, None])[:, 0]
    for (i, j), (k, m) in zip(groups.student_G2.tolist(), groups.teacher_G2.tolist(), strict=True):
        if (j - i, m - k) == (1, 1):
            p = masses(other.teacher_logits_NV.softmax(-1)[k : k + 1], classes.teacher_Vt, 12)
            q = masses(logits.softmax(-1)[i : i + 1], classes.student_Vs, 12)
            want = want + new_b[i] * oracle.divergence(p, q, "jsd").sum()
        else:
            a, c = (log_p[k:m].sum() / 20).exp(), (log_q[i:j].sum() / 20).exp()
            want = want - 0.5 * (j - i) * new_b[i] * (a * c.log() + (1 - a) * (1 - c).log())
    torch.testing.assert_close(loss.total, want / 7.0, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, hidden)[0], torch.autograd.grad(want / 7.0, hidden)[0], rtol=1e-6, atol=1e-9
    )
    with pytest.raises(ConfigError, match=r"combine=prob_mix mixes whole distributions .* teacher 'b' does not give"):
        joined_loss(hidden, Head(W.weight_VD), labels, replace(joining, combine="prob_mix"), W.labels_N, ONES, 7.0, s)


def test_a_teacher_that_says_nothing_of_a_sequence_takes_no_share_of_it() -> None:
    """Its rows all lie in the second sequence: the first is the other teacher's, as if it were alone."""
    other, classes = other_world(), some_classes()
    sequence_N = (np.arange(N) >= 20).astype(np.int64)
    later = Groups(ONE_BY_ONE.student_G2[20:], ONE_BY_ONE.teacher_G2[20:])
    hidden = W.hidden_ND.clone().requires_grad_()
    mine = TeacherShare(TeacherLabels(W.full_rows(), {}), torch.ones(N))
    labels = JoinedLabels({"a": mine, "b": bridged(other, other.full_rows(), classes, later)})
    joining = Joining(("a", "b"), frozenset({"b"}), "confidence")
    loss = joined_loss(hidden, Head(W.weight_VD), labels, joining, W.labels_N, ONES, 1.0, spec(), sequence_N=sequence_N)
    alone = oracle.divergence(W.teacher_logits_NV.softmax(-1), (hidden @ W.weight_VD.T).softmax(-1), "forward_kl")
    grads = [torch.autograd.grad(total, hidden)[0][:20] for total in (loss.total, 2 * alone[:20].sum())]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_rows", [7, 256])
def test_held_out_figures_are_over_classes_of_the_rows_that_both_have(form: str, chunk_rows: int) -> None:
    other, classes, groups = other_world(), some_classes(), mixed_groups()
    bridge = Bridge(classes, groups, other.labels_N)
    found = measure_bridged(W.hidden_ND, Head(W.weight_VD), rows_of(other, form), bridge, chunk_rows)
    one = (np.diff(groups.student_G2)[:, 0] == 1) & (np.diff(groups.teacher_G2)[:, 0] == 1)
    i, k = groups.student_G2[one, 0], groups.teacher_G2[one, 0]
    assert found.compared == one.sum()
    nll = torch.nn.functional.cross_entropy(other.teacher_logits_NV, other.labels_N, reduction="sum")
    torch.testing.assert_close(found.teacher_nll_sum, nll)
    assert found.integrity is not None
    found.integrity.check()
    if form == "top_k":
        assert found.kl_sum is None and found.agreeing is None
        return
    p = masses(other.teacher_logits_NV.softmax(-1)[k], classes.teacher_Vt, 12)
    logits = W.hidden_ND @ W.weight_VD.T
    torch.testing.assert_close(found.kl_sum, oracle.kl(p, masses(logits.softmax(-1)[i], classes.student_Vs, 12)).sum())
    same = classes.teacher_Vt[other.teacher_logits_NV.argmax(-1)[k]] == classes.student_Vs[logits.argmax(-1)[i]]
    assert found.agreeing == same.sum()
    shifted = rows_of(other, form).take(torch.arange(N).roll(1))
    wrong = measure_bridged(W.hidden_ND, Head(W.weight_VD), shifted, bridge, chunk_rows)
    with pytest.raises(TeacherHeadMismatch):
        wrong.integrity.check()


def test_held_out_figures_of_equal_vocabularies_are_the_plain_ones() -> None:
    bridge = Bridge(SAME, ONE_BY_ONE, W.labels_N)
    found = measure_bridged(W.hidden_ND, Head(W.weight_VD), W.hidden_rows(), bridge)
    want = measure(W.hidden_ND, Head(W.weight_VD), W.hidden_rows(), W.labels_N)
    torch.testing.assert_close(found.kl_sum, want.kl_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.teacher_nll_sum, want.teacher_nll_sum)
    with pytest.raises(DataError, match="classes of 23 ids of the student and 23 of the teacher"):
        measure_bridged(W.hidden_ND, Head(W.weight_VD), other_world().full_rows(), bridge)
    with pytest.raises(DataError, match="given labels"):
        measure_bridged(W.hidden_ND, Head(W.weight_VD), GivenRows(*W.served()), bridge)


@pytest.mark.parametrize(("ids", "is_giant"), [(64, False), (65, True)])
def test_a_giant_class_has_more_than_64_ids_of_both_sides(ids: int, is_giant: bool) -> None:
    """The coverage that is printed before a run counts by the same number."""
    student_Vs = torch.cat([torch.zeros(20), torch.ones(1)]).long()
    teacher_Vt = torch.cat([torch.zeros(ids - 20), torch.ones(1)]).long()
    classes = VocabularyClasses(student_Vs, teacher_Vt, 2)
    assert (classes.giants is not None) == is_giant


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, 7, 15])
def test_a_truncated_teacher_moves_less_than_its_tail_from_the_classes(kind: str, k: int) -> None:
    """What of a class it has not kept is counted in its tail, while the student's class is whole: of a student that agrees with it in all
    classes it asks for a change, in none by more than the tail. With one id to a class there is none.
    """
    other, classes = other_world(), some_classes()
    p = masses(other.teacher_logits_NV.softmax(-1), classes.teacher_Vt, 12)
    kept = other.topk_rows(k)
    kept_p = torch.zeros(40, 31, dtype=torch.float64).scatter(-1, kept.topk_ids_NK, kept.bucket(torch.float64)[0].exp())
    lost = p - masses(kept_p, classes.teacher_Vt, 12)
    tail = kept.bucket(torch.float64)[1].exp()
    assert (lost >= -1e-12).all() and (lost.sum(-1) <= tail + 1e-12).all() and lost.max() > 1e-3
    alone = VocabularyClasses(torch.arange(31), torch.arange(31), 31)
    for found, floor in ((alone, 0.0), (classes, 1e-6)):
        members = torch.zeros(found.classes, 31, dtype=torch.float64)
        members[found.teacher_Vt, torch.arange(31)] = 1.0
        q = other.teacher_logits_NV.softmax(-1) @ members.T  # by class, which is what a student over as many ids has
        student = VocabularyClasses(torch.arange(found.classes), found.teacher_Vt, found.classes)
        hidden = q.log().requires_grad_()
        head = Head(torch.eye(found.classes, dtype=torch.float64))
        share = bridged(other, kept, student, ONE_BY_ONE)
        labels = student.student_Vs[found.teacher_Vt[other.labels_N]]
        loss = joined_loss(
            hidden, head, JoinedLabels({"b": share}), Joining(("b",), frozenset({"b"})), labels, ONES, 40.0, spec(kind)
        )
        grad = torch.autograd.grad(loss.total, hidden)[0] * 40
        assert (loss.total < 1e-9) == (floor == 0.0)
        assert (grad.abs().max() < 1e-9) == (floor == 0.0)
        if (
            kind == "forward_kl"
        ):  # its gradient is q - p over what is kept: no class is pulled further than the tail is heavy
            assert (grad.abs().amax(-1) <= tail + 1e-9).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_most_mass_in_a_giant_class_are_left_out_and_not_covered(form: str) -> None:
    other = replace(other_world(vocab=101), teacher_weight_VD=other_world(vocab=101).teacher_weight_VD * 1.5)
    class_V = torch.cat(
        [torch.arange(12), torch.full((89,), 3)]
    )  # class 3 has 90 ids of the teacher, and 12 of the student
    classes = VocabularyClasses(torch.cat([torch.arange(12), torch.full((11,), 3)]), class_V, 12)
    assert classes.giants is not None and classes.giants.tolist() == [3]
    assert some_classes().giants is None
    rows = rows_of(other, form)
    hidden = W.hidden_ND.clone().requires_grad_()
    loss = run(spec("jsd"), hidden, weights=ragged_weights(), b=bridged(other, rows, classes, ONE_BY_ONE, 0.5))
    p_NV, q_NV = other.teacher_logits_NV.softmax(-1), (hidden @ W.weight_VD.T).softmax(-1)
    kept_NV = torch.ones_like(p_NV)
    if isinstance(rows, TopKRows):
        kept_NV = torch.zeros_like(p_NV).scatter(-1, rows.topk_ids_NK, 1.0)
    p, q = masses(p_NV * kept_NV, class_V, 12), masses(q_NV, classes.student_Vs, 12)
    safe = p[:, 3] <= 0.5
    assert 3 < safe.sum() < N - 3
    rest = [(p_NV * (1 - kept_NV)).sum(-1, keepdim=True), (q * (p == 0)).sum(-1, keepdim=True)]
    each = oracle.divergence(torch.cat([p, rest[0]], -1), torch.cat([q * (p > 0), rest[1]], -1), "jsd")
    want = 0.5 * (ragged_weights() * safe * each).sum() / 7.0
    torch.testing.assert_close(loss.total, want, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss.total, hidden), torch.autograd.grad(want, hidden), **EXACT)
    found = loss.by_teacher["b"]
    torch.testing.assert_close(found.covered, (ragged_weights() * safe).sum())
    torch.testing.assert_close(found.kd_weights, 0.5 * (ragged_weights() * safe).sum())
    torch.testing.assert_close(loss.parts.weights, ragged_weights().sum())
