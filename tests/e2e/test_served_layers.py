"""Signals of layers over the real wire: a transformers model in an engine behind the store of an edge, and a student's desk with its own.

What each of them weighs is counted at the connection, in the chunks as they travel.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import numpy as np
import pytest

from student_trainer.labels.packing import LabelRequest
from student_trainer.labels.service import LabelService
from teacher_server.backends.transformers.backend import load
from teacher_server.config.backends import FakeBackend, TransformersBackend
from teacher_server.config.features import FeaturesConfig
from teacher_server.config.server import TeacherConfig
from teacher_server.edge.admission import Admission
from teacher_server.edge.label_sharing import LabelSharing
from teacher_server.replica import features as replica_features
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import CapabilityError, LimitError, MismatchError
from teacher_wire.core.signals import SignalSpec
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore
from teacher_wire.score import codec
from teacher_wire.score.signals import Attention, Ffn, Hidden, LayerStates, Relation, TopK
from teacher_wire.testing.loopback import serve
from tests.e2e.classroom import EngineService

RANK = 24


@contextmanager
def served(folder, kept, *, deterministic=False, rank=RANK):
    section = FeaturesConfig(rank=rank, calibration_tokens=512, folder=kept) if rank else None
    backend = TransformersBackend(model=str(folder), dtype="float32", device="cpu")
    config = TeacherConfig(name="t", backend=backend, deterministic=deterministic, features=section)
    engine = TeacherEngine(config, load(config.backend, deterministic=deterministic))
    service = EngineService(engine)
    with serve(LabelSharing(service, Admission(), memory_bytes=1 << 20)) as server:
        try:
            yield server.address, engine
        finally:
            service.stop()


def batch():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 300, n).tolist() for n in (9, 100, 30)]
    return TokenBatch.pack(rows, [[i < len(row) - 1 and i > 4 for i in range(len(row))] for row in rows])


def every(info):
    digest = info.artifact("layer_basis").sha256
    return (LayerStates((0, 1, 2), "pca", RANK, digest), Attention((1, 2)), Relation((2,)), Ffn((1, 2), "quantiles"))


@pytest.mark.parametrize("deterministic", [False, True])
def test_layers_cross_the_wire_beside_the_output_and_are_found_again(model_factory, tmp_path, deterministic):
    with served(model_factory("qwen2", hidden=64), tmp_path / "kept", deterministic=deterministic) as (address, engine):

        async def ask():
            async with TeacherClient(address) as client:
                info = await client.teacher()
                basis = LayerBasis.of(await client.artifact(info, info.artifact("layer_basis")))
            desk = LabelService(lambda: TeacherClient(address), LabelStore(tmp_path / "labels"))
            spec = SignalSpec(300, (Hidden(), *every(info)), "sampled")
            async with desk.source(info, spec) as source:
                labels = await source.labels(LabelRequest(batch(), tuple("abc")))
            async with desk.source(info, spec) as source:
                again = await source.labels(LabelRequest(batch().select([1, 0]), ("b", "a")))
            return info, basis, spec, labels, again

        info, basis, spec, labels, again = asyncio.run(ask())
        forwards = engine.counters()["forwards"]
        (alone,) = engine._backend.score([(batch(), SignalSpec(300, (Hidden(),), "sampled"))])
    assert forwards == 1, "features cost no pass of their own"
    assert {"layers", "attention", "relation", "ffn"} <= set(info.transports) and info.kv_width == 32
    assert basis.rank == RANK and labels.signals.payload_bytes == spec.answer_bytes(batch(), spec.shape_of(info))
    np.testing.assert_allclose(labels.signals["hidden_ND"].array, alone["hidden_ND"].array, atol=1e-6)
    assert again.usage.disk_share == 1
    parts = labels.signals.cut(batch())
    for place, b in enumerate((1, 0)):
        for name, tensor in again.signals.cut(batch().select([1, 0]))[place].tensors.items():
            np.testing.assert_array_equal(tensor.array, parts[b][name].array, err_msg=name)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda digest: LayerStates((1, 2), "pca", RANK, digest), RANK + 2),
        (lambda _: LayerStates((1, 2), "none"), 4 * 64),
        (lambda _: LayerStates((1,), "int8"), 64 + 2 + 16 * 4),
        (lambda _: Relation((1, 2)), 2 * (32 + 2)),
        (lambda _: Relation((1, 2), "none"), 2 * 4 * 32),
        (lambda _: Ffn((1, 2)), 2),
        (lambda _: Ffn((2,), "quantiles"), 34),
        (lambda _: Attention((1, 2)), 2 * (64 + 2 * 35) / 99),
    ],
)
def test_bytes_of_a_token_and_layer_at_the_connection(model_factory, tmp_path, monkeypatch, make, expected):
    row = TokenBatch.pack([np.arange(100).tolist()])
    with served(model_factory("qwen2", hidden=64), tmp_path / "kept") as (address, _):

        async def ask():
            received, take = [], codec.decode_chunk
            monkeypatch.setattr(
                codec, "decode_chunk", lambda chunk, answer: received.append(chunk) or take(chunk, answer)
            )
            async with TeacherClient(address) as client:
                info = await client.teacher()
                signal = make(info.artifact("layer_basis").sha256)
                await client.score(info, SignalSpec(300, (signal,), "sampled"), row)
            return signal, received

        signal, received = asyncio.run(ask())
    named = [tensor for chunk in received for tensor in chunk.tensors if not tensor.name.endswith("_C")]
    assert sum(len(tensor.tensor.data) for tensor in named) / 99 / len(signal.layers) == pytest.approx(expected)


def test_what_this_teacher_cannot_give_is_refused_over_the_wire_by_name(model_factory, tmp_path, monkeypatch):
    folder = model_factory("qwen2", hidden=64)

    async def refused(address, *signals):
        async with TeacherClient(address) as client:
            info = await client.teacher()
            with pytest.raises((CapabilityError, LimitError, MismatchError)) as caught:
                await client.score(info, SignalSpec(300, signals), batch())
            return type(caught.value), caught.value.field, str(caught.value)

    with served(folder, tmp_path, rank=0) as (address, _):
        kind, field, said = asyncio.run(refused(address, LayerStates((1,), "pca", 8, "0" * 64)))
        assert (kind, field) == (CapabilityError, "reduction") and "`features`" in said
    with served(folder, tmp_path) as (address, engine):
        assert asyncio.run(refused(address, LayerStates((1,), "pca", 8, "0" * 64)))[:2] == (MismatchError, "basis")
        assert asyncio.run(refused(address, Attention((3,)), TopK(2)))[:2] == (LimitError, "layers")
        forwards = engine.counters()["forwards"]
        monkeypatch.setattr(replica_features, "CAPTURED_BYTES", 10_000)
        kind, field, said = asyncio.run(refused(address, Attention((1, 2))))
        assert (
            (kind, field) == (LimitError, "bytes captured")
            and "fewer layers" in said
            and engine.counters()["forwards"] == forwards
        )


def test_what_a_sequence_makes_the_device_hold_is_counted_by_its_layers(model_factory, tmp_path):
    info = TeacherEngine(TeacherConfig(name="t", backend=FakeBackend(layers=3, hidden_size=64))).info

    def weight(*signals):
        spec = SignalSpec(64, signals)
        return spec.captured_bytes(batch(), spec.shape_of(info)) / (4 * 100)

    assert weight(Hidden()) == weight(Ffn((1,))) == 0
    assert weight(LayerStates((0, 2), "none")) == 2 * 64
    assert weight(Attention((1,))) == 64 + 3 * 32 == weight(Relation((2,)))
    assert weight(Attention((1, 2)), LayerStates((1,), "int8"), Hidden()) == 2 * (64 + 3 * 32) + 64
