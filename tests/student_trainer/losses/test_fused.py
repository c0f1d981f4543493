"""The kernels against the plain path in float64. Runs on a GPU, or anywhere with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from student_trainer.losses import fused, matmul
from student_trainer.losses.cross_tokenizer import transposed
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import BFLOAT16, Integrity, TeacherHeadMismatch
from student_trainer.losses.output.loss import OutputLoss, output_loss
from student_trainer.losses.output.policy_gradient import PolicyGradient
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, GivenRows, HiddenRows, TeacherRows
from tests.student_trainer.losses.worlds import World, world

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
WORLD = world(rows=20, vocab=fused.BLOCK + 37, width=6, spread=2.0)  # one whole block of logits and a ragged one
KINDS = [*(Divergence(kind, alpha=0.3) for kind in fused.KINDS if kind != "jsd")]
JSDS = [Divergence("jsd", beta, normalization="unit" if beta == 0.9 else "paper") for beta in (0.0, 0.1, 0.5, 0.9, 1.0)]


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "usable", lambda tensor: True)
    monkeypatch.setattr(matmul, "PADDED", ("cpu", "cuda"))  # rows begin at multiples of 64, wherever they are


def loss(
    w: World, rows: TeacherRows | None, spec: OutputLossSpec, dtype: torch.dtype, sampled: Tensor | None = None
) -> tuple[OutputLoss, Tensor]:
    """Of float64 inputs by the plain path; of any other by the kernels."""
    move = lambda t: t.to(DEVICE, dtype) if t.is_floating_point() else t.to(DEVICE)  # noqa: E731
    if rows is not None:
        moved = {name: move(value) for name, value in vars(rows).items() if isinstance(value, Tensor)}
        if isinstance(rows, HiddenRows):
            rows = replace(rows, **moved, head=Head(move(rows.head.weight_VD)))
        else:
            rows = replace(rows, **moved)
    hidden = move(w.hidden_ND).clone().requires_grad_()
    weights = (torch.arange(len(hidden)) % 4).to(DEVICE, dtype)
    sampled = None if sampled is None else sampled.to(DEVICE)
    result = output_loss(hidden, Head(move(w.weight_VD)), rows, w.labels_N.to(DEVICE), weights, 7.0, spec, sampled)
    result.total.backward()
    assert hidden.grad is not None
    return result, hidden.grad.double()


def same(
    w: World,
    rows: TeacherRows | None,
    spec: OutputLossSpec,
    dtype: torch.dtype = torch.float32,
    sampled: Tensor | None = None,
) -> None:
    got, grad = loss(w, rows, spec, dtype, sampled)
    want, true_grad = loss(w, rows, spec, torch.float64, sampled)
    for name, value in vars(want.parts).items():
        torch.testing.assert_close(getattr(got.parts, name), value, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad, true_grad, rtol=1e-4, atol=1e-4)  # logits of 40 are right to 4e-6, ratios too
    if rows is not None and not isinstance(rows, GivenRows):
        assert got.integrity is not None
        got.integrity.check()


@pytest.mark.parametrize("divergence", [*KINDS, *JSDS], ids=lambda d: f"{d.kind}-{d.beta}")
@pytest.mark.parametrize("form", ["hidden_rows", "full_rows"])
def test_divergences(divergence: Divergence, form: str) -> None:
    same(WORLD, getattr(WORLD, form)(), OutputLossSpec(divergence, kd_weight=0.7))


@pytest.mark.parametrize("tau", [0.5, 2.0])
@pytest.mark.parametrize("sft", [0.0, 0.3])
def test_temperature_and_hard_labels(tau: float, sft: float) -> None:
    spec = OutputLossSpec(Divergence("jsd", 0.4), tau, tau_squared=True, sft_weight=sft)
    same(WORLD, WORLD.hidden_rows(), spec)


@pytest.mark.parametrize("sft", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 9, 23])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "adaptive_kl"])
def test_top_k(k: int, sft: float, kind: str) -> None:
    w = world(rows=20, spread=2.0)  # 23 ids: k = 23 leaves no tail
    same(w, w.topk_rows(k), OutputLossSpec(Divergence(kind, 0.4, alpha=0.4), sft_weight=sft))


def test_hard_labels_alone() -> None:
    same(WORLD, None, OutputLossSpec(kd_weight=0.0, sft_weight=1.0))


def test_equal_logits_are_ordered_by_id() -> None:
    z_CV = torch.zeros(3, 11, device=DEVICE)
    labels = torch.tensor([0, 2, 10], device=DEVICE)
    lse, ahead = fused.row_figures(z_CV, labels, z_CV[:, 0].contiguous())
    assert ahead.tolist() == [0, 2, 10]
    torch.testing.assert_close(lse, torch.full_like(lse, 11).log())


@pytest.mark.parametrize("way", ["along rows", "across"])
def test_figures_of_rows(way: str) -> None:
    """Ties go to the first id, a row of -inf has no mass, a NaN stays in its row; as many ids as fill no block, and 64 rows."""
    vocab = transposed.SPANS * transposed.IDS + 37
    z_CV = torch.randn(64, vocab, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    z_CV[0] = 0.0
    z_CV[1, 5:] = -torch.inf
    z_CV[2, [7, vocab - 1]] = 30.0
    z_CV[3] = -torch.inf
    z_CV[4, 100] = torch.nan
    labels = torch.arange(64, device=DEVICE) * 7 % vocab
    z_VC = z_CV.T.contiguous()
    figures, best, lse = (
        (fused.label_figures(z_CV, labels), fused.row_best(z_CV, labels), fused.row_lse(z_CV))
        if way == "along rows"
        else (transposed.label_figures(z_VC, labels), transposed.row_best(z_VC, labels), transposed.lse(z_VC))
    )
    want_lse = z_CV.double().logsumexp(-1)
    label_z = z_CV.gather(-1, labels[:, None])
    ahead = ((z_CV > label_z) | ((z_CV == label_z) & (torch.arange(vocab, device=DEVICE) < labels[:, None]))).sum(-1)
    for found in (figures[0], best[0], lse):
        torch.testing.assert_close(found.double(), want_lse, rtol=1e-6, atol=1e-6, equal_nan=True)
    whole = [row for row in range(64) if row not in (3, 4)]
    for found in (figures[1], best[1]):
        want = label_z[:, 0].double() - want_lse
        torch.testing.assert_close(found.double()[whole], want[whole], rtol=1e-6, atol=2e-6)
        assert found[4].isnan()
    assert figures[2][whole].tolist() == ahead[whole].tolist()
    assert best[2][whole].tolist() == z_CV.argmax(-1)[whole].tolist() and best[2][0] == 0 and best[2][2] == 7


@pytest.mark.parametrize("checked", [None, 3])
def test_the_worst_row(monkeypatch: pytest.MonkeyPatch, checked: int | None) -> None:
    """As the plain comparison finds it: the first of equal ones, a NaN worst of all, rows without served figures right."""
    rows = 2500  # several blocks
    for case in ("right", "off", "NaN seen", "equal", "infinite"):
        served, seen = (torch.randn(2, rows, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (0, 0))
        if case == "off":
            seen[0, [7, 2000]] += torch.tensor([0.5, 0.7], device=DEVICE)
        if case == "NaN seen":
            seen[1, 1500] = torch.nan
        if case == "equal":
            served[:], seen[:] = 1.0, 3.0
        if case == "infinite":
            served[0, 9] = -torch.inf
        if checked is not None:
            served[:, 1200:] = torch.nan
        row_N = torch.arange(rows, device=DEVICE) + 100
        evidence = (row_N, served[0], seen[0], served[1], seen[1])
        found = [figure.tolist() for figure in Integrity(*evidence, BFLOAT16, checked)._figures()]
        with monkeypatch.context() as patched:
            patched.setattr(fused, "usable", lambda tensor: False)
            want = [figure.tolist() for figure in Integrity(*evidence, BFLOAT16, checked)._figures()]
        assert str(found[1]) == str(want[1]), case
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(want[0]), rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_impossible_outcomes(kind: str) -> None:
    """A teacher that rules ids out: weight 0, or an infinite divergence without a gradient, as in the plain path."""
    w = replace(WORLD)
    logits = w.teacher_logits_NV.clone()
    logits[:, 5:9] = -torch.inf
    labels = torch.full_like(w.labels_N, 3)
    lse = logits.logsumexp(-1)
    rows = FullRows(logits, lse, logits[:, 3] - lse, w.full_rows().tolerance)
    same(replace(w, labels_N=labels), rows, OutputLossSpec(Divergence(kind, alpha=0.3)))


def test_a_nan_reaches_the_check() -> None:
    hidden = WORLD.hidden_rows()
    hidden = replace(hidden, hidden_ND=hidden.hidden_ND.clone())
    hidden.hidden_ND[3] = torch.nan  # row 3 has weight 3
    result, _ = loss(WORLD, hidden, OutputLossSpec(), torch.float32)
    assert result.integrity is not None
    with pytest.raises(TeacherHeadMismatch, match="row 3"):
        result.integrity.check()


@pytest.mark.parametrize("form", ["given", "hidden", "full", "top_k"])
def test_a_policy_gradient_and_hard_labels_beside_it(form: str) -> None:
    sampled = (WORLD.hidden_ND @ WORLD.weight_VD.T).log_softmax(-1).gather(-1, WORLD.labels_N[:, None])[:, 0]
    sampled = sampled + 0.3 * torch.sin(torch.arange(len(sampled)))
    sampled[::3] = torch.nan
    forms = {
        "given": GivenRows(*WORLD.served()),
        "hidden": WORLD.hidden_rows(),
        "full": WORLD.full_rows(),
        "top_k": WORLD.topk_rows(9),
    }
    spec = OutputLossSpec(policy_gradient=PolicyGradient(), sft_weight=0.4, kd_weight=0.7, chunk_bytes=1)
    same(WORLD, forms[form], spec, sampled=sampled)
