from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from student_trainer.losses.head import Head
from student_trainer.losses.integrity import BFLOAT16, CHANCE, FLOAT32, Integrity, Tally, TeacherHeadMismatch, forgiven
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import TeacherRows
from teacher_wire.core.errors import LabelError
from tests.student_trainer.losses.worlds import World, world

W = world(rows=60)


def check(rows: TeacherRows, w: World = W) -> None:
    spec, weights = OutputLossSpec(chunk_bytes=1), torch.ones(len(w.labels_N))
    loss = output_loss(w.hidden_ND, Head(w.weight_VD), rows, w.labels_N, weights, 1.0, spec)
    assert loss.integrity is not None
    assert loss.integrity.seen_lse_N.numel() == len(w.labels_N)
    loss.integrity.check()


def evidence(rows: int, off: dict[int, float]) -> Integrity:
    """Rows that agree but for the given errors in logp, in units of the tolerance."""
    seen = torch.full((rows,), -1.0, dtype=torch.float64)
    for row, error in off.items():
        seen[row] += error * (BFLOAT16.logp_abs + BFLOAT16.logp_rel * 32)
    lse, served = torch.full_like(seen, 32.0), torch.full_like(seen, -1.0)
    return Integrity(torch.arange(rows) + 100, lse, lse.clone(), served, seen)


@pytest.mark.parametrize("form", ["hidden", "full", "topk", "topk-all"])
@pytest.mark.parametrize("seed", range(4))
def test_true_rows_pass(form: str, seed: int) -> None:
    w = world(rows=50, seed=seed)
    forms = {"hidden": w.hidden_rows(), "full": w.full_rows(), "topk": w.topk_rows(4), "topk-all": w.topk_rows(23)}
    check(forms[form], w)


@pytest.mark.parametrize("tolerance", [BFLOAT16, FLOAT32])
def test_shifted_rows(tolerance: object) -> None:
    rows = replace(W.hidden_rows(), tolerance=tolerance)
    with pytest.raises(TeacherHeadMismatch, match=r"of 60 teacher rows .*field=row \d+"):
        check(replace(rows, hidden_ND=rows.hidden_ND.roll(1, 0)))
    everything = {name: getattr(rows, name).roll(1, 0) for name in ("hidden_ND", "lse_N", "label_logp_N")}
    with pytest.raises(TeacherHeadMismatch):  # consistent in itself, but about other labels
        check(replace(rows, **everything))


def test_a_teacher_that_rounds_its_logits_to_bfloat16_passes() -> None:
    w = world(rows=2000, spread=4.0)  # logits up to 50 and more, where a bfloat16 is 0.25 wide
    h, weight = w.teacher_hidden_ND.bfloat16(), w.teacher_weight_VD.bfloat16()
    rounded = (h @ weight.T).float()
    lse, logp = rounded.logsumexp(-1), rounded.log_softmax(-1).gather(-1, w.labels_N[:, None])[:, 0]
    rows = replace(w.hidden_rows(BFLOAT16), hidden_ND=h, head=Head(weight), lse_N=lse, label_logp_N=logp)
    check(rows, w)
    with pytest.raises(TeacherHeadMismatch):  # and the narrow tolerance is narrow
        check(replace(rows, tolerance=FLOAT32), w)


def test_state_before_the_final_norm() -> None:
    with pytest.raises(TeacherHeadMismatch):
        check(replace(W.hidden_rows(BFLOAT16), hidden_ND=W.teacher_hidden_ND * 1.5))


def test_wrong_head() -> None:
    other = world(rows=60, seed=1).teacher_weight_VD
    for head in (Head(other), Head(W.teacher_weight_VD, final_softcap=5.0), Head(W.teacher_weight_VD, logit_scale=0.9)):
        with pytest.raises(TeacherHeadMismatch):
            check(replace(W.hidden_rows(BFLOAT16), head=head))


def test_unsliced_vocabulary() -> None:
    # the server's softmax ran over the padding rows as well
    padded = torch.cat([W.teacher_weight_VD, 0.02 * W.teacher_weight_VD[:5]])
    logits = W.teacher_hidden_ND @ padded.T
    lse, logp = logits.logsumexp(-1), logits.log_softmax(-1).gather(-1, W.labels_N[:, None])[:, 0]
    with pytest.raises(TeacherHeadMismatch):
        check(replace(W.hidden_rows(BFLOAT16), lse_N=lse, label_logp_N=logp))


def test_full_rows_that_are_others() -> None:
    with pytest.raises(TeacherHeadMismatch):
        check(replace(W.full_rows(), logits_NV=W.teacher_logits_NV.roll(1, 0)))


def test_topk_rows_about_other_labels_or_without_their_mass() -> None:
    rows = W.topk_rows(4)
    names = ("topk_ids_NK", "topk_logits_NK", "tail_logp_N", "lse_N", "label_logp_N")
    with pytest.raises(TeacherHeadMismatch):
        check(replace(rows, **{name: getattr(rows, name).roll(1, 0) for name in names}))
    with pytest.raises(TeacherHeadMismatch):
        check(replace(rows, tail_logp_N=torch.full_like(rows.tail_logp_N, -9.0)))


def test_nan_never_passes() -> None:
    rows = W.hidden_rows()
    for name in ("lse_N", "label_logp_N", "hidden_ND"):
        spoiled = getattr(rows, name).clone()
        spoiled[7] = torch.nan
        with pytest.raises(TeacherHeadMismatch, match=r"1 of 60 .*field=row 7"):
            check(replace(rows, **{name: spoiled}))


@pytest.mark.parametrize(
    ("rows", "off", "passes"),
    [
        (40, {3: 9.0}, True),  # a near miss is forgiven
        (40, {3: 11.0}, False),  # a gross one never
        (2, {0: 2.0, 1: 2.0}, False),
        (40, {3: 2.0, 4: -2.0}, True),
        (40, {3: 2.0, 4: -2.0, 5: 2.0}, False),
        (2000, dict.fromkeys(range(9), 2.0), True),  # 0.1 % of 2,000 are 2, and by chance 9
        (2000, dict.fromkeys(range(10), 2.0), False),
        (0, {}, True),
    ],
)
def test_what_is_forgiven(rows: int, off: dict[int, float], passes: bool) -> None:
    if passes:
        evidence(rows, off).check()
    else:
        with pytest.raises(TeacherHeadMismatch):
            evidence(rows, off).check()


@pytest.mark.parametrize("rows", [1, 2, 14, 15, 40, 100, 2_000, 20_000])
def test_the_bound_is_that_of_the_binomial_distribution(rows: int) -> None:
    """As the formula in whole numbers: right rows exceed it with a chance below CHANCE, and exceed one less with a greater."""
    terms = [math.comb(rows, k) * 999 ** (rows - k) for k in range(forgiven(rows) + 1)]
    above = [1000**rows - sum(terms), 1000**rows - sum(terms[:-1])]
    chances = [float(Fraction(value, 1000**rows)) for value in above]
    assert chances[0] < CHANCE <= chances[1]


def test_the_bound_never_falls_and_stays_close_to_the_share() -> None:
    bounds = [forgiven(rows) for rows in range(0, 300_000, 97)]
    assert bounds == sorted(bounds) and bounds[0] == 0
    assert 100_000 < forgiven(10**8) < 101_500


def test_calls_add_up() -> None:
    tally = Tally()
    for _ in range(100):
        evidence(40, {}).check(tally)
    evidence(1, {0: 2.0}).check(tally)
    with pytest.raises(TeacherHeadMismatch, match=r"39 of 40 teacher rows \(and 1 of 4001 before\)"):
        evidence(40, dict.fromkeys(range(39), 2.0)).check(tally)


def test_the_message_names_row_and_figures_and_is_a_label_error() -> None:
    with pytest.raises(LabelError) as caught:
        evidence(40, {3: -20.0}).check()
    text = str(caught.value)
    assert "1 of 40" in text
    assert "field=row 103" in text
    assert "logp(label) -1, recomputed 32 and -7" in text
    assert "|d logp| <= 0.05 + 0.0078 |lse|" in text


def test_rows_of_weight_zero_are_no_evidence() -> None:
    rows = W.hidden_rows()
    spoiled = rows.hidden_ND.clone()
    spoiled[5] = 0
    weights = torch.ones(60)
    weights[5] = 0
    spec = OutputLossSpec()
    loss = output_loss(W.hidden_ND, Head(W.weight_VD), replace(rows, hidden_ND=spoiled), W.labels_N, weights, 1.0, spec)
    assert loss.integrity is not None
    loss.integrity.check()
    assert loss.integrity.row_N.tolist() == [n for n in range(60) if n != 5]
