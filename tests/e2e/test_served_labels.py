"""Must show 3: labels that came through Ray Serve and gRPC equal the model called directly."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.labels.device_transfer import to_torch
from student_trainer.labels.rows_on_device import head_on
from student_trainer.teachers.artifact_cache import fetch_head
from teacher_wire import PROTOCOL
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import CapabilityError, NotFoundError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.transport import status_table

pytestmark = pytest.mark.ray
TOLERANCE = 2e-4  # float32 logits of magnitude ~10


def sequences(seed, lengths=(3, 50, 2, 33, 18)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 300, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def direct(teachers):
    model = AutoModelForCausalLM.from_pretrained(teachers.model, dtype=torch.float32).eval()

    def logits(rows):
        with torch.no_grad():
            return torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in rows]).numpy()

    return logits


@pytest.mark.parametrize("name", ["exact", "shared"])
async def test_served_labels_equal_the_model(teachers, direct, tmp_path, name):
    async with TeacherClient(teachers.address) as client:
        info = await client.teacher(name)
        head = head_on(await fetch_head(client, info, tmp_path), 300, torch.device("cpu"))
        batches = [TokenBatch.pack(sequences(seed)) for seed in range(6)]
        specs = [spec_of("hidden", 300), spec_of("top_k", 300, k=11), spec_of("full", 300)]
        answers = await asyncio.gather(*(client.score(info, spec, batch) for batch in batches for spec in specs))
        for seed, batch in enumerate(batches):
            expected = direct(sequences(seed))
            hidden, top, full = answers[3 * seed : 3 * seed + 3]
            np.testing.assert_allclose(head.logits(to_torch(hidden["hidden_ND"])), expected, atol=TOLERANCE)
            np.testing.assert_allclose(full["logits_NV"].array, expected, atol=TOLERANCE)
            order = np.argsort(-expected, axis=-1, kind="stable")[:, :11]
            np.testing.assert_array_equal(top["topk_ids_NK"].array, order)
            np.testing.assert_allclose(
                top["topk_logits_NK"].array, np.take_along_axis(expected, order, -1), atol=TOLERANCE
            )
            wide = expected.astype(np.float64)
            p = np.exp(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))
            tail = 1 - np.take_along_axis(p, order, -1).sum(-1)
            np.testing.assert_allclose(np.exp(top["tail_logp_N"].array), tail, atol=1e-4)
            np.testing.assert_allclose(
                top.label_logp_N.array, np.log(p[np.arange(batch.rows), batch.labels_N()]), atol=1e-4
            )


async def test_deterministic_is_bit_equal_in_any_company(teachers):
    async with TeacherClient(teachers.address) as client:
        exact, shared = await client.teacher("exact"), await client.teacher("shared")
        batch, spec = TokenBatch.pack(sequences(0)), spec_of("hidden", 300)
        alone = await client.score(exact, spec, batch)
        noise = [client.score(exact, spec, TokenBatch.pack(sequences(seed))) for seed in range(1, 9)]
        crowd = await asyncio.gather(*noise[:4], client.score(exact, spec, batch), *noise[4:])
        for name, tensor in alone.tensors.items():
            assert crowd[4].tensors[name].array.tobytes() == tensor.array.tobytes()
        assert exact.fingerprint != shared.fingerprint, "the same weights, but not the same bits: they share no labels"
        company = await asyncio.gather(*(client.score(shared, spec, TokenBatch.pack(sequences(s))) for s in range(8)))
        np.testing.assert_allclose(company[0]["hidden_ND"].array, alone["hidden_ND"].array, atol=TOLERANCE)
        assert max(answer.timing.batch_tokens for answer in company) > batch.tokens, "requests shared a forward pass"


async def test_errors_cross_ray_and_grpc_with_their_names(teachers):
    """Raised in a replica, through Ray, the edge and gRPC, to a client that checks nothing itself."""
    import grpc

    from teacher_wire.core.calls import ScoreCall
    from teacher_wire.score import codec
    from teacher_wire.v2 import teacher_pb2 as pb
    from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc

    async with grpc.aio.insecure_channel(teachers.address) as channel:
        stub = pb_grpc.TeacherStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Artifact(
                pb.ArtifactRequest(teacher="exact", fingerprint="f" * 64, kind="output_head", sha256="0" * 64)
            ).read()
        refused = status_table.from_rpc(caught.value, teachers.address)
        assert isinstance(refused, CapabilityError), refused
        assert refused.field == "fingerprint"
        stream = stub.Score()
        await stream.write(pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=1 << 20)))
        call = ScoreCall("r", "exact", "", spec_of("hidden", 300), TokenBatch.pack([[1] * 129]))
        await stream.write(pb.ScoreUp(request=codec.encode_call(call)))
        failed = (await stream.read()).failed
        assert (failed.error.kind, failed.error.field, failed.error.limit) == ("LimitError", "sequence 0 tokens", "128")
        stream.cancel()
    async with TeacherClient(teachers.address) as client:
        with pytest.raises(NotFoundError, match="exact"):
            await client.teacher("nobody")


def test_health_and_describe(teachers):
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from tests.e2e.conftest import run_cli

    with grpc.insecure_channel(teachers.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "teacher_wire.v2.Teacher"):
            assert (
                stub.Check(health_pb2.HealthCheckRequest(service=service)).status
                == health_pb2.HealthCheckResponse.SERVING
            )
    shown = run_cli("describe", "--address", teachers.address, house="teacher_server")
    assert shown.returncode == 0 and "exact" in shown.stdout and "Qwen2ForCausalLM" in shown.stdout


async def test_an_interactive_request_that_nobody_keeps_has_the_same_bits_and_is_counted(teachers):
    async with TeacherClient(teachers.address) as client:
        info, spec = await client.teacher("exact"), spec_of("hidden", 300)
        batch = TokenBatch.pack(sequences(77))
        quick = await client.score(info, spec, batch, cache="none", latency="interactive")
        for name, tensor in (await client.score(info, spec, batch)).tensors.items():
            assert quick[name].array.tobytes() == tensor.array.tobytes()
        async with asyncio.timeout(60):  # replicas and edges report once a second
            while True:
                status = await client.server_status()
                teacher = next(teacher for teacher in status.teachers if teacher.name == "exact")
                stages = {entry.stage for entry in teacher.latencies}
                if teacher.interactive_answered and status.store.unshared and "interactive_whole" in stages:
                    break
                await asyncio.sleep(0.2)
        assert teacher.interactive_tokens == batch.tokens and "interactive_queue" in stages
