"""Signals of chosen layers in the language: how many entries there are, what they weigh, what is refused, and what stays as it was."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_wire.artifacts.codec import ArtifactAssembly, encode_header
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis
from teacher_wire.artifacts.messages import TensorHeader
from teacher_wire.core.axes import Axis, Entries
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import CapabilityError, LabelError, LimitError, MismatchError, RequestError
from teacher_wire.core.info import ArtifactInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.blob import label_keys
from teacher_wire.labels.store import LabelStore
from teacher_wire.score import codec
from teacher_wire.score.assembly import Assembly
from teacher_wire.score.signals import Attention, Ffn, Full, Hidden, LayerStates, Relation, TopK
from teacher_wire.score.signals.wire import decode_spec, encode_spec
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.v2 import teacher_pb2 as pb

FAKE = FakeTeacher(layers=4, basis_rank=8, hidden_size=32)
INFO = FAKE.teacher_info()
BASIS = INFO.artifact("layer_basis").sha256


def batches():
    """Any sequences with any rows wanted, at least one."""

    def made(lengths, seed):
        rng = np.random.default_rng(seed)
        rows = [rng.integers(0, 64, n).tolist() for n in lengths]
        wanted = [[bool(rng.random() < 0.4) and i < n - 1 for i in range(n)] for n in lengths]
        wanted[-1][0] = True
        return TokenBatch.pack(rows, wanted)

    return st.builds(made, st.lists(st.integers(2, 200), min_size=1, max_size=5), st.integers(0, 99))


@given(batches())
def test_entries_of_blocks_and_tokens_are_counted_as_the_specification_says(batch):
    entries = Entries(batch)
    blocks, tokens = entries.before(Axis.BLOCK), entries.before(Axis.TOKEN)
    sent = []
    for start, stop in pairwise(batch.cu_lengths_B1.tolist()):
        rows = np.flatnonzero(batch.wanted_T[start:stop])
        sent += range(start, start + (rows[-1] + 1 if rows.size else 0))
    for number, (row, sequence) in enumerate(zip(batch.rows_of(), batch.sequences_of_rows(), strict=True)):
        t = int(row - batch.cu_lengths_B1[sequence])
        assert blocks[number + 1] - blocks[number] == t // 64 + 1
        assert tokens[number + 1] == sent.index(row) + 1, "tokens travel with the first row that is not before them"
    assert entries.total(Axis.TOKEN) == len(sent)


EVERY = (LayerStates((0, 3), "pca", 5, BASIS), Attention((1, 4)), Relation((2,)), Ffn((1,), "quantiles"), Hidden())


@settings(max_examples=25)
@given(batches(), st.integers(1, 5000))
def test_chunks_cut_anywhere_join_to_the_same_answer(batch, chunk_bytes):
    spec = SignalSpec(64, EVERY, "sampled")
    call = ScoreCall("r", "fake", "", spec, batch)
    answer, whole = Assembly(call, INFO), FAKE.signals(spec, batch)
    chunks = [pb.ScoreDown.FromString(data).chunk for data, _ in codec.encode_chunks(call, 1, whole, chunk_bytes)]
    assert (
        sum(codec.decode_chunk(chunk, answer) for chunk in chunks)
        == codec.check_call(call, INFO)
        == whole.payload_bytes
    )
    found = codec.finish_reply(answer, pb.ScoreDone(rows=batch.rows, chunks=len(chunks)), call)
    again = TeacherSignals.join([part for part in found.cut(batch) if part.rows])
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(found[name].array, tensor.array)
        np.testing.assert_array_equal(again[name].array, tensor.array)


@settings(max_examples=15)
@given(batches())
def test_the_fake_answers_a_sequence_as_in_any_company(batch):
    spec = SignalSpec(64, (*EVERY[:-1], TopK(3)))
    parts = FAKE.signals(spec, batch).cut(batch)
    for b in range(batch.sequences):
        if parts[b].rows:
            alone = FAKE.signals(spec, batch.select([b]))
            for name, tensor in alone.tensors.items():
                np.testing.assert_array_equal(parts[b][name].array, tensor.array)


def test_labels_cross_the_wire_and_are_kept_and_found_by_what_was_asked(tmp_path):
    rng = np.random.default_rng(0)
    batch = TokenBatch.pack([rng.integers(0, 64, n).tolist() for n in (150, 5, 40)])
    spec = SignalSpec(64, EVERY)

    async def ask(address):
        async with TeacherClient(address) as client:
            info = await client.teacher()
            basis = LayerBasis.of(await client.artifact(info, info.artifact("layer_basis")))
            return info, basis, await client.score(info, spec, batch)

    with serve(FAKE) as server:
        info, basis, found = asyncio.run(ask(server.address))
    assert (info, info.layers, info.kv_width, info.basis_rank) == (INFO, 4, 16, 8) and info.basis_layers == (
        0,
        1,
        2,
        3,
        4,
    )
    assert basis.rank == 8 and list(basis.layers) == [0, 1, 2, 3, 4]
    expected = FAKE.signals(spec, batch)
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found[name].array, tensor.array)
    store, keys = LabelStore(tmp_path), label_keys(INFO.fingerprint, spec, batch)
    for b, (key, part) in enumerate(zip(keys, found.cut(batch), strict=True)):
        store.keep(key, INFO.fingerprint, spec, batch.select([b]), part)
    for key, part in zip(keys, found.cut(batch), strict=True):
        kept = store.get(key)
        for name, tensor in part.tensors.items():
            np.testing.assert_array_equal(kept[name].array, tensor.array)
    others = [(replace(EVERY[0], basis="0" * 64), *EVERY[1:]), (*EVERY[:1], Attention((1, 3)), *EVERY[2:])]
    for other in others:
        assert not set(keys) & set(label_keys(INFO.fingerprint, SignalSpec(64, other), batch))


# ------------------------------------------------------- bytes of the tables


def weight(signal, length, info):
    """Bytes a token and layer of a sequence of which every row is wanted, as they cross the wire."""
    batch = TokenBatch.pack([[1] * length])
    call = ScoreCall("r", "t", "", SignalSpec(64, (signal,), "sampled"), batch)
    room = Assembly(call, info).room(batch.rows)
    for tensor in room.values():
        tensor.array[...] = 0
    sent = sum(size for _, size in codec.encode_chunks(call, 1, TeacherSignals(room)))
    rest = sum(tensor.payload_bytes for name, tensor in room.items() if name in ("lse_C", "label_logp_C"))
    return (sent - rest) / len(signal.layers) / batch.rows


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        (LayerStates((9, 18), "none"), 7168),
        (LayerStates((9, 18), "pca", 512, "0" * 64), 514),
        (LayerStates((9, 18), "pca", 256, "0" * 64), 258),
        (LayerStates((9, 18), "int8"), 3584 + 2 * 28 + 16 * 4),
        (Relation((20,), "none"), 2048),
        (Relation((20,)), 1028),
        (Ffn((3, 4, 5)), 2),
        (Ffn((3,), "quantiles"), 34),
    ],
    ids=repr,
)
def test_bytes_of_a_token_and_layer_of_the_7b_are_those_of_the_tables(signal, expected):
    info = replace(INFO, hidden_size=3584, layers=28, kv_width=512, dtype="bfloat16", vocab_rows=152_064)
    assert weight(signal, 2048, info) == expected


def test_pooled_maps_of_a_long_sequence_take_half_of_a_whole_map():
    info = replace(INFO, hidden_size=3584, layers=28, kv_width=512, dtype="bfloat16")
    assert weight(Attention((14,)), 2049, info) == 33  # 2 T / 64 / 2, and the block that a row is in


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: LayerStates((), "none"), "layers"),
        (lambda: LayerStates((3, 1), "none"), "layers"),
        (lambda: LayerStates((1, 1), "none"), "layers"),
        (lambda: LayerStates((-1, 1), "none"), "layers"),
        (lambda: LayerStates(tuple(range(1025)), "none"), "layers"),
        (lambda: LayerStates((1,), "zip"), "reduction"),
        (lambda: LayerStates((1,), "pca", 8), "basis"),
        (lambda: LayerStates((1,), "pca", 8, "Z" * 64), "basis"),
        (lambda: LayerStates((1,), "pca", 0, BASIS), "rank"),
        (lambda: LayerStates((1,), "int8", 8), "rank"),
        (lambda: LayerStates((1,), "none", 0, BASIS), "basis"),
        (lambda: Attention((0, 1)), "layers"),
        (lambda: Attention((1,), block=0), "block"),
        (lambda: Attention((1,), block=1 << 40), "block"),
        (lambda: Attention((1,), "whole"), "reduction"),
        (lambda: Relation((0,)), "layers"),
        (lambda: Relation((2,), "pca"), "reduction"),
        (lambda: Ffn((0, 2)), "layers"),
        (lambda: Ffn((2,), "entropy"), "reduction"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(make, field):
    with pytest.raises(RequestError) as caught:
        SignalSpec(64, (make(),))
    assert caught.value.field == field and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("signal", "change", "kind", "field"),
    [
        (LayerStates((5,), "none"), {}, LimitError, "layers"),
        (Attention((5,)), {}, LimitError, "layers"),
        (Relation((1, 99)), {}, LimitError, "layers"),
        (Ffn((1000,)), {}, LimitError, "layers"),
        (LayerStates((1,), "pca", 9, BASIS), {}, LimitError, "rank"),
        (LayerStates((1,), "pca", 1 << 50, BASIS), {}, LimitError, "rank"),
        (LayerStates((1,), "pca", 8, "0" * 64), {}, MismatchError, "basis"),
        (LayerStates((1, 2), "pca", 8, BASIS), {"basis_layers": (1, 3)}, CapabilityError, "layers"),
        (LayerStates((1,), "pca", 8, BASIS), {"artifacts": INFO.artifacts[:1]}, CapabilityError, "reduction"),
        (LayerStates((1,), "none"), {"transports": ("hidden",)}, CapabilityError, "signal"),
        (Attention((1,)), {"transports": ("top_k", "layers")}, CapabilityError, "signal"),
    ],
)
def test_what_a_teacher_cannot_give_is_refused_by_name(signal, change, kind, field):
    call = ScoreCall("r", "fake", "", SignalSpec(64, (signal,)), TokenBatch.pack([[1, 2, 3]]))
    with pytest.raises(kind) as caught:
        codec.check_call(call, replace(INFO, **change))
    assert caught.value.field == field
    if change.get("artifacts"):
        assert "features" in str(caught.value)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.Signal(kind="layers", layers=[1] * 100_000, reduction="none"), "signal.layers"),
        (pb.Signal(kind="layers", layers=[4_294_967_295, 1], reduction="none"), "layers"),
        (pb.Signal(kind="layers", layers=[1], reduction="x" * 10_000), "reduction"),
        (pb.Signal(kind="layers", layers=[1], numbers={"rank": 1e300}, names={"basis": BASIS}), "rank"),
        (pb.Signal(kind="layers", layers=[1], numbers={"rank": 2.5}, names={"basis": BASIS}), "rank"),
        (pb.Signal(kind="layers", layers=[1], numbers={"rank": 8}, names={"basis": "0" * 65}), "signal.names.basis"),
        (pb.Signal(kind="layers", layers=[1], numbers={"rank": 8}, names={"basis": "\n" * 64}), "signal.names.basis"),
        (pb.Signal(kind="layers", layers=[1], names={"x" * 10_000: "y"}), "signal.names"),
        (pb.Signal(kind="layers", layers=[1], names={"reduction": "none"}), "signal.names"),
        (pb.Signal(kind="layers", layers=[1], numbers={"basis": 1}), "signal.numbers"),
        (pb.Signal(kind="attention", layers=[1], numbers={"block": -64}), "block"),
        (pb.Signal(kind="attention", layers=[1], numbers={"block": float("nan")}), "block"),
        (pb.Signal(kind="attention", layers=[1], numbers={"block": 1}), "block"),
        (pb.Signal(kind="ffn", layers=[1], numbers={"rank": 1}), "signal.numbers"),
        (pb.Signal(kind="hidden", names={"basis": BASIS}), "signal.names"),
        (pb.Signal(kind="top_k", numbers={"k": 1}, layers=[1]), "signal.layers"),
    ],
)
def test_hostile_settings_are_refused_by_name_and_briefly(message, field):
    with pytest.raises(RequestError) as caught:
        decode_spec(pb.SignalSpec(vocab_rows=64, signals=[message]))
    assert caught.value.field == field and len(str(caught.value)) < 400


def test_a_reply_is_bounded_before_anything_is_computed():
    batch = TokenBatch.pack([[1] * 4000])
    for signal in (Attention((1, 2, 3, 4)), Relation((1, 2, 3, 4)), LayerStates((0, 1), "none")):
        call = ScoreCall("r", "fake", "", SignalSpec(64, (signal,)), batch)
        needed = codec.check_call(call, INFO)
        with pytest.raises(LimitError, match="reply bytes"):
            codec.check_call(call, replace(INFO, limits=replace(INFO.limits, max_reply_bytes=needed - 1)))


# ------------------------------------------------------ what stays as it was


def test_the_messages_names_and_labels_of_other_kinds_have_their_old_bytes():
    spec = SignalSpec(64, (TopK(3, 1), Hidden("int8"), Full()))
    message = encode_spec(spec)
    assert decode_spec(message) == spec
    digests = [
        hashlib.sha256(data).hexdigest()[:16]
        for data in (message.SerializeToString(deterministic=True), spec.json().encode())
    ]
    assert digests == ["553b540e5b4739cc", "1af039f0bc4fbc0e"], "of the commit before signals of layers"
    assert SignalSpec(64, (Hidden(),)).json() == (
        '{"compression": "none", "extra": 0, "k": 0, "transport": "hidden", "vocab_rows": 64}'
    )


def test_settings_of_layers_cross_the_wire():
    spec = SignalSpec(64, EVERY, "sampled")
    assert decode_spec(pb.SignalSpec.FromString(encode_spec(spec).SerializeToString())) == spec
    assert BASIS in spec.json() and SignalSpec.name_in(spec.json()) == "layers+attention+relation+ffn+hidden"


# -------------------------------------------------------------- the artifact


def spoilt(header, number, **change):
    tensors = list(header.tensors)
    tensors[number] = replace(tensors[number], **change)
    return replace(header, tensors=tuple(tensors))


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda h: spoilt(h, 0, name="mean7_D"), "layer_basis"),
        (lambda h: replace(h, tensors=h.tensors[3:]), "layer_basis"),
        (lambda h: replace(h, tensors=()), "layer_basis"),
        (lambda h: spoilt(h, 0, shape=(33,)), "layer_basis.mean0_D"),
        (lambda h: spoilt(h, 1, shape=(32, 9)), "layer_basis.basis0_DR"),
        (lambda h: spoilt(h, 1, dtype="bfloat16"), "layer_basis.basis0_DR"),
        (lambda h: spoilt(h, 2, shape=(9,)), "layer_basis.massive0_M"),
        (lambda h: replace(h, numbers={"rank": 8.0}), "layer_basis.numbers"),
    ],
)
def test_a_basis_that_is_not_as_described_is_refused_before_its_bytes(spoil, field):
    header = spoil(FAKE.basis.artifact().header)
    told = ArtifactInfo(header.kind, header.sha256, header.payload_bytes)
    with pytest.raises(LabelError) as caught:
        ArtifactAssembly(INFO, told).take(encode_header(header))
    assert caught.value.field == field


def test_a_basis_whose_channels_lie_outside_the_state_is_refused():
    assert isinstance(FAKE.basis.artifact().header.tensors[0], TensorHeader)
    one = FAKE.basis.layers[0]
    for channels in ([32], [-1], [3, 3], [4, 3]):
        wrong = replace(one, massive_M=replace(one.massive_M, array=np.array(channels, np.int32)))
        with pytest.raises(LabelError, match="channels outside the state"):
            LayerBasis({0: wrong}).artifact()
