"""A kind of signal that this project does not have, plugged in: one class for the wire, one for the device, one line in each dict.

End to end over the real wire: a transformers model in an engine, the label store of the edge, gRPC, the checks and the label store of a
student. Beside it, a kind on the axis of pairs crosses the codec cut into chunks anywhere.
"""

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.labels.packing import LabelRequest
from student_trainer.labels.service import LabelService
from teacher_server.backends.transformers.backend import load
from teacher_server.config.backends import TransformersBackend
from teacher_server.config.server import TeacherConfig
from teacher_server.edge.admission import Admission
from teacher_server.edge.label_sharing import LabelSharing
from teacher_server.replica.engine import TeacherEngine
from teacher_server.signals.base import Reduction
from teacher_server.signals.reduce import REDUCTIONS
from teacher_wire.core.axes import Axis
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import RequestError
from teacher_wire.core.signals import Field, Signal, SignalSpec, TeacherSignals
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore
from teacher_wire.score import codec
from teacher_wire.score.assembly import Assembly
from teacher_wire.score.signals import SIGNALS, Full, Hidden, TopK
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.v2 import teacher_pb2 as pb
from tests.e2e.classroom import EngineService
from tests.tiny import make_model, make_tokenizer

# -------------------------------------------------------------- the plug-in


@dataclass(frozen=True)
class Entropy(Signal):
    """The mean entropy of a sequence's wanted rows, above a floor, in nats."""

    kind = "entropy"
    floor: float = 0.0

    def fields(self, shape):
        return (Field("entropy_B", Axis.SEQUENCE, "float32"),)

    def check(self, vocab_rows):
        if not self.floor >= 0:
            raise RequestError("an entropy is not negative", field="floor", value=self.floor, limit=0)


class EntropyReduction(Reduction):
    def __init__(self, signal, rows):
        super().__init__(signal, rows)
        self.each = []

    def chunk(self, chunk):
        logp_CV = chunk.logits_CV.float() - chunk.lse_C[:, None]
        self.each.append(self.rows.kept(-(logp_CV.exp() * logp_CV).sum(-1), chunk.rows))
        return {}

    def rest(self):
        sequence_R = self.rows.sequence_R if self.rows.sequence_R is not None else np.zeros(self.rows.count)
        kept_R = sequence_R if self.rows.kept_R is None else sequence_R[self.rows.kept_R]
        counts = np.unique(kept_R, return_counts=True)[1].tolist()
        means = [part.mean() for part in torch.cat(self.each).split(counts)]
        return {"entropy_B": torch.stack(means).clamp_min(self.signal.floor)}


@pytest.fixture
def plugged_in(monkeypatch):
    monkeypatch.setitem(SIGNALS, Entropy.kind, Entropy)
    monkeypatch.setitem(REDUCTIONS, Entropy.kind, EntropyReduction)


# ------------------------------------------------------------------ the proof


def rows(seed=0, lengths=(9, 4, 30, 2)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 300, n).tolist() for n in lengths]


@contextmanager
def served(folder, *, deterministic):
    config = TeacherConfig(
        name="t",
        backend=TransformersBackend(model=str(folder), dtype="float32", device="cpu"),
        deterministic=deterministic,
    )
    model = load(config.backend, deterministic=deterministic)
    service = EngineService(TeacherEngine(config, model))
    with serve(LabelSharing(service, Admission(), memory_bytes=1 << 20)) as server:
        try:
            yield server.address, model
        finally:
            service.stop()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_new_kind_crosses_the_real_wire_and_every_store(plugged_in, tmp_path, deterministic):
    folder = make_model(make_tokenizer(tmp_path / "m"), "qwen2", vocab_size=300)
    batch = TokenBatch.pack(rows(), [[i < len(row) - 1 and i != 1 for i in range(len(row))] for row in rows()])
    spec = SignalSpec(300, (Hidden(), Entropy(floor=0.5), TopK(3)))
    with served(folder, deterministic=deterministic) as (address, model):

        async def ask(connect):
            async with TeacherClient(address) as client:
                info = await client.teacher()
            desk = LabelService(connect, LabelStore(tmp_path / "labels"))
            async with desk.source(info, spec) as source:
                labels = await source.labels(LabelRequest(batch, tuple("abcd")))
            async with desk.source(info, spec) as source:
                again = await source.labels(LabelRequest(batch.select([2, 0]), ("c", "a")))
            return labels, again

        labels, again = asyncio.run(ask(lambda: TeacherClient(address)))
        (full,) = model.score([(batch, SignalSpec(300, (Full(),)))])
    logits_NV = torch.from_numpy(full["logits_NV"].array)
    entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
    bounds = batch.row_bounds_B1.tolist()
    expected_B = [entropy_N[a:b].mean() for a, b in pairwise(bounds) if b > a]
    found = labels.signals
    assert set(found.tensors) == {
        "lse_N", "label_logp_N", "hidden_ND", "entropy_B", "topk_ids_NK", "topk_logits_NK", "tail_logp_N",
    }  # fmt: skip
    np.testing.assert_allclose(found["entropy_B"].array, np.maximum(expected_B, 0.5), rtol=1e-4)
    assert again.usage.disk_share == 1 and again.signals["entropy_B"].shape == (2,)
    np.testing.assert_array_equal(again.signals["entropy_B"].array, found["entropy_B"].array[[2, 0]])


def test_its_settings_cross_the_wire_and_what_means_nothing_is_refused(plugged_in):
    batch = TokenBatch.pack(rows())
    call = ScoreCall("r", "t", "", SignalSpec(300, (Entropy(floor=0.25),)), batch)
    request = codec.encode_call(call)
    assert codec.decode_call(request, "").spec == call.spec
    for change, field in [
        ({"numbers": {"floor": -1.0}}, "floor"),
        ({"numbers": {"flor": 1.0}}, "signal.numbers"),
        ({"numbers": {"floor": float("nan")}}, "floor"),
        ({"layers": [1]}, "signal.layers"),
        ({"reduction": "int8"}, "signal.reduction"),
        ({"kind": "entropie"}, "signal"),
    ]:
        spoilt = pb.Signal(**({"kind": "entropy"} | change))
        del request.spec.signals[:]
        request.spec.signals.append(spoilt)
        with pytest.raises(RequestError) as caught:
            codec.decode_call(request, "")
        assert caught.value.field == field


@dataclass(frozen=True)
class Distances(Signal):
    """How far back each position is that a row sees, of the whole sequence; and the length of each sequence."""

    kind = "distances"

    def fields(self, shape):
        return Field("distance_P2", Axis.PAIR, "float32", (2,)), Field("length_B", Axis.SEQUENCE, "float32")


@given(st.integers(1, 4000), st.integers(0, 3))
def test_entries_of_pairs_and_sequences_travel_with_their_rows(chunk_bytes, seed):
    batch = TokenBatch.pack(
        rows(seed), [[bool((i + seed) % 3) and i < len(row) - 1 for i in range(len(row))] for row in rows(seed)]
    )
    info = replace(FakeTeacher().teacher_info(), vocab_rows=300)
    spec = SignalSpec(300, (Hidden(), Distances()), "sampled")
    call, answer = ScoreCall("r", "t", "", spec, batch), Assembly(ScoreCall("r", "t", "", spec, batch), info)
    rng = np.random.default_rng(seed)
    entries = Assembly(call, info).room(batch.rows)
    for tensor in entries.values():
        tensor.array[...] = rng.random(tensor.shape)
    whole = TeacherSignals(entries, "f")
    chunks = [pb.ScoreDown.FromString(data).chunk for data, _ in codec.encode_chunks(call, 1, whole, chunk_bytes)]
    assert sum(codec.decode_chunk(chunk, answer) for chunk in chunks) == codec.reply_bytes(call, info)
    found = codec.finish_reply(answer, pb.ScoreDone(rows=batch.rows, chunks=len(chunks)), call)
    positions = batch.rows_of() - batch.cu_lengths_B1[batch.sequences_of_rows()]
    assert found["distance_P2"].shape == (int((positions + 1).sum()), 2)
    assert found["length_B"].shape == (len(set(batch.sequences_of_rows())),)
    for name, tensor in entries.items():
        np.testing.assert_array_equal(found[name].array, tensor.array)
    again = TeacherSignals.join(
        [part for part, n in zip(found.cut(batch), np.diff(batch.row_bounds_B1), strict=True) if n]
    )
    for name, tensor in entries.items():
        np.testing.assert_array_equal(again[name].array, tensor.array)
