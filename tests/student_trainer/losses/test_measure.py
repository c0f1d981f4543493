from __future__ import annotations

import pytest
import torch

from student_trainer.errors import DataError
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.losses.measure import measure
from tests.student_trainer.losses import oracle
from tests.student_trainer.losses.worlds import world

W = world(rows=200)


@pytest.mark.parametrize("form", ["hidden_rows", "full_rows"])
@pytest.mark.parametrize("chunk_rows", [7, 256])
def test_figures_are_those_of_the_formulas(form: str, chunk_rows: int) -> None:
    hidden = W.hidden_ND.clone().requires_grad_()
    figures = measure(hidden, Head(W.weight_VD), getattr(W, form)(), W.labels_N, chunk_rows)
    logits = W.hidden_ND @ W.weight_VD.T
    nll = torch.nn.functional.cross_entropy(logits, W.labels_N, reduction="none")
    torch.testing.assert_close(figures.nll_N, nll)
    torch.testing.assert_close(figures.nll_sum, nll.sum())
    assert figures.kl_sum is not None
    torch.testing.assert_close(figures.kl_sum, oracle.kl(W.teacher_logits_NV.softmax(-1), logits.softmax(-1)).sum())
    assert figures.acc1_hits == (logits.argmax(-1) == W.labels_N).sum()
    assert figures.acc3_hits == (logits.topk(3).indices == W.labels_N[:, None]).sum()
    assert 0 < figures.acc1_hits < (logits.topk(2).indices == W.labels_N[:, None]).sum() < figures.acc3_hits
    assert figures.teacher_nll_sum is not None
    torch.testing.assert_close(
        figures.teacher_nll_sum, torch.nn.functional.cross_entropy(W.teacher_logits_NV, W.labels_N, reduction="sum")
    )
    assert figures.rows == 200
    assert not figures.nll_N.requires_grad


def test_truncated_rows_and_no_rows_have_no_exact_divergence() -> None:
    top = measure(W.hidden_ND, Head(W.weight_VD), W.topk_rows(4), W.labels_N)
    assert top.kl_sum is None
    assert top.teacher_nll_sum is not None
    alone = measure(W.hidden_ND, Head(W.weight_VD), None, W.labels_N)
    assert alone.kl_sum is alone.teacher_nll_sum is None
    torch.testing.assert_close(alone.nll_sum, top.nll_sum)


def test_no_rows_at_all() -> None:
    none = torch.arange(0)
    figures = measure(W.hidden_ND[:0], Head(W.weight_VD), W.hidden_rows().take(none), W.labels_N[:0])
    assert figures.rows == 0
    assert figures.nll_sum == 0
    assert figures.kl_sum == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="23 and 20 ids"):
        measure(W.hidden_ND, Head(W.weight_VD).slice(20), W.hidden_rows(), W.labels_N)
    with pytest.raises(DataError, match="must number 200"):
        measure(W.hidden_ND, Head(W.weight_VD), W.hidden_rows(), W.labels_N[1:])


@pytest.mark.parametrize("form", ["hidden_rows", "full_rows", "topk_rows"])
@pytest.mark.parametrize("chunk_rows", [7, 256])
def test_teacher_rows_are_held_against_their_head_as_in_training(form: str, chunk_rows: int) -> None:
    rows = W.topk_rows(4) if form == "topk_rows" else getattr(W, form)()
    figures = measure(W.hidden_ND, Head(W.weight_VD), rows, W.labels_N, chunk_rows)
    assert figures.integrity is not None and figures.integrity.rows == 200
    figures.integrity.check()
    labels_N = W.labels_N.roll(1)  # other tokens than the teacher's rows are of
    shifted = measure(W.hidden_ND, Head(W.weight_VD), rows, labels_N, chunk_rows)
    assert shifted.integrity is not None
    with pytest.raises(TeacherHeadMismatch, match="of 200 teacher rows"):
        shifted.integrity.check()
    alone = measure(W.hidden_ND, Head(W.weight_VD), None, W.labels_N)
    assert alone.integrity is None
