from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from student_trainer.errors import ConfigError
from student_trainer.losses.divergence import KINDS, Divergence, advice, divergence_and_grad
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import FLOAT32
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, HiddenRows
from tests.student_trainer.losses import oracle, second_oracles

SPECS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    *(Divergence("jsd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(Divergence("jsd", beta, normalization="unit") for beta in (0.1, 0.9)),
    *(Divergence(kind, alpha=alpha) for kind in ("skew_kl", "skew_rkl") for alpha in (0.1, 0.7)),
    Divergence("adaptive_kl", alpha=0.5),
]
NAMES = [f"{s.kind}-{s.beta}-{s.alpha}-{s.normalization}" for s in SPECS]


def logits(rows: int, vocab: int, seed: int, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def expected(spec: Divergence, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    p, q = teacher.softmax(-1), student.softmax(-1)
    loss = oracle.divergence(p, q, spec.kind, spec.beta, spec.alpha, spec.normalization == "unit")
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_loss_and_gradient_are_those_of_the_formulas(spec: Divergence) -> None:
    teacher, student = logits(7, 13, 0), logits(7, 13, 1)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    before = log_p.clone(), log_q.clone()
    loss, grad = divergence_and_grad(log_p, log_q, spec)
    want_loss, want_grad = expected(spec, teacher, student)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, want_grad, rtol=1e-11, atol=1e-14)
    assert torch.equal(log_p, before[0])
    assert torch.equal(log_q, before[1])


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_two_oracles_agree(beta: float) -> None:
    teacher, student = logits(5, 11, 2), logits(5, 11, 3)
    trl = oracle.generalized_jsd(student, teacher, beta, 1.0)
    torch.testing.assert_close(oracle.divergence(teacher.softmax(-1), student.softmax(-1), "jsd", beta), trl)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 9), spread=st.floats(0.1, 30))
def test_not_negative_and_zero_only_at_equality(spec: Divergence, seed: int, vocab: int, spread: float) -> None:
    log_p, log_q = (logits(3, vocab, seed + i, spread).log_softmax(-1) for i in (0, 1))
    loss, grad = divergence_and_grad(log_p, log_q, spec)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()
    assert (loss > -1e-12).all()
    torch.testing.assert_close(grad.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)  # shift invariance
    if spec.kind == "jsd" and 0 < spec.beta < 1 and spec.normalization == "paper":
        assert (loss <= oracle.binary_entropy(spec.beta) + 1e-12).all()
    same_loss, same_grad = divergence_and_grad(log_p, log_p.clone(), spec)
    torch.testing.assert_close(same_loss, torch.zeros_like(same_loss), rtol=0, atol=1e-14)
    torch.testing.assert_close(same_grad, torch.zeros_like(same_grad), rtol=0, atol=1e-14)


def test_not_zero_apart() -> None:
    log_p, log_q = logits(4, 8, 0).log_softmax(-1), logits(4, 8, 1).log_softmax(-1)
    for spec in SPECS:
        assert (divergence_and_grad(log_p, log_q, spec)[0] > 1e-3).all(), spec


def test_unit_normalization_reaches_both_ends() -> None:
    log_p, log_q = logits(6, 10, 4, 1.0).log_softmax(-1), logits(6, 10, 5, 1.0).log_softmax(-1)
    for beta, end in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        near = divergence_and_grad(log_p, log_q, Divergence("jsd", beta, normalization="unit"))
        torch.testing.assert_close(near, divergence_and_grad(log_p, log_q, Divergence(end)), rtol=1e-4, atol=1e-6)
        exact = divergence_and_grad(log_p, log_q, Divergence("jsd", round(beta), normalization="unit"))
        assert torch.equal(exact[0], divergence_and_grad(log_p, log_q, Divergence(end))[0])


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_is_its_two_skew_divergences(beta: float) -> None:
    log_p, log_q = logits(6, 10, 6).log_softmax(-1), logits(6, 10, 7).log_softmax(-1)
    jsd = divergence_and_grad(log_p, log_q, Divergence("jsd", beta))
    skew = divergence_and_grad(log_p, log_q, Divergence("skew_kl", alpha=beta))
    reverse = divergence_and_grad(log_p, log_q, Divergence("skew_rkl", alpha=1 - beta))
    for whole, first, second in zip(jsd, skew, reverse, strict=True):
        torch.testing.assert_close(whole, beta * first + (1 - beta) * second)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_impossible_outcomes_weigh_nothing(spec: Divergence) -> None:
    teacher, student = logits(3, 6, 8), logits(3, 6, 9)
    want = divergence_and_grad(teacher.log_softmax(-1), student.log_softmax(-1), spec)
    walls = torch.full((3, 2), -math.inf, dtype=torch.float64)
    both = [torch.cat([z, walls], -1).log_softmax(-1) for z in (teacher, student)]
    loss, grad = divergence_and_grad(both[0], both[1], spec)
    torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(grad, torch.cat([want[1], torch.zeros(3, 2, dtype=torch.float64)], -1))


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_one_sided_impossibility_is_never_nan(spec: Divergence) -> None:
    half = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    full = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    for log_p, log_q in ((half, full), (full, half)):
        loss, grad = divergence_and_grad(log_p, log_q, spec)
        assert not torch.isnan(loss).any()
        assert torch.isfinite(grad).all()
    infinite = {"forward_kl": (full, half), "reverse_kl": (half, full)}
    if spec.kind in infinite:
        assert torch.isposinf(divergence_and_grad(*infinite[spec.kind], spec)[0]).all()  # not clamped away


def test_no_probability_is_clamped() -> None:
    # verl clamps log-probabilities at -10, which zeroes the gradient where the student is most wrong
    log_p = torch.tensor([[0.0, -200.0]], dtype=torch.float64).log_softmax(-1)
    log_q = torch.tensor([[-50.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    loss, grad = divergence_and_grad(log_p, log_q, Divergence("forward_kl"))
    assert loss.item() == pytest.approx(50.0)
    assert grad[0].tolist() == pytest.approx([-1.0, 1.0])


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=rf"'fkl' is unknown; choose from {', '.join(KINDS)}"):
        Divergence("fkl")
    with pytest.raises(ConfigError, match=r"beta must lie in 0\.\.1, not 1\.5"):
        Divergence("jsd", 1.5)
    with pytest.raises(ConfigError, match="beta"):
        Divergence("jsd", math.nan)
    with pytest.raises(ConfigError, match="alpha of skew_kl"):
        Divergence("skew_kl", alpha=1.0)
    with pytest.raises(ConfigError, match="normalization must be paper or unit, not 'mean'"):
        Divergence("jsd", normalization="mean")  # type: ignore[arg-type]


def test_advice_where_the_papers_form_nearly_vanishes() -> None:
    for beta in (0.001, 0.049, 0.951, 0.999):
        assert "normalization=unit" in (advice(Divergence("jsd", beta)) or "")
        assert advice(Divergence("jsd", beta, normalization="unit")) is None
        assert advice(Divergence("skew_kl", beta)) is None
    for beta in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert advice(Divergence("jsd", beta)) is None


def recorded(name: str) -> dict:
    return json.loads(second_oracles.FILE.read_text())[name]


CASES = [(beta, tau) for beta in second_oracles.BETAS for tau in second_oracles.TAUS]


@pytest.mark.parametrize(("beta", "tau"), CASES)
def test_against_the_numbers_of_trl(beta: float, tau: float) -> None:
    """TRL 1.16.0, `generalized_jsd_loss` in float64: divergence, whole loss with a head of its own, gradients."""
    trl = recorded("trl")
    student, teacher = (torch.tensor(trl["inputs"][name], dtype=torch.float64) for name in ("student_NV", "teacher_NV"))
    case = next(case for case in trl["cases"] if (case["beta"], case["tau"]) == (beta, tau))
    want_loss, want_grad = (torch.tensor(case[name], dtype=torch.float64) for name in ("loss_N", "grad_NV"))
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(oracle.generalized_jsd(student, teacher, beta, tau), want_loss, **exact)
    log_p, log_q = (teacher / tau).log_softmax(-1), (student / tau).log_softmax(-1)
    loss, grad = divergence_and_grad(log_p, log_q, Divergence("jsd", beta))
    torch.testing.assert_close(loss, want_loss, **exact)
    torch.testing.assert_close(grad / tau, want_grad, **exact)
    states = student.clone().requires_grad_()  # with the identity as head, states are logits
    labels = torch.zeros(4, dtype=torch.int64)
    rows = FullRows(teacher, teacher.logsumexp(-1), teacher.log_softmax(-1)[:, 0], FLOAT32)
    spec = OutputLossSpec(Divergence("jsd", beta), temperature=tau)
    result = output_loss(states, Head(torch.eye(7, dtype=torch.float64)), rows, labels, torch.ones(4), 1.0, spec)
    result.total.backward()
    torch.testing.assert_close(result.total.detach(), want_loss.sum(), **exact)
    torch.testing.assert_close(states.grad, want_grad, **exact)


@pytest.mark.parametrize(("beta", "tau"), CASES)
def test_against_the_numbers_of_liger(beta: float, tau: float) -> None:
    """Liger 0.8.5, chunked JSD with hard labels and a masked row; it sums in float32, so its tolerance is 1e-5."""
    liger = recorded("liger")
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in liger["inputs"].items()}
    case = next(case for case in liger["cases"] if (case["beta"], case["tau"]) == (beta, tau))
    want = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("loss", "grad_ND", "grad_VD")}
    states, weight = (given[name].requires_grad_() for name in ("student_ND", "student_VD"))
    labels = given["labels_N"].long()
    valid = labels != second_oracles.IGNORED
    teacher = given["teacher_NE"] @ given["teacher_VE"].T
    label_logp = teacher.log_softmax(-1).gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    rows = HiddenRows(given["teacher_NE"], Head(given["teacher_VE"]), teacher.logsumexp(-1), label_logp, FLOAT32)
    spec = OutputLossSpec(Divergence("jsd", beta), temperature=tau, kd_weight=0.5, sft_weight=0.5)
    result = output_loss(states, Head(weight), rows, labels, valid.double(), float(valid.sum()), spec)
    result.total.backward()
    for ours, name in ((result.total.detach(), "loss"), (states.grad, "grad_ND"), (weight.grad, "grad_VD")):
        torch.testing.assert_close(ours, want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(second_oracles.ORACLES))
def test_the_numbers_are_still_theirs(name: str) -> None:
    """Only where the packages are installed: what they compute now is what the file says."""
    pytest.importorskip({"trl": "trl.experimental.gkd.gkd_trainer", "liger": "liger_kernel.chunked_loss"}[name])
    now, then = second_oracles.compute(name), recorded(name)
    assert now["inputs"] == then["inputs"]
    tolerance = 1e-12 if name == "trl" else 1e-5
    for case, kept in zip(now["cases"], then["cases"], strict=True):
        for key, value in kept.items():
            torch.testing.assert_close(
                torch.tensor(case[key], dtype=torch.float64),
                torch.tensor(value, dtype=torch.float64),
                rtol=tolerance,
                atol=tolerance,
            )
