from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from student_trainer.errors import DataError
from student_trainer.losses.head import Head
from student_trainer.losses.rows import check_vocabulary, seen_in_logits
from tests.student_trainer.losses.worlds import world

W = world()
PICK = torch.tensor([7, 3, 3])


def test_a_chunk_is_the_rows_asked_for() -> None:
    logits, (lse, label_logp) = W.teacher_logits_NV[PICK], (t[PICK] for t in W.served())
    for rows in (W.hidden_rows(), W.full_rows()):
        chunk = rows.take(PICK)
        torch.testing.assert_close(chunk.logits(torch.float64), logits)
        assert chunk.tolerance is rows.tolerance
        assert chunk.logits(torch.float32).dtype == torch.float32
    for rows in (W.hidden_rows(), W.full_rows(), W.topk_rows(3)):
        chunk = rows.take(PICK)
        assert torch.equal(chunk.lse_N, lse)
        assert torch.equal(chunk.label_logp_N, label_logp)
    assert torch.equal(W.topk_rows(3).take(PICK).topk_ids_NK, logits.topk(3).indices)


def test_a_bucket_is_the_teachers_distribution() -> None:
    logp, tail = W.topk_rows(4).bucket(torch.float64)
    values, _ = W.teacher_logits_NV.log_softmax(-1).sort(-1, descending=True)
    torch.testing.assert_close(logp, values[:, :4])
    torch.testing.assert_close(tail, values[:, 4:].logsumexp(-1))


def test_a_bucket_of_rounded_logits_still_sums_to_one() -> None:
    rows = W.topk_rows(4)
    rounded = replace(rows, topk_logits_NK=rows.topk_logits_NK.bfloat16())
    logp, tail = rounded.bucket(torch.float64)
    torch.testing.assert_close(logp.exp().sum(-1) + tail.exp(), torch.ones(40, dtype=torch.float64))
    off = (rounded.seen(W.labels_N).lse_C - rows.lse_N).abs().max()
    assert 1e-4 < off < 0.05  # what was normalised away is evidence


def test_what_is_seen_of_a_label() -> None:
    lse, label_logp = W.served()
    full = seen_in_logits(W.teacher_logits_NV, W.labels_N)
    torch.testing.assert_close(full.lse_C, lse)
    torch.testing.assert_close(full.label_logp_C, label_logp)
    for k in (1, 5, 23):
        seen = W.topk_rows(k).seen(W.labels_N)
        torch.testing.assert_close(seen.label_logp_C, label_logp, rtol=1e-5, atol=1e-5)
    # a served logp that is too high for a label outside the kept ids is cut down to the least kept one
    liar = replace(W.topk_rows(5), label_logp_N=torch.zeros(40))
    outside = ~(liar.topk_ids_NK == W.labels_N[:, None]).any(-1)
    least = W.teacher_logits_NV.log_softmax(-1).sort(-1, descending=True).values[:, 4]
    assert (liar.seen(W.labels_N).label_logp_C[outside] <= least[outside] + 1e-6).all()


def test_another_vocabulary_is_refused() -> None:
    check_vocabulary(W.hidden_rows(), Head(W.weight_VD))
    check_vocabulary(W.topk_rows(3), Head(W.weight_VD[:20]))  # top-k rows do not know theirs
    with pytest.raises(DataError, match="over 23 and 20 ids"):
        check_vocabulary(W.full_rows(), Head(W.weight_VD[:20]))
