"""Many students, one teacher of known speed on Ray Serve: shares, quotas, overload, slow and frozen students.

By hand: `make soak`. The teacher is the fake of the wire at 10,000 tokens per second, so that capacity is known and two cores are
enough for everybody; requests are 512 tokens, one forward pass each.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import yaml

from teacher_wire.core.batch import TokenBatch
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from tests.e2e.conftest import run_cli, server_config, serving

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif("LYCEUM_SOAK" not in os.environ, reason="minutes of load: make soak"),
]

RATE = 10_000
REQUEST = 512


def fake_teacher(**changes):
    backend = {"kind": "fake", "tokens_per_s": RATE}
    batch = {"max_tokens": REQUEST, "max_queue_tokens": 1_000_000}
    return {"name": "fake", "num_cpus": 0.2, "backend": backend, "batch": batch, **changes}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    config = server_config(fake_teacher(), keepalive_s=3, keepalive_timeout_s=2)
    config["edge"]["store"] = {"memory_mb": 0}
    with serving(tmp_path_factory.mktemp("soak"), config) as running:
        running.config = config
        yield running


def set_tenants(server, tenants):
    server.config["tenants"] = tenants
    server.config_file.write_text(yaml.safe_dump(server.config))
    time.sleep(4)  # the file is looked at once a second, and reports travel once a second


def status(server):
    done = run_cli("status", "--address", server.address, "--json", house="teacher_server")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def open_streams(server):
    return sum(edge["open_streams"] for edge in status(server)["edges"])


class Load:
    """Students in a process of their own."""

    def __init__(self, address, **options):
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.load", address, *arguments], stdout=subprocess.PIPE, text=True
        )

    def result(self):
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0
        return json.loads(out)


def median_s(result, after_s=0.0):
    return statistics.median(took for when, took in result["latencies"] if when >= after_s)


def test_a_flood_of_one_leaves_the_other_its_latency(server):
    set_tenants(server, {})
    solo = Load(server.address, tenant="b", seconds=10).result()
    flood = Load(server.address, tenant="a", streams=100, depth=2, seconds=22, seed=1)
    time.sleep(6)
    beside = Load(server.address, tenant="b", seconds=10, seed=2).result()
    flooded = flood.result()
    print(
        f"\nB alone {median_s(solo) * 1e3:.0f} ms, beside 100 streams {median_s(beside) * 1e3:.0f} ms; A {len(flooded['latencies'])} answers"
    )
    assert not flooded["errors"] and not beside["errors"]
    assert median_s(beside) <= 2 * median_s(solo)


def test_weights_are_kept_under_saturation(server):
    set_tenants(server, {"a": {"weight": 3.0}, "b": {"weight": 1.0}})
    loads = [Load(server.address, tenant=name, streams=4, depth=8, seconds=30, seed=ord(name)) for name in "ab"]
    a, b = (load.result() for load in loads)
    print(f"\nserved tokens 3:1 -> {a['tokens'] / b['tokens']:.2f}:1")
    assert a["tokens"] / b["tokens"] == pytest.approx(3, rel=0.1)


def test_a_quota_is_exact(server):
    quota = 4000
    set_tenants(server, {"a": {"tokens_per_s": quota}})
    before = time.time()
    result = Load(server.address, tenant="a", streams=2, depth=4, seconds=36, seed=5).result()
    first = min(when for when, _ in result["latencies"])
    in_window = sum(first + 2 <= when < first + 32 for when, _ in result["latencies"]) * REQUEST
    print(
        f"\nquota {quota} tokens/s over 30 s: {in_window / 30:.0f}; refusals shown {sum(result['troubles'].values())}; started {first - before:.1f} s"
    )
    assert in_window / 30 == pytest.approx(quota, rel=0.05)
    assert set(result["troubles"]) == {"OverloadedError"} and not result["errors"]


def memory_mb(server):
    return sum(process.memory_info().rss for process in server.processes()) / 2**20


def test_overload_by_ten(tmp_path):
    rate = RATE // 2  # so that a load generator on the same two cores reaches ten times of it
    teacher = fake_teacher(batch={"max_tokens": REQUEST, "max_queue_tokens": 2 * rate})
    teacher["backend"] = {"kind": "fake", "tokens_per_s": rate}
    config = server_config(teacher)
    config["edge"]["store"] = {"memory_mb": 0}
    with serving(tmp_path, config) as server:
        before = Load(server.address, seconds=8).result()
        # 200 students who ask again a third of a second after a refusal.
        flood = Load(server.address, streams=20, depth=10, seconds=60, impatient=0.35, seed=9)
        sizes = []
        while flood.process.poll() is None:
            sizes.append(memory_mb(server))
            time.sleep(2)
        flooded, ended = flood.result(), time.time()
        time.sleep(max(0.0, 5 - (time.time() - ended)))
        after = Load(server.address, seconds=8, seed=10).result()
    goodput = flooded["tokens"] / 60
    asked = flooded["tokens"] + sum(flooded["errors"].values()) * REQUEST
    print(
        f"\nasked {asked / 60 / rate:.1f} times capacity; goodput {goodput / rate:.0%}; errors {flooded['errors']}; "
        f"memory {sizes[2]:.0f} -> {max(sizes):.0f} MiB; latency {median_s(before) * 1e3:.0f} -> {median_s(after) * 1e3:.0f} ms"
    )
    assert set(flooded["errors"]) == {"OverloadedError"}
    assert asked >= 10 * rate * 60
    assert goodput >= 0.8 * rate
    assert max(sizes) < sizes[2] + 200
    assert median_s(after) <= 1.5 * median_s(before)


def test_a_frozen_student_frees_its_slots_and_nobody_else_notices(server):
    set_tenants(server, {})
    alone = Load(server.address, tenant="b", seconds=8, seed=30).result()
    frozen = Load(server.address, tenant="a", streams=10, depth=2, seconds=100, seed=31)
    time.sleep(6)
    assert open_streams(server) == 10
    os.kill(frozen.process.pid, signal.SIGSTOP)
    stopped = time.time()
    beside = Load(server.address, tenant="b", seconds=15, seed=32)
    while open_streams(server) > 1 and time.time() < stopped + 60:
        time.sleep(0.2)
    freed_s = time.time() - stopped
    result = beside.result()
    frozen.process.kill()
    frozen.process.wait()
    print(
        f"\nslots free after {freed_s:.1f} s; B {median_s(alone) * 1e3:.0f} ms alone, {median_s(result, stopped + freed_s) * 1e3:.0f} ms afterwards"
    )
    assert freed_s < 15
    assert not result["errors"]
    assert median_s(result, stopped + freed_s) <= 1.5 * median_s(alone)


async def test_a_slow_reader_stops_its_own_production(server):
    """It opens a window of four replies, asks for sixty, and reads nothing: the rest are never computed."""
    set_tenants(server, {})
    before = status(server)["teachers"][0]["forward_tokens"]
    spec = spec_of("full", 64)
    batch = lambda n: TokenBatch.pack([[(n + i * i) % 64 for i in range(REQUEST)]])  # noqa: E731
    reply = (REQUEST - 1) * (8 + 64 * 4)
    async with TeacherClient(server.address, window_bytes=4 * reply) as client:
        info = await client.teacher()
        client._requests._take = lambda down: None  # nothing is taken out of the window
        tasks = [asyncio.create_task(client.score(info, spec, batch(n))) for n in range(60)]
        await asyncio.sleep(10)
        made = (status(server)["teachers"][0]["forward_tokens"] - before) / REQUEST
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print(f"\n60 asked, window of 4: {made:.0f} made")
    assert 1 <= made <= 4
