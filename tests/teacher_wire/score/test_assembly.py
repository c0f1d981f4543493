"""Chunks written into the whole answer: cut anywhere they make the same answer, and what does not belong there is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import LabelError
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.score import codec
from teacher_wire.score.assembly import Assembly
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.v2 import teacher_pb2 as pb
from tests.teacher_wire.labels.labels_of import SPECS, WIDTH, assert_same_labels, entry_of


def asked(name, seed=0, tokens=30, dtype="bfloat16"):
    """A random answer, what it answers, and an empty assembly for it."""
    entry = entry_of(SPECS[name], seed=seed, tokens=tokens, dtype=dtype)
    info = replace(
        FakeTeacher().teacher_info(), dtype=dtype, hidden_size=WIDTH, vocab_rows=70_000, fingerprint=entry.fingerprint
    )
    call = ScoreCall("r", info.name, info.fingerprint, entry.spec, entry.sequence)
    return entry.signals, call, Assembly(call, info)


def chunks_of(signals, chunk_bytes=200):
    """As they come off the wire."""
    downs = codec.encode_chunks("r", 1, signals, chunk_bytes)
    return [pb.ScoreDown.FromString(down.SerializeToString()).chunk for down in downs]


def done(signals, chunks):
    return pb.ScoreDone(rows=signals.rows, chunks=chunks, fingerprint=signals.fingerprint)


@given(st.sampled_from(sorted(SPECS)), st.sampled_from(["bfloat16", "float16", "float32"]), st.integers(1, 3000))
def test_however_it_is_cut_it_is_the_same_answer(name, dtype, chunk_bytes):
    signals, call, answer = asked(name, dtype=dtype)
    chunks = chunks_of(signals, chunk_bytes)
    payload = sum(codec.decode_chunk(chunk, answer) for chunk in chunks)
    assert payload == signals.payload_bytes == sum(map(codec.payload_bytes, chunks))
    assert_same_labels(codec.finish_reply(answer, done(signals, len(chunks)), call), signals)


def test_the_answer_is_in_memory_of_its_own():
    signals, call, answer = asked("hidden")
    chunks = chunks_of(signals)
    for chunk in chunks:
        codec.decode_chunk(chunk, answer)
    whole = codec.finish_reply(answer, done(signals, len(chunks)), call)
    assert all(t.array.flags.writeable and t.array.flags.c_contiguous for t in whole.tensors().values())


def twice(chunk):
    """All rows of a chunk once more behind themselves."""
    parts = {field.name: value for field, value in chunk.ListFields() if isinstance(value, pb.Tensor)}
    for tensor in parts.values():
        tensor.shape[0] *= 2
        tensor.data = tensor.data * 2
    chunk.rows *= 2


def without(name):
    return lambda chunk: chunk.ClearField(name)


def narrower(chunk):
    chunk.hidden.shape[1] -= 1
    chunk.hidden.data = chunk.hidden.data[: chunk.hidden.shape[0] * chunk.hidden.shape[1] * 2]


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda chunk: setattr(chunk, "index", 1), "chunk.index"),
        (lambda chunk: setattr(chunk, "first_row", 1), "chunk.index"),
        (lambda chunk: setattr(chunk, "rows", 1 << 31), "rows"),
        (lambda chunk: setattr(chunk, "rows", chunk.rows - 1), "lse"),
        (lambda chunk: setattr(chunk.hidden, "dtype", pb.FLOAT16), "hidden"),
        (lambda chunk: setattr(chunk.hidden, "data", chunk.hidden.data[:-1]), "hidden.data"),
        (lambda chunk: chunk.tail_logp.CopyFrom(chunk.lse), "chunk"),
        (without("lse"), "chunk"),
        (twice, "rows"),
        (narrower, "hidden"),
    ],
)
def test_a_chunk_that_is_not_what_was_asked_is_refused_by_field(spoil, field):
    signals, _, answer = asked("hidden")
    (chunk,) = chunks_of(signals, 1 << 20)
    spoil(chunk)
    with pytest.raises(LabelError) as caught:
        codec.decode_chunk(chunk, answer)
    assert caught.value.field == field and answer.rows == answer.chunks == 0


def test_an_answer_with_a_chunk_missing_is_incomplete():
    signals, call, answer = asked("top_k_24")
    chunks = chunks_of(signals)
    for chunk in chunks[:-1]:
        codec.decode_chunk(chunk, answer)
    with pytest.raises(LabelError, match="incomplete"):
        codec.finish_reply(answer, done(signals, len(chunks)), call)
    with pytest.raises(LabelError, match="out of order"):
        codec.decode_chunk(chunks[0], answer)


def test_encoding_leaves_the_answer_as_it_is():
    signals, _, _ = asked("top_k_24")
    before = TeacherSignals.of({name: replace(t, array=t.array.copy()) for name, t in signals.tensors().items()})
    chunks_of(signals)
    for name, tensor in before.tensors().items():
        assert np.array_equal(tensor.array, signals.tensors()[name].array, equal_nan=tensor.dtype == "float32"), name
