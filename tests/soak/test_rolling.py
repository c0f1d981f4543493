"""Must show 6 at length: rolls there and back, replicas killed in between, load that comes and goes, a torn model; no request fails."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import pytest
import yaml

from teacher_wire.endpoint.client import TeacherClient
from tests.e2e.conftest import Server, server_config, serving
from tests.e2e.load import Crowd, until

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.environ.get("LYCEUM_SOAK"), reason="takes minutes: run make soak"),
]
ROLLS = 6
KILLS = 6
CYCLES = 3
SCALING = {"min_replicas": 1, "max_replicas": 3, "target_queued_tokens": 400, "upscale_delay_s": 0.5}
FAKE = {
    "name": "fake",
    "num_cpus": 0.1,
    "backend": {"kind": "fake", "delay_s": 0.05},
    "batch": {"max_tokens": 128},
    "autoscaling": {**SCALING, "downscale_delay_s": 1.0},
}


def replica_processes(server: Server) -> list:
    return [p for p in server.processes()[1:] if "lyceum-teacher-fake" in " ".join(p.cmdline() or [""])]


async def test_rolls_kills_and_scaling_lose_no_request(tmp_path, capsys):
    config = server_config(FAKE)
    told: dict[str, object] = {}
    with serving(tmp_path, config) as server:
        crowd = Crowd(server.address)

        def roll(seed: int, least: int) -> None:
            config["teachers"][0]["backend"]["seed"] = seed
            config["teachers"][0]["autoscaling"]["min_replicas"] = least
            server.config_file.write_text(yaml.safe_dump(config))

        async with TeacherClient(server.address) as client:

            async def replicas() -> int:
                return (await client.server_status()).teachers[0].replicas

            async def settled() -> bool:
                (teacher,) = (await client.server_status()).teachers
                return teacher.state == "running" and len(teacher.fingerprints) == 1

            for _ in range(CYCLES):
                async with crowd.asking(24):
                    await until(lambda: _is(replicas, 3))
                async with crowd.asking(1):
                    await until(lambda: _is(replicas, 1))
            told["scaled 1 -> 3 -> 1"] = f"{CYCLES} times, {crowd.tally.answered} answers"
            async with crowd.asking(6), crowd.asking(3, pinned=False):
                start_s = time.monotonic()
                for number in range(1, ROLLS + 1):
                    mark = len(server.log())
                    roll(number % 3, 2 + number % 2)
                    await until(lambda at=mark: "the new version is up" in server.log()[at:])
                    await until(settled)
                told["rolled"] = f"{ROLLS} times, {(time.monotonic() - start_s) / ROLLS:.1f} s each"
                for number in range(KILLS):
                    victim = random.Random(number).choice(replica_processes(server))
                    victim.send_signal(signal.SIGKILL)
                    before = crowd.tally.answered
                    await until(lambda at=before: crowd.tally.answered > at + 100)
                told["replicas killed"] = KILLS
        tally = crowd.tally
        with capsys.disabled():
            told |= {"answers": dict(tally.answers), "told": tally.told, "troubles": tally.troubles}
            print("\n" + "\n".join(f"{name}: {value}" for name, value in told.items()))
        assert tally.troubles == []
        assert tally.told == 6 * ROLLS, "each pinned student was told once a roll"


async def _is(count, wanted: int) -> bool:
    return await count() == wanted


async def test_torn_weights_leave_the_old_ones_serving(model_factory, tmp_path):
    """A real model: the file is there and passes the checks, and cannot be loaded."""
    import shutil

    from teacher_wire.core.batch import TokenBatch
    from teacher_wire.score.signals import spec_of
    from tests.e2e.conftest import transformers_teacher

    good = model_factory("qwen2", seed=5)
    torn = shutil.copytree(good, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:5000])
    config = server_config(transformers_teacher("exact", good))
    with serving(tmp_path, config) as server:
        async with TeacherClient(server.address, retry_for_s=0) as client:
            info = await client.teacher()
            config["teachers"][0]["backend"]["model"] = str(torn)
            server.config_file.write_text(yaml.safe_dump(config))
            batch = TokenBatch.pack([[1, 2, 3]])
            start_s = time.monotonic()
            while "the version before is up" not in server.log():
                assert (await client.score(info, spec_of("hidden", 300), batch)).fingerprint == info.fingerprint
                assert time.monotonic() - start_s < 200, server.log()
                await asyncio.sleep(0.2)
        assert "cannot be loaded" in server.log() and "going back" in server.log()
