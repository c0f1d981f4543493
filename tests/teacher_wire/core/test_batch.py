"""Packed batches: row t describes token t+1, and what does not fit together is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_wire.core.axes import Entries
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError, RequestError
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.core.tensor import token_id_dtype
from teacher_wire.score.signals import Full, Hidden, TopK, spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher


def test_row_t_describes_token_t_plus_1():
    """The convention, on three tokens."""
    batch = TokenBatch.pack([[7, 8, 9]])
    assert batch.rows_of().tolist() == [0, 1]
    assert batch.labels_N().tolist() == [8, 9]


def test_rows_do_not_cross_sequences():
    batch = TokenBatch.pack([[1, 2], [3, 4, 5]])
    assert batch.labels_N().tolist() == [2, 4, 5]
    assert [batch.sequence_of_row(r) for r in range(3)] == [0, 1, 1]


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=6), min_size=1, max_size=5))
def test_every_row_has_the_next_token_of_its_own_sequence(sequences):
    batch = TokenBatch.pack(sequences)
    assert batch.labels_N().tolist() == [token for s in sequences for token in s[1:]]


def build(ids, cu, wanted):
    return TokenBatch(np.array(ids, np.int32), np.array(cu, np.int32), np.array(wanted, bool))


@pytest.mark.parametrize(
    ("ids", "cu", "wanted", "field"),
    [
        ([1, 2, 3], [0, 3], [True, True, True], "wanted"),  # the last token has no row
        ([1, 2, 3], [0, 3], [False, False, False], "wanted"),
        ([1, 2, 3], [0, 3], [True, False], "wanted"),
        ([1, 2, 3], [0, 2], [True, False, False], "cu_lengths"),
        ([1, 2, 3], [1, 3], [True, False, False], "cu_lengths"),
        ([1, 2, 3], [0, 2, 3], [True, False, False], "cu_lengths"),  # a sequence of one token
        ([1, 2, 3], [0, 4, 3], [True, False, False], "cu_lengths"),
        ([1, -2, 3], [0, 3], [True, True, False], "token_ids"),
        ([], [0], [], "cu_lengths"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(ids, cu, wanted, field):
    with pytest.raises(RequestError) as caught:
        build(ids, cu, wanted)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((10, (TopK(0),)), "k"),
        ((10, (TopK(11),)), "k"),
        ((10, (TopK(8, 3),)), "k"),
        ((10, (TopK(8, -1),)), "k"),
        ((10, (Hidden("zip"),)), "reduction"),
        ((1, (Hidden(),)), "vocab_rows"),
        ((10, ()), "signals"),
        ((10, (Hidden(), Full(), Hidden("int8"))), "signals"),
        ((10, (Hidden(),), "some"), "check"),
        ((10, (Hidden(), TopK(2)), "sampled"), "check"),
        ((10, (Full(),), "sampled"), "check"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(arguments, field):
    with pytest.raises(RequestError) as caught:
        SignalSpec(*arguments)
    assert caught.value.field == field


def test_ids_take_as_few_bytes_as_the_vocabulary_allows():
    assert token_id_dtype(1 << 16) == "uint16"
    assert token_id_dtype((1 << 16) + 1) == "uint24"
    # k=64 of a bf16 teacher with a vocabulary of 152,064: at most 350 bytes per token (speed.md)
    assert spec_of("top_k", 152_064, k=64).row_bytes(3584, 2) == 332
    assert spec_of("hidden", 152_064, reduction="int8").row_bytes(3584, 2) == 3704 + 8  # docs/concepts/method.md 2.5


@pytest.mark.parametrize("extra", [[[1, 1], [2, 3]], [[1, -2], [2, 3]], [[1, 2]], [[]]])
def test_named_ids_must_fit_the_rows(extra):
    with pytest.raises(RequestError) as caught:
        TokenBatch(
            np.array([1, 2, 3], np.int32),
            np.array([0, 3], np.int32),
            np.array([True, True, False]),
            np.array(extra, np.int32),
        )
    assert caught.value.field == "extra_ids"


def test_slices_join_to_the_whole():
    fake = FakeTeacher()
    batch = TokenBatch.pack([[1, 2, 3, 4, 5, 6]])
    whole = fake.signals(spec_of("top_k", 64, k=3), batch)
    joined = TeacherSignals.join([whole.slice(Entries(batch), 0, 2), whole.slice(Entries(batch), 2, 5)])
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(joined.tensors[name].array, tensor.array)


def test_parts_of_different_answers_do_not_join():
    fake = FakeTeacher()
    batch = TokenBatch.pack([[1, 2, 3]])
    with pytest.raises(LabelError):
        TeacherSignals.join([fake.signals(spec_of("hidden", 64), batch), fake.signals(spec_of("full", 64), batch)])
