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


def chunks_of(signals, call, chunk_bytes=200):
    """As they come off the wire."""
    return [pb.ScoreDown.FromString(data).chunk for data, _ in codec.encode_chunks(call, 1, signals, chunk_bytes)]


def done(signals, chunks):
    return pb.ScoreDone(rows=signals.rows, chunks=chunks, fingerprint=signals.fingerprint)


@given(st.sampled_from(sorted(SPECS)), st.sampled_from(["bfloat16", "float16", "float32"]), st.integers(1, 3000))
def test_however_it_is_cut_it_is_the_same_answer(name, dtype, chunk_bytes):
    signals, call, answer = asked(name, dtype=dtype)
    chunks = chunks_of(signals, call, chunk_bytes)
    sizes = [size for _, size in codec.encode_chunks(call, 1, signals, chunk_bytes)]
    assert sizes == [codec.payload_bytes(chunk) for chunk in chunks]
    assert all(chunk.rows == 1 or size <= chunk_bytes for chunk, size in zip(chunks, sizes, strict=True))
    payload = sum(codec.decode_chunk(chunk, answer) for chunk in chunks)
    assert payload == signals.payload_bytes == sum(map(codec.payload_bytes, chunks))
    assert_same_labels(codec.finish_reply(answer, done(signals, len(chunks)), call), signals)


def test_the_answer_is_in_memory_of_its_own():
    signals, call, answer = asked("hidden")
    chunks = chunks_of(signals, call)
    for chunk in chunks:
        codec.decode_chunk(chunk, answer)
    whole = codec.finish_reply(answer, done(signals, len(chunks)), call)
    assert all(t.array.flags.writeable and t.array.flags.c_contiguous for t in whole.tensors.values())


def twice(chunk):
    """All rows of a chunk once more behind themselves."""
    for tensor in (named.tensor for named in chunk.tensors):
        tensor.shape[0] *= 2
        tensor.data = tensor.data * 2
    chunk.rows *= 2


def tensor_of(chunk, name):
    return next(named for named in chunk.tensors if named.name == name)


def without(name):
    return lambda chunk: chunk.tensors.remove(tensor_of(chunk, name))


def again(name):
    return lambda chunk: chunk.tensors.add().CopyFrom(tensor_of(chunk, name))


def narrower(chunk):
    hidden = tensor_of(chunk, "hidden_ND").tensor
    hidden.shape[1] -= 1
    hidden.data = hidden.data[: hidden.shape[0] * hidden.shape[1] * 2]


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda chunk: setattr(chunk, "index", 1), "chunk.index"),
        (lambda chunk: setattr(chunk, "first_row", 1), "chunk.index"),
        (lambda chunk: setattr(chunk, "rows", 1 << 31), "rows"),
        (lambda chunk: setattr(chunk, "rows", chunk.rows - 1), "lse_N"),
        (lambda chunk: setattr(tensor_of(chunk, "hidden_ND").tensor, "dtype", pb.FLOAT16), "hidden_ND"),
        (lambda chunk: setattr(tensor_of(chunk, "hidden_ND").tensor, "data", b"1"), "hidden_ND.data"),
        (lambda chunk: setattr(tensor_of(chunk, "hidden_ND"), "name", "tail_logp_N"), "chunk"),
        (lambda chunk: setattr(tensor_of(chunk, "hidden_ND"), "axis", pb.PAIR), "hidden_ND"),
        (lambda chunk: chunk.tensors.add(name="tail_logp_N"), "chunk"),
        (without("lse_N"), "chunk"),
        (again("lse_N"), "chunk"),
        (twice, "rows"),
        (narrower, "hidden_ND"),
    ],
)
def test_a_chunk_that_is_not_what_was_asked_is_refused_by_field(spoil, field):
    signals, call, answer = asked("hidden")
    (chunk,) = chunks_of(signals, call, 1 << 20)
    spoil(chunk)
    with pytest.raises(LabelError) as caught:
        codec.decode_chunk(chunk, answer)
    assert caught.value.field == field and answer.rows == answer.chunks == 0


def test_an_answer_with_a_chunk_missing_is_incomplete():
    signals, call, answer = asked("top_k_24")
    chunks = chunks_of(signals, call)
    for chunk in chunks[:-1]:
        codec.decode_chunk(chunk, answer)
    with pytest.raises(LabelError, match="incomplete"):
        codec.finish_reply(answer, done(signals, len(chunks)), call)
    with pytest.raises(LabelError, match="out of order"):
        codec.decode_chunk(chunks[0], answer)


def test_encoding_leaves_the_answer_as_it_is():
    signals, call, _ = asked("top_k_24")
    before = TeacherSignals({name: replace(t, array=t.array.copy()) for name, t in signals.tensors.items()})
    chunks_of(signals, call)
    for name, tensor in before.tensors.items():
        assert np.array_equal(tensor.array, signals.tensors[name].array, equal_nan=tensor.dtype == "float32"), name
