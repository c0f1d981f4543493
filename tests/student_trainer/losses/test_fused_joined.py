"""Several teachers with kernels against the plain path in float64. Runs on a GPU, or anywhere with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.losses import fused, matmul
from student_trainer.losses.cross_tokenizer import transposed
from student_trainer.losses.cross_tokenizer.bridge import Bridge, Groups, VocabularyClasses
from student_trainer.losses.cross_tokenizer.fused_projected import fused_projected_terms
from student_trainer.losses.cross_tokenizer.projected import projected_terms
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head, Lora
from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.losses.output.joined import kernels
from student_trainer.losses.output.joined import loss as loss_module
from student_trainer.losses.output.joined import transposed as transposed_chunks
from student_trainer.losses.output.joined.evidence import opened
from student_trainer.losses.output.joined.loss import JoinedLoss, joined_loss
from student_trainer.losses.output.parts import Joining
from student_trainer.losses.output.policy_gradient import PolicyGradient
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, HiddenRows, TeacherRows
from student_trainer.losses.term import JoinedLabels, TeacherLabels, TeacherShare
from tests.student_trainer.losses.worlds import world

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V = 20, fused.BLOCK + 37
W = world(rows=N, vocab=V, width=6, spread=2.0)
B = replace(world(rows=N, vocab=V, width=6, spread=2.0, seed=1), hidden_ND=W.hidden_ND, labels_N=W.labels_N)
OTHER = world(rows=N, vocab=V + 300, width=6, spread=2.0, seed=2)
KINDS = [Divergence(kind, alpha=0.3) for kind in ("forward_kl", "reverse_kl", "jsd", "skew_rkl", "adaptive_kl")]
# Classes of one id, of as many as a lane goes through, of a line of a tile, and of more.
STUDENT_V = torch.cat(
    [torch.arange(3000), torch.arange(V - 3600) % 20, 100 + torch.arange(400) // 3, torch.full((200,), 2048)]
)
TEACHER_V = torch.cat(
    [torch.arange(3000), torch.arange(V - 3000) % 40, 200 + torch.arange(200) // 2, torch.full((100,), 17)]
)
EDGES_S, EDGES_T = np.array([0, 1, 2, 5, 6, 7, 8, 10, 20]), np.array([0, 1, 2, 3, 4, 6, 7, 8, 20])
GROUPS = Groups(np.stack([EDGES_S[:-1], EDGES_S[1:]], 1), np.stack([EDGES_T[:-1], EDGES_T[1:]], 1))


def moved(rows: TeacherRows, dtype: torch.dtype) -> TeacherRows:
    there = {name: _to(value, dtype) for name, value in vars(rows).items() if isinstance(value, Tensor)}
    if isinstance(rows, HiddenRows):
        return replace(rows, **there, head=Head(_to(rows.head.weight_VD, dtype)))
    return replace(rows, **there)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(DEVICE, dtype) if tensor.is_floating_point() else tensor.to(DEVICE)


def head_of(dtype: torch.dtype, is_whole: bool) -> Head:
    """The student's, trained; with a bias, an adapter, a multiplier and a softcap if it is whole."""
    trained = lambda tensor: _to(tensor, dtype).clone().requires_grad_()  # noqa: E731
    if not is_whole:
        return Head(trained(W.weight_VD))
    generator = torch.Generator().manual_seed(5)
    normal = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    lora = Lora(trained(normal(2, 6)), trained(normal(V, 2) * 0.3), 0.5)
    return Head(trained(W.weight_VD), trained(normal(V)), 1.3, 20.0, lora)


def both(
    spec: OutputLossSpec,
    combine: str = "loss_sum",
    sampled: Tensor | None = None,
    is_whole: bool = False,
    **teachers: TeacherShare,
) -> None:
    """Holds the kernels' loss, figures and gradients against the plain ones."""
    found = []
    for dtype in (torch.float64, torch.float32):
        hidden = _to(W.hidden_ND, dtype).clone().requires_grad_()
        there = {}
        for name, share in teachers.items():
            bridge = share.bridge
            if bridge is not None:
                classes = VocabularyClasses(STUDENT_V.to(DEVICE), TEACHER_V.to(DEVICE), 3000)
                bridge = replace(bridge, classes=classes)
            assert share.labels.output is not None
            there[name] = replace(share, labels=TeacherLabels(moved(share.labels.output, dtype), {}), bridge=bridge)
        weights = ((torch.arange(N) % 4 + 0.5) * (torch.arange(N) != 6)).to(dtype)
        head, labels = head_of(dtype, is_whole), JoinedLabels(there)
        joining = Joining(tuple(there), combine=combine)
        sequence_N = np.arange(N) // 5
        loss: JoinedLoss = joined_loss(
            hidden, head, labels, joining, W.labels_N, weights, 7.0, spec, sampled, sequence_N
        )
        for evidence in loss.integrity:
            evidence.check()
        trained = [hidden, *(tensor for tensor in head.trained() if tensor is not None)]
        found.append((loss, [grad.double() for grad in torch.autograd.grad(loss.total, trained)]))
    (plain, plain_grads), (kernels, grads) = found
    torch.testing.assert_close(kernels.total.double(), plain.total, rtol=2e-5, atol=1e-6)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, plain_grad, rtol=2e-4, atol=2e-5 * max(1.0, float(plain_grad.abs().max())))
    for name, value in vars(plain.parts).items():
        torch.testing.assert_close(getattr(kernels.parts, name), value, rtol=2e-5, atol=1e-5)
    for teacher, figures in plain.by_teacher.items():
        for name, value in vars(figures).items():
            told = getattr(kernels.by_teacher[teacher], name)
            torch.testing.assert_close(told, value, rtol=2e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "usable", lambda tensor: tensor.dtype == torch.float32)
    monkeypatch.setattr(matmul, "PADDED", ("cpu", "cuda"))  # rows begin at multiples of 64, wherever they are
    if INTERPRETED:  # which takes as long for a program of few ids as for one of many
        monkeypatch.setattr(transposed, "IDS", 256)
        monkeypatch.setattr(transposed, "SPANS", 3)


def share(rows: TeacherRows, part: float, some: np.ndarray | None = None) -> TeacherShare:
    if some is None:
        return TeacherShare(TeacherLabels(rows, {}), torch.full((N,), part))
    share_N = torch.zeros(N).index_fill_(0, torch.from_numpy(some), part)
    return TeacherShare(TeacherLabels(rows.take(torch.from_numpy(some)), {}), share_N, row_M=some)


def bridged(rows: TeacherRows, part: float, some: np.ndarray | None = None) -> TeacherShare:
    classes = VocabularyClasses(STUDENT_V, TEACHER_V, 3000)
    bridge = Bridge(classes, GROUPS, OTHER.labels_N, alm_temperature=20.0)
    share_N = torch.full((N,), part) if some is None else torch.zeros(N).index_fill_(0, torch.from_numpy(some), part)
    return TeacherShare(TeacherLabels(rows, {}), share_N, bridge=bridge)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("sft", [0.0, 0.3])
def test_teachers_of_one_tokenizer(kind: Divergence, sft: float) -> None:
    spec = OutputLossSpec(kind, chunk_bytes=1, sft_weight=sft)
    some = np.array([1, 2, 3, 6, 7, 9, 15, 17, 18])
    both(spec, a=share(W.hidden_rows(), 0.75), b=share(B.topk_rows(40), 0.25, some))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("form", ["hidden", "top_k"])
def test_another_tokenizer(kind: Divergence, form: str) -> None:
    tau = 1.0 if form == "top_k" else 1.7
    spec = OutputLossSpec(kind, tau, tau_squared=True, chunk_bytes=1, sft_weight=0.3)
    rows = OTHER.hidden_rows() if form == "hidden" else OTHER.topk_rows(64)
    both(spec, a=share(W.hidden_rows(), 0.5), b=bridged(rows, 0.5))


@pytest.mark.parametrize("sft", [0.0, 0.3])
def test_two_teachers_with_other_tokenizers(sft: float) -> None:
    """The first one's share of the gradient is written before the second one's waits."""
    spec = OutputLossSpec(Divergence("jsd"), chunk_bytes=1, sft_weight=sft)
    both(spec, a=bridged(OTHER.hidden_rows(), 0.5), b=bridged(OTHER.topk_rows(64), 0.25))


@pytest.mark.parametrize("rows", [1, 3, N])
def test_chunks_of_several_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of another tokenizer that sends logits and has no share of most rows, one of the student's, and another of another."""
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *given: rows)
    monkeypatch.setattr(transposed_chunks, "COVERED", 0.0)
    spec = OutputLossSpec(Divergence("jsd"), 1.7, kd_weight=0.7, sft_weight=0.3)
    teachers = {
        "a": bridged(OTHER.full_rows(), 0.5, np.array([0, 1, 2, 3, 4, 7, *range(10, N)])),
        "b": share(W.hidden_rows(), 0.25, np.array([1, 2, 3, 9])),
        "c": bridged(OTHER.hidden_rows(), 0.25, np.array([5, 7, 8, 9])),
    }
    both(spec, **teachers)


@pytest.mark.parametrize("combine", ["loss_sum", "confidence"])
def test_a_head_of_many_parts(combine: str) -> None:
    spec = OutputLossSpec(Divergence("reverse_kl"), 0.7, tau_squared=True, chunk_bytes=12 * V * 9)
    both(spec, combine, is_whole=True, a=share(W.hidden_rows(), 0.5), b=bridged(OTHER.hidden_rows(), 0.5))


def test_without_gradients_the_figures_are_the_same() -> None:
    found = []
    for is_on in (True, False):
        teacher = bridged(moved(OTHER.hidden_rows(), torch.float32), 0.5)
        assert teacher.bridge is not None
        classes = VocabularyClasses(STUDENT_V.to(DEVICE), TEACHER_V.to(DEVICE), 3000)
        labels = JoinedLabels({"b": replace(teacher, bridge=replace(teacher.bridge, classes=classes))})
        hidden, head = _to(W.hidden_ND, torch.float32).requires_grad_(), head_of(torch.float32, is_whole=False)
        spec = OutputLossSpec(sft_weight=0.3)
        with torch.set_grad_enabled(is_on):
            found.append(joined_loss(hidden, head, labels, Joining(("b",)), W.labels_N, torch.ones(N), 7.0, spec))
    assert found[0].total.requires_grad and not found[1].total.requires_grad
    assert vars(found[0].parts) == vars(found[1].parts)


def test_a_wrong_row_of_a_teacher_is_named() -> None:
    rows = replace(OTHER.hidden_rows(), hidden_ND=OTHER.teacher_hidden_ND.clone())
    rows.hidden_ND[6] += 3.0
    classes = VocabularyClasses(STUDENT_V.to(DEVICE), TEACHER_V.to(DEVICE), 3000)
    wrong = bridged(moved(rows, torch.float32), 0.5)
    assert wrong.bridge is not None
    labels = JoinedLabels({"b": replace(wrong, bridge=replace(wrong.bridge, classes=classes))})
    hidden = _to(W.hidden_ND, torch.float32).requires_grad_()
    head, spec = Head(_to(W.weight_VD, torch.float32)), OutputLossSpec(chunk_bytes=12 * V * 7)
    loss = joined_loss(hidden, head, labels, Joining(("b",)), W.labels_N, torch.ones(N), 7.0, spec)
    with pytest.raises(TeacherHeadMismatch, match="row 6") as caught:
        loss.integrity[0].check()
    assert (caught.value.teacher, caught.value.row) == ("b", 6)


def test_a_row_that_is_no_number_stays_alone() -> None:
    """Rows lie side by side in memory; nothing passes from one to another."""
    grads = []
    for spoilt in (False, True):
        hidden = _to(W.hidden_ND, torch.float32).clone()
        if spoilt:
            hidden[4] = torch.nan
        hidden.requires_grad_()
        share = bridged(moved(OTHER.hidden_rows(), torch.float32), 0.5)
        assert share.bridge is not None
        classes = VocabularyClasses(STUDENT_V.to(DEVICE), TEACHER_V.to(DEVICE), 3000)
        labels = JoinedLabels({"b": replace(share, bridge=replace(share.bridge, classes=classes))})
        head, spec = Head(_to(W.weight_VD, torch.float32)), OutputLossSpec(sft_weight=0.3)
        loss = joined_loss(hidden, head, labels, Joining(("b",)), W.labels_N, torch.ones(N), 7.0, spec)
        grads.append(torch.autograd.grad(loss.total, hidden)[0])
    others = [row for row in range(N) if row not in (2, 3, 4)]  # these are one group
    assert grads[1][4].isnan().all()
    torch.testing.assert_close(grads[1][others], grads[0][others])


def test_rows_of_a_teacher_that_are_not_used_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in which it has no row are filled with its first."""
    monkeypatch.setattr(transposed_chunks, "COVERED", 0.0)
    rows = replace(OTHER.hidden_rows(), hidden_ND=OTHER.teacher_hidden_ND.clone())
    rows.hidden_ND[0] = torch.nan
    both(OutputLossSpec(), b=bridged(rows, 0.5, np.array([1, 2, 3, 4, 5])))


def test_a_teacher_of_few_rows_goes_along_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In columns all rows of a chunk would be computed for it."""
    asked: list[bool] = []
    plain_serves = transposed_chunks.serves
    monkeypatch.setattr(loss_module, "serves", lambda *given: asked.append(plain_serves(*given)) or asked[-1])
    both(OutputLossSpec(), b=bridged(OTHER.hidden_rows(), 0.5, np.array([1, 2, 3, 4, 5])))
    both(OutputLossSpec(), a=share(W.hidden_rows(), 0.5), b=bridged(OTHER.hidden_rows(), 0.5))
    assert asked == [False, True]  # rows of groups count: in real text half the tokens may be in some


def test_a_row_without_a_share_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where its states are no numbers."""
    monkeypatch.setattr(transposed_chunks, "COVERED", 0.0)
    hidden = _to(W.hidden_ND, torch.float32).clone()
    hidden[7] = torch.nan
    hidden.requires_grad_()
    teacher = bridged(moved(OTHER.hidden_rows(), torch.float32), 0.5, np.array([0, 1, 5]))
    assert teacher.bridge is not None
    classes = VocabularyClasses(STUDENT_V.to(DEVICE), TEACHER_V.to(DEVICE), 3000)
    groups = Groups(np.array([[0, 1], [1, 2], [5, 6]]), np.array([[0, 1], [1, 2], [3, 4]]))
    bridge = replace(teacher.bridge, classes=classes, groups=groups)
    head, labels = Head(_to(W.weight_VD, torch.float32)), JoinedLabels({"b": replace(teacher, bridge=bridge)})
    loss = joined_loss(hidden, head, labels, Joining(("b",)), W.labels_N, torch.ones(N), 7.0, OutputLossSpec())
    grad = torch.autograd.grad(loss.total, hidden)[0]
    assert torch.isfinite(grad).all() and not grad[7].any() and grad[5].any()


def test_gradients_that_are_rounded_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head and states in bfloat16: what the products would round is written rounded."""
    monkeypatch.setattr(fused, "usable", lambda tensor: tensor.dtype != torch.float64)
    written, plain_gradient = [], transposed.gradient
    monkeypatch.setattr(transposed, "gradient", lambda *given: written.append(given[-1]) or plain_gradient(*given))
    spec, found = OutputLossSpec(chunk_bytes=1, sft_weight=0.3), []
    for dtype in (torch.float64, torch.bfloat16):
        hidden = _to(W.hidden_ND.bfloat16(), dtype).clone().requires_grad_()
        classes = VocabularyClasses(STUDENT_V.to(DEVICE), TEACHER_V.to(DEVICE), 3000)
        share = replace(
            bridged(OTHER.hidden_rows(), 0.5), labels=TeacherLabels(moved(OTHER.hidden_rows(), torch.float32), {})
        )
        assert share.bridge is not None
        labels = JoinedLabels({"b": replace(share, bridge=replace(share.bridge, classes=classes))})
        head, weights = Head(_to(W.weight_VD.bfloat16(), dtype)), torch.ones(N)
        loss = joined_loss(hidden, head, labels, Joining(("b",)), W.labels_N, weights, 7.0, spec)
        found.append((loss.total.double(), torch.autograd.grad(loss.total, hidden)[0].double()))
    (plain, plain_grad), (rounded, grad) = found
    assert set(written) == {torch.bfloat16}
    torch.testing.assert_close(rounded, plain, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(grad, plain_grad, rtol=3e-2, atol=2e-2 * float(plain_grad.abs().max()))


@pytest.mark.parametrize("form", ["hidden", "top_k"])
def test_a_logit_that_is_no_number_is_not_lost_in_its_class(form: str) -> None:
    z_CV = torch.zeros(2, V, device=DEVICE)
    z_CV[1, 5] = torch.nan  # alone in its class
    classes = VocabularyClasses(STUDENT_V.to(DEVICE), TEACHER_V.to(DEVICE), 3000)
    rows = opened(
        moved(OTHER.hidden_rows() if form == "hidden" else OTHER.topk_rows(64), torch.float32).take(slice(0, 2)),
        torch.float32,
    )
    lse_P = rows.logits_NV.logsumexp(-1) if isinstance(rows, FullRows) else None
    tau = 2.0 if form == "hidden" else 1.0
    spec = OutputLossSpec(Divergence("reverse_kl"), tau)
    found = fused_projected_terms(
        z_CV, None, z_CV.logsumexp(-1), rows, lse_P, classes, torch.ones(2, device=DEVICE), spec
    )
    assert torch.isfinite(found.loss_P[0]) and torch.isnan(found.loss_P[1])


@pytest.mark.parametrize("form", ["hidden", "top_k"])
def test_an_empty_class_has_no_gradient(form: str) -> None:
    z_CV = torch.from_numpy(np.random.default_rng(0).normal(size=(4, V))).float().to(DEVICE)
    z_CV[1:3, STUDENT_V == 2048] = -torch.inf
    lse_C, label_ids_C = z_CV.logsumexp(-1), torch.zeros(4, dtype=torch.long, device=DEVICE)
    classes = VocabularyClasses(STUDENT_V.to(DEVICE), TEACHER_V.to(DEVICE), 3000)
    rows = moved(OTHER.hidden_rows() if form == "hidden" else OTHER.topk_rows(64), torch.float32).take(slice(0, 3))
    rows = opened(rows, torch.float32)
    spec, weight_P = OutputLossSpec(), torch.tensor([0.5, 1.0, 2.0], device=DEVICE)
    which_P = torch.tensor([0, 2, 3], device=DEVICE)
    teacher_lse_P = rows.logits_NV.logsumexp(-1) if isinstance(rows, FullRows) else None
    found = fused_projected_terms(z_CV, which_P, lse_C[which_P], rows, teacher_lse_P, classes, weight_P, spec)
    place_C = torch.tensor([0, -1, 1, 2], device=DEVICE)
    grad_CV = kernels.gradient(z_CV, lse_C, None, label_ids_C, None, found.gradient, place_C, torch.float32)
    z_PV = z_CV[which_P].double()
    expected = projected_terms(z_PV, z_PV.log_softmax(-1), moved(rows, torch.float64), classes, weight_P.double(), spec)
    torch.testing.assert_close(found.loss_P.double(), expected.loss_C, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad_CV[which_P].double(), expected.grad_CV, rtol=2e-4, atol=2e-6)
    assert torch.isfinite(grad_CV).all() and not grad_CV[1].any() and not grad_CV[2, STUDENT_V == 2048].any()


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("combine", ["prob_mix", "confidence"])
def test_ways_of_joining(tau: float, combine: str) -> None:
    spec = OutputLossSpec(Divergence("jsd"), tau, chunk_bytes=1)
    both(spec, combine, a=share(W.hidden_rows(), 0.75), b=share(B.full_rows(), 0.25))


def test_policy_gradients() -> None:
    sampled = torch.where(torch.arange(N) % 3 > 0, torch.full((N,), -8.0), torch.nan)
    spec = OutputLossSpec(policy_gradient=PolicyGradient(10.0), chunk_bytes=1, sft_weight=0.3)
    both(spec, sampled=sampled, a=share(W.hidden_rows(), 0.75), b=share(B.full_rows(), 0.25))
