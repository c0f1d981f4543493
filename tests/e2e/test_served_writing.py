"""Writing like scoring, over Ray Serve and gRPC: rolling updates, killed and scaled-down replicas, weights; and a device that is lost.

One server for all (it starts once); the tests run in order, and each leaves it serving.
"""

import asyncio
import contextlib
import signal
from collections import Counter

import grpc
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from teacher_server.edge.server import SERVICE
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import MismatchError, TeacherWireError, UnavailableError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_generation import FakeWriter
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.transport.channel import Credentials
from tests.e2e.conftest import server_config, serving, transformers_teacher
from tests.e2e.load import until

pytestmark = pytest.mark.ray

TWO = {"min_replicas": 2, "max_replicas": 2}
FAKE = {"name": "fake", "num_cpus": 0.1, "backend": {"kind": "fake", "delay_s": 0.04}, "autoscaling": TWO}
BREAKING = {"name": "breaking", "num_cpus": 0.1, "backend": {"kind": "fake", "breaks_after": 2}}
SCALING = {"max_replicas": 2, "target_queued_tokens": 4000, "upscale_delay_s": 0.5, "downscale_delay_s": 1.0}
NEW_TOKENS = 8


def fingerprint(seed):
    return FakeTeacher(seed=seed).teacher_info().fingerprint


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_factory):
    model = model_factory("qwen2", seed=5, hidden=48)
    scribe = transformers_teacher("scribe", model, generation={"max_running": 4}, autoscaling=SCALING)
    config = server_config(FAKE, BREAKING, {**scribe, "num_cpus": 0.1})
    config["tenants"] = {"heavy": {"weight": 3.0, "operator": True}, "light": {"weight": 1.0}}
    with serving(tmp_path_factory.mktemp("writing"), config) as running:
        running.config = yaml.safe_load(running.config_file.read_text())
        yield running


class Writers:
    """Students that have texts written without pause by the fake and compare each with the weights they named.

    Attributes:
        done: whole calls by fingerprint.
        told: calls refused because the weights that they named are gone; they take the new ones.
        troubles: everything else that went wrong, also what the client would have tried again.
    """

    def __init__(self, address):
        self.done, self.told, self.troubles = Counter(), 0, []
        self._address = address
        self._writers = {fingerprint(seed): FakeWriter(salt=seed) for seed in range(3)}

    @contextlib.asynccontextmanager
    async def asking(self, students):
        stop = asyncio.Event()
        tasks = [asyncio.create_task(self._ask(stop, number)) for number in range(students)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks)

    async def _ask(self, stop, number):
        async with TeacherClient(self._address, retry_for_s=0, on_trouble=self.troubles.append) as client:
            info = await client.teacher("fake")
            while not stop.is_set():
                number += 100
                spec, prompts = SamplingSpec(samples=8, seed=number), PromptBatch.pack([[1, 2], [3]])
                call = GenerateCall("fake", info.fingerprint, spec, prompts)
                seen = set()
                try:
                    async for sample in client.generate(info, spec, prompts):
                        expected = self._writers[info.fingerprint]._sample(call, sample.prompt, sample.index, 64)
                        assert sample.token_ids_n.tolist() == expected.token_ids_n.tolist(), "other weights' text"
                        assert (sample.prompt, sample.index) not in seen
                        seen.add((sample.prompt, sample.index))
                except MismatchError:
                    assert not seen, "refused in the middle of a call"
                    self.told += 1
                    info = await client.teacher("fake")
                    continue
                except TeacherWireError as error:
                    self.troubles.append(error)
                    return
                assert len(seen) == 16
                self.done[info.fingerprint] += 1


async def status_of(client, name):
    """Of a teacher. On a busy machine the cluster state may be late; it is asked again, as `status --watch` does."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(UnavailableError):
                return next(teacher for teacher in (await client.server_status()).teachers if teacher.name == name)
            await asyncio.sleep(0.2)


async def test_new_weights_replace_old_ones_while_texts_are_written(server):
    writers, mark = Writers(server.address), len(server.log())
    server.config["teachers"][0]["backend"]["seed"] = 1
    async with writers.asking(6):
        await until(lambda: writers.done[fingerprint(0)] >= 6)
        server.config_file.write_text(yaml.safe_dump(server.config))
        await until(lambda: "fake: the new version is up" in server.log()[mark:], 120)
        await until(lambda: writers.done[fingerprint(1)] >= 6)
    assert writers.troubles == []
    assert set(writers.done) == {fingerprint(0), fingerprint(1)}
    assert writers.told == 6, "each was told once, before a call, when the weights it had named were gone"


async def test_a_killed_replica_costs_no_call(server):
    writers = Writers(server.address)
    async with writers.asking(6), TeacherClient(server.address) as client:
        before = (await status_of(client, "fake")).retries
        await until(lambda: writers.done.total() >= 6)
        titles = {process: process.cmdline() for process in psutil.Process(server.process.pid).children(recursive=True)}
        replicas = [
            process for process, title in titles.items() if title and "ServeReplica:lyceum-teacher-fake" in title[0]
        ]
        assert len(replicas) >= 2, titles
        replicas[0].send_signal(signal.SIGKILL)
        after = writers.done.total()
        await until(lambda: writers.done.total() >= after + 12)

        async def asked_again():
            return (await status_of(client, "fake")).retries > before

        await until(asked_again)
    assert writers.troubles == [] and writers.told == 0


async def write(client, info, stop, tenant_tokens=None, name=""):
    """Calls of 16 samples, one after another."""
    spec = SamplingSpec(samples=16, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    while not stop.is_set():
        count = 0
        async for sample in client.generate(info, spec, PromptBatch.pack([[3]])):
            count += 1
            if tenant_tokens is not None:
                tenant_tokens[name] += 1 + len(sample.token_ids_n)
        assert count == 16


async def test_tenants_are_written_for_by_weight(server):
    tokens, stop = Counter(), asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        tasks = []
        for name in ("light", "heavy"):
            client = TeacherClient(server.address, credentials=Credentials(tenant=name), retry_for_s=60)
            client = await stack.enter_async_context(client)
            info = await client.teacher("scribe")
            # Who is served more is sooner done: with as many calls as `light` there would be moments in which nothing of `heavy` waits. On a slow
            # host a call takes its time to begin anew.
            writers = 8 if name == "light" else 24
            tasks += [asyncio.create_task(write(client, info, stop, tokens, name)) for _ in range(writers)]
        try:
            await until(lambda: tokens["light"] >= 40 * (NEW_TOKENS + 1))  # both are there, the queue is deep
            first = Counter(tokens)
            await until(lambda: tokens["light"] - first["light"] >= 120 * (NEW_TOKENS + 1))
            grown = {name: tokens[name] - first[name] for name in tokens}
            status = await client.server_status()  # as `heavy` sees it, which may see all
        finally:
            stop.set()
            await asyncio.gather(*tasks)
    assert grown["heavy"] / grown["light"] == pytest.approx(3.0, rel=0.1)
    served = {tenant.name: tenant.served_tokens for tenant in status.tenants}
    assert served["heavy"] > 2 * served["light"] > 0
    scribe = next(teacher for teacher in status.teachers if teacher.name == "scribe")
    assert scribe.generate_running and scribe.generate_waiting and scribe.generated_tokens > 0
    assert scribe.latencies and {"first_chunk"} <= {latency.stage for latency in scribe.latencies}


async def test_replicas_come_and_go_with_what_waits_to_be_written(server):
    troubles = []
    async with TeacherClient(server.address, retry_for_s=0, on_trouble=troubles.append) as client:
        info = await client.teacher("scribe")

        async def replicas():
            return (await status_of(client, "scribe")).replicas

        async def two():
            return await replicas() == 2

        async def one():
            return await replicas() == 1

        busy, calm = asyncio.Event(), asyncio.Event()
        crowd = [asyncio.create_task(write(client, info, busy)) for _ in range(40)]
        try:
            await until(two, 120)
            crowd += [asyncio.create_task(write(client, info, calm)) for _ in range(2)]
            busy.set()
            await until(one, 120)
            await asyncio.sleep(1)  # the last one has been drained too
        finally:
            busy.set(), calm.set()
            await asyncio.gather(*crowd)
    assert troubles == []


async def test_a_replica_that_has_lost_its_device_is_replaced_and_students_see_a_pause(server):
    failures, spec = [], spec_of("hidden", 64)
    fake = FakeTeacher()
    async with (
        TeacherClient(server.address, on_trouble=failures.append) as client,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watched = []

        async def watch():
            async for reply in health.Watch(health_pb2.HealthCheckRequest(service=f"{SERVICE}/breaking")):
                watched.append(reply.status)

        watching = asyncio.create_task(watch())
        info = await client.teacher("breaking")
        for number in range(7):  # every replica answers two, and says "CUDA error" from then on
            batch = TokenBatch.pack([[number, 1, 2, 3]])
            answer = await client.score(info, spec, batch)
            assert (answer["hidden_ND"].array == fake.signals(spec, batch)["hidden_ND"].array).all()
        teacher = await status_of(client, "breaking")
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        others = await health.Check(health_pb2.HealthCheckRequest(service=f"{SERVICE}/fake"))
    assert not [error for error in failures if type(error).__name__ != "UnavailableError"]
    assert teacher.given_up >= 3 and teacher.failed_forwards >= 3
    assert "CUDA error" in teacher.message
    said = health_pb2.HealthCheckResponse
    assert said.NOT_SERVING in watched and watched[0] == said.SERVING
    assert others.status == said.SERVING
