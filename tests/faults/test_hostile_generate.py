"""Two thousand hostile Generate requests over real gRPC: refused by name, or answered; the engine lives and holds nothing.

Requests are made below the client, which would refuse them before sending.
"""

import asyncio
import json
import random
import struct
from collections import Counter

import grpc
import numpy as np
import pytest

from teacher_server.config.server import TeacherConfig
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.core import tensor_codec
from teacher_wire.core.tensor import Tensor
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import PromptBatch, SamplingSpec
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.v2 import teacher_pb2 as pb
from tests.e2e.classroom import EngineService
from tests.teacher_wire.generate.test_generate import BAD_SCHEMAS

REQUESTS, AT_ONCE = 2000, 16
ALLOWED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
NAN, INF = float("nan"), float("inf")


def int32(*values, shape=None):
    return tensor_codec.encode(Tensor("int32", np.array(values, np.int32).reshape(shape or -1)))


def ordinary():
    sampling = pb.SamplingSpec(samples=2, temperature=1.0, top_p=1.0, max_new_tokens=4)
    return pb.GenerateRequest(token_ids=int32(1, 2, 3), cu_lengths=int32(0, 1, 3), sampling=sampling)


def _number(rng, request):
    name, values = rng.choice(
        [
            ("samples", [0, 2**32 - 1, 65, 10**6]),
            ("max_new_tokens", [0, 2**32 - 1, 10**7, 128, 127]),
            ("temperature", [NAN, INF, -INF, -1.0, 1e-300, 5e-324, 1e308, 101.0, struct.unpack("d", b"\1" * 7 + b"\xff")[0]]),
            ("top_p", [NAN, INF, 0.0, -0.0, -1.0, 1.0000001, 2.0, 1e308]),
        ]
    )  # fmt: skip
    setattr(request.sampling, name, rng.choice(values))


def _many(rng, request):
    request.sampling.samples, request.sampling.max_new_tokens = 64, 120
    count = rng.choice([257, 5000])
    request.token_ids.CopyFrom(int32(*[1] * count))
    request.cu_lengths.CopyFrom(int32(*range(count + 1)))


def _stops(rng, request):
    request.sampling.stop_ids.extend(rng.choice([[2**32 - 1], [300], list(range(65)), [1] * 100_000]))


def _schema(rng, request):
    text = rng.choice(list(BAD_SCHEMAS.values()))
    text = text if isinstance(text, str) else json.dumps(text)
    request.sampling.json_schema = rng.choice(
        [
            text.encode("utf-8", "surrogatepass"), rng.randbytes(rng.choice([1, 50, 5000])), b"\xff\xfe{}", b"[" * 70_000,
            b'{"items":' * 100, b'{"enum":[' + b"1," * 40_000 + b"1]}", b'{"enum":[' + b"1," * 5_000 + b"1]}", b" ",
            b'{"type":"string","pattern":"(a*)*b"}', b'{"\\ud800":1}', b'{"enum":["\\ud800"]}', b'{"const":NaN}',
        ]
    )  # fmt: skip


def _ids(rng, request):
    bad = [
        int32(-1, 2, 3), int32(1, 2**31 - 1, 3), int32(1, 300, 3), int32(), int32(1, 2), int32(1, 2, 3, shape=(1, 3)),
        pb.Tensor(), pb.Tensor(dtype=pb.INT32, shape=[2**40], data=b""), pb.Tensor(dtype=pb.INT32, shape=[3], data=b"123"),
        pb.Tensor(dtype=pb.INT32, shape=[2**63, 2], data=b""), pb.Tensor(dtype=pb.FLOAT32, shape=[3], data=bytes(12)),
        pb.Tensor(dtype=pb.INT32, shape=[0, 2**62], data=b""), pb.Tensor(dtype=77, shape=[3], data=bytes(12)),
        int32(*[1] * 200),
    ]  # fmt: skip
    request.token_ids.CopyFrom(rng.choice(bad))


def _lengths(rng, request):
    bad = [int32(0, 3, 1), int32(0, 0, 3), int32(3, 0), int32(), int32(0), int32(0, 4), int32(1, 3), int32(0, -1, 3),
           int32(0, 2**31 - 1, 3), int32(0, 1, 3, shape=(3, 1))]  # fmt: skip
    request.cu_lengths.CopyFrom(rng.choice(bad))


def _have(rng, request):
    every = [0, 0, 0, 1, 1, 0, 1, 1]
    bad = [int32(0, 0, 0), int32(5, 0, shape=(1, 2)), int32(0, -1, shape=(1, 2)), int32(*every, shape=(4, 2)),
           int32(0, 0, shape=(1, 1, 2)), pb.Tensor()]  # fmt: skip
    request.have.CopyFrom(rng.choice(bad))


def _name(rng, request):
    setattr(request, rng.choice(["teacher", "fingerprint"]), rng.choice(["\0", "x" * 10_000, "a\nb", "\u202e" * 3]))


SPOIL = [_number, _number, _many, _stops, _schema, _schema, _schema, _ids, _lengths, _have, _name]


def hostile(rng):
    """A request with one to three things wrong."""
    request = ordinary()
    for spoil in rng.sample(SPOIL, rng.choice([1, 1, 2, 3])):
        spoil(rng, request)
    return request


async def attack(address, count):
    """Answers to `count` hostile requests, by code."""
    rng, codes, room = random.Random(0), Counter(), asyncio.Semaphore(AT_ONCE)
    async with TeacherClient(address) as client:

        async def one(request):
            async with room:
                try:
                    async for _ in client._connection.stub.Generate(request):
                        pass
                    codes["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    codes[error.code()] += 1
                    if error.code() not in ALLOWED:
                        pytest.fail(f"{error.code()} {error.details()} for {str(request)[:2000]}")

        await asyncio.gather(*(one(hostile(rng)) for _ in range(count)))
        info = await client.teacher()
        spec = SamplingSpec(samples=2, max_new_tokens=8)
        assert len([sample async for sample in client.generate(info, spec, PromptBatch.pack([[1], [2, 3]]))]) == 4
    return codes


@pytest.fixture(params=["transformers", "fake"])
def service(request, model_factory):
    if request.param == "fake":
        return FakeTeacher(vocab_rows=300), dict, lambda: None
    backend = {"kind": "transformers", "model": str(model_factory("qwen2")), "dtype": "float32", "device": "cpu"}
    engine = TeacherEngine(TeacherConfig.model_validate({"name": "t", "backend": backend}))
    service = EngineService(engine)
    return service, engine.counters, service.stop


async def test_two_thousand_hostile_requests_leave_the_engine_alive(service, capsys):
    answering, counters, stop = service
    with serve(answering) as server:
        codes = await attack(server.address, REQUESTS)
        assert sum(codes.values()) == REQUESTS and codes["OK"] < REQUESTS * 0.1
        async with asyncio.timeout(30):
            while server.servicer.open_requests:  # the last answer is out before its handler ends
                await asyncio.sleep(0.01)
        held = counters()
        assert not any(held.get(f"generate_{name}") for name in ("calls", "running", "waiting"))
        stop()
    with capsys.disabled():
        print(f"\n{REQUESTS} hostile requests: { ({getattr(code, 'name', code): n for code, n in codes.items()}) }")
