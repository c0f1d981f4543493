from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.errors import DataError
from student_trainer.losses.align import row_index, wanted_rows
from teacher_wire.core.batch import TokenBatch


def cu(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def test_three_tokens_pin_the_shift() -> None:
    # prompt, answer, end of turn: the row at the prompt describes the answer, the row at the answer the end
    wanted = wanted_rows(np.array([False, True, True]), cu(3))
    assert wanted.tolist() == [True, True, False]
    assert row_index(cu(3), wanted, 5).tolist() == [0, 1]


def test_two_sequences_in_a_padded_batch() -> None:
    mask = np.array([False, False, True, False, True])
    wanted = wanted_rows(mask, cu(3, 2))
    assert wanted.tolist() == [False, True, False, True, False]
    assert row_index(cu(3, 2), wanted, 4).tolist() == [1, 4]


def test_a_supervised_first_token_names_its_sequence() -> None:
    with pytest.raises(DataError, match="sequence 1 supervises its first token"):
        wanted_rows(np.array([False, True, True, True]), cu(2, 2))


def test_row_index_refuses_what_it_cannot_place() -> None:
    with pytest.raises(DataError, match=r"sequence 1 has 3 tokens.*padded_length is 2"):
        row_index(cu(2, 3), np.zeros(5, np.bool_), 2)
    with pytest.raises(DataError, match="last row of sequence 0"):
        row_index(cu(2, 2), np.array([False, True, False, False]), 2)


@pytest.mark.parametrize("lengths", [[0, 2], [1, 3], [0, 2, 2, 3], [0, 4], [3]])
def test_lengths_must_fit(lengths: list[int]) -> None:
    with pytest.raises(DataError, match="lengths must rise from 0 to 3"):
        wanted_rows(np.zeros(3, np.bool_), np.array(lengths, np.int32))


def test_flags_must_be_flags() -> None:
    with pytest.raises(DataError, match="must have one flag per token"):
        wanted_rows(np.zeros(3, np.int64), cu(3))


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5))
def test_every_target_has_exactly_its_row(tails: list[list[bool]]) -> None:
    masks = [np.array([False, *tail]) for tail in tails]
    lengths = cu(*(m.size for m in masks))
    wanted = wanted_rows(np.concatenate(masks), lengths)
    padded = max(m.size for m in masks) + 1
    ids = np.arange(100, 100 + int(lengths[-1]), dtype=np.int32)
    grid = np.zeros((len(masks), padded), np.int64)
    for b, mask in enumerate(masks):
        grid[b, : mask.size] = ids[lengths[b] : lengths[b + 1]]
    targets = np.concatenate([ids[lengths[b] : lengths[b + 1]][mask] for b, mask in enumerate(masks)])
    index = row_index(lengths, wanted, padded)
    assert index.dtype == np.int64
    assert grid.reshape(-1)[index + 1].tolist() == targets.tolist()  # the token after the row is the target
    if targets.size:  # and the wire's own labels agree
        assert TokenBatch(ids, lengths, wanted).labels_N().tolist() == targets.tolist()
