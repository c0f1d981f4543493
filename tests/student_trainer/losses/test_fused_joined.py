"""Several teachers with kernels against the plain path in float64. Runs on a GPU, or anywhere with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.losses import fused
from student_trainer.losses.cross_tokenizer.bridge import Bridge, Groups, VocabularyClasses
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head
from student_trainer.losses.output.joined.loss import JoinedLoss, joined_loss
from student_trainer.losses.output.parts import Joining
from student_trainer.losses.output.policy_gradient import PolicyGradient
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import HiddenRows, TeacherRows
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
STUDENT_V = torch.cat([torch.arange(3000), torch.arange(V - 3000) % 20])
TEACHER_V = torch.cat([torch.arange(3000), torch.arange(V + 300 - 3000) % 40])
EDGES_S, EDGES_T = np.array([0, 1, 2, 5, 6, 7, 8, 10, 20]), np.array([0, 1, 2, 3, 4, 6, 7, 8, 20])
GROUPS = Groups(np.stack([EDGES_S[:-1], EDGES_S[1:]], 1), np.stack([EDGES_T[:-1], EDGES_T[1:]], 1))


def moved(rows: TeacherRows, dtype: torch.dtype) -> TeacherRows:
    there = {name: _to(value, dtype) for name, value in vars(rows).items() if isinstance(value, Tensor)}
    if isinstance(rows, HiddenRows):
        return replace(rows, **there, head=Head(_to(rows.head.weight_VD, dtype)))
    return replace(rows, **there)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(DEVICE, dtype) if tensor.is_floating_point() else tensor.to(DEVICE)


def both(
    spec: OutputLossSpec, combine: str = "loss_sum", sampled: Tensor | None = None, **teachers: TeacherShare
) -> None:
    """Holds the kernels' loss and gradient against the plain ones."""
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
        weights = (torch.arange(N) % 4).to(dtype)
        head, labels = Head(_to(W.weight_VD, dtype)), JoinedLabels(there)
        joining = Joining(tuple(there), combine=combine)
        loss: JoinedLoss = joined_loss(hidden, head, labels, joining, W.labels_N, weights, 7.0, spec, sampled)
        for evidence in loss.integrity:
            evidence.check()
        found.append((loss, torch.autograd.grad(loss.total, hidden)[0].double()))
    (plain, plain_grad), (kernels, grad) = found
    torch.testing.assert_close(kernels.total.double(), plain.total, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad, plain_grad, rtol=2e-4, atol=2e-5)
    for name, value in vars(plain.parts).items():
        torch.testing.assert_close(getattr(kernels.parts, name), value, rtol=2e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "usable", lambda tensor: tensor.dtype == torch.float32)


def share(rows: TeacherRows, part: float, some: np.ndarray | None = None) -> TeacherShare:
    if some is None:
        return TeacherShare(TeacherLabels(rows, {}), torch.full((N,), part))
    share_N = torch.zeros(N).index_fill_(0, torch.from_numpy(some), part)
    return TeacherShare(TeacherLabels(rows.take(torch.from_numpy(some)), {}), share_N, row_M=some)


def bridged(rows: TeacherRows, part: float) -> TeacherShare:
    classes = VocabularyClasses(STUDENT_V, TEACHER_V, 3000)
    bridge = Bridge(classes, GROUPS, OTHER.labels_N, alm_temperature=20.0)
    return TeacherShare(TeacherLabels(rows, {}), torch.full((N,), part), bridge=bridge)


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


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("combine", ["prob_mix", "confidence"])
def test_ways_of_joining(tau: float, combine: str) -> None:
    spec = OutputLossSpec(Divergence("jsd"), tau, chunk_bytes=1)
    both(spec, combine, a=share(W.hidden_rows(), 0.75), b=share(B.full_rows(), 0.25))


def test_policy_gradients() -> None:
    sampled = torch.where(torch.arange(N) % 3 > 0, torch.full((N,), -8.0), torch.nan)
    spec = OutputLossSpec(policy_gradient=PolicyGradient(10.0), chunk_bytes=1, sft_weight=0.3)
    both(spec, sampled=sampled, a=share(W.hidden_rows(), 0.75), b=share(B.full_rows(), 0.25))
