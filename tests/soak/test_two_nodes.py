"""Must show 7: a Ray cluster of two machines, an edge on each, the student on a third; one machine dies; training goes on.

The machines are network namespaces (tests/soak/hosts.py). The node dies twice: by SIGKILL to all its processes, whose
connections break at once, and by losing its network without a word. Each time it comes back and is used again.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.transport.channel import Credentials
from tests.e2e.conftest import transformers_teacher
from tests.e2e.test_server_lifecycle import make_certificates
from tests.soak.hosts import Host, hosts
from tests.student_trainer.conftest import run_config
from tests.tiny import WORDS

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.environ.get("LYCEUM_SOAK"), reason="takes minutes: run make soak"),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]
PORT = 50061
ROWS, BATCH = 6000, 4
TOKENS_PER_S = 3000  # a quota, half of it at each edge, paces the student, so that it needs its teachers all the time


def write_rows(path: Path) -> Path:
    rows = [
        {"instruction": f"Go on {i}.", "input": " ".join(WORDS[i % 7 : i % 7 + 3]), "output": f"{i} " + " ".join(WORDS[: 2 + i % 6])}
        for i in range(ROWS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start_node(host: Host, head: Host, **env: str) -> None:
    where = (
        ("--head", "--port=6379", "--include-dashboard=false") if host is head else (f"--address={head.address}:6379",)
    )
    ray = Path(sys.executable).with_name("ray")
    host.start(
        ray, "start", *where, f"--node-ip-address={host.address}", "--num-cpus=1", "--object-store-memory=100000000",
        "--disable-usage-stats", "--block", log="ray.log", **env,
    )  # fmt: skip


async def wait(condition, limit_s, host, log):
    """Seconds until it holds."""
    start_s = time.monotonic()
    while not await condition():
        assert time.monotonic() - start_s < limit_s, host.read(log)[-3000:]
        await asyncio.sleep(0.5)
    return time.monotonic() - start_s


def steps(run: Path) -> int:
    log = run / "run" / "train_log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return max((entry.get("step", 0) for entry in entries), default=0)


async def test_a_node_dies_and_training_goes_on(model_factory, tmp_path, capsys):
    model = model_factory("qwen2", seed=5)
    token = secrets.token_hex(16)
    with hosts(tmp_path, "head", "node", "student") as machines:
        head, node, student = machines.values()
        ca, cert, key = make_certificates(tmp_path, f"{head.address},IP:{node.address}")
        (tmp_path / "tokens").write_text(f"lab {token}\n")
        health = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "3"}  # docs/operate/operating.md
        env = {f"RAY_health_check_{name}": value for name, value in health.items()}
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "LYCEUM_TOKEN": token}
        tls = {"cert_file": str(cert), "key_file": str(key)}
        teacher = transformers_teacher(
            "exact", model, autoscaling={"min_replicas": 2, "max_replicas": 2}, batch={"max_tokens": 512}
        )
        config = {
            "edge": {"host": "0.0.0.0", "count": 2, "port": PORT, "tls": tls, "tokens_file": str(tmp_path / "tokens")},
            "ray": {"address": f"{head.address}:6379"},
            "teachers": [{**teacher, "num_cpus": 0.6}],  # one a node
            "tenants": {"lab": {"tokens_per_s": TOKENS_PER_S, "operator": True}},
        }
        (tmp_path / "server.yaml").write_text(yaml.safe_dump(config))
        for machine in (head, node):
            start_node(machine, head, **env)

            async def joined(machine=machine):
                return "Ray runtime started" in machine.read("ray.log")

            await wait(joined, 60, machine, "ray.log")
        up = head.start(sys.executable, "-m", "teacher_server.cli", "up", tmp_path / "server.yaml", log="up.log", **env)

        async def ready():
            return "ready" in head.read("up.log")

        up_s = await wait(ready, 120, head, "up.log")
        rows = write_rows(tmp_path / "rows.jsonl")
        train = {"max_steps": 10_000, "batch_size": BATCH, "accumulation": 1, "log_steps": 1, "save_steps": 10_000}
        tree = run_config(tmp_path / "student", model, rows, f"{head.address}:{PORT}", train=train)
        tree["teacher"] = {"address": f"{head.address}:{PORT}", "name": "exact", "ca_file": str(ca), "wait_s": 30}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree))
        run = student.start(
            sys.executable, "-m", "student_trainer.cli", "train", tmp_path / "train.yaml", log="train.log", **env
        )
        told = {}
        async with TeacherClient(f"{head.address}:{PORT}", credentials=Credentials(ca_file=ca, token=token)) as client:

            async def replicas():
                (found,) = (await client.server_status()).teachers
                return found.replicas, found.replicas_wanted

            async def both():
                return await replicas() == (2, 2)

            async def lost():
                return (await replicas())[0] == 1

            def gained(more):
                before = steps(tmp_path / "student")

                async def condition():
                    assert run.poll() is None, student.read("train.log")[-3000:]
                    return steps(tmp_path / "student") >= before + more

                return condition

            await wait(both, 60, head, "up.log")
            async with TeacherClient(
                f"{node.address}:{PORT}", credentials=Credentials(ca_file=ca, token=token)
            ) as other:
                assert await other.describe() == await client.describe()
                assert {e.node for e in (await other.server_status()).edges} == {head.address, node.address}
            await wait(gained(20), 120, student, "train.log")
            for name, strike in (("killed", node.kill), ("cut off", node.cut)):
                strike()
                told[f"node {name}: steps go on after (s)"] = await wait(gained(20), 120, student, "train.log")
                told[f"node {name}: noticed after (s)"] = await wait(lost, 120, head, "up.log")
                await wait(gained(20), 60, student, "train.log")
                node.kill()
                node.plug()
                start_node(node, head, **env)
                told[f"node {name}: back with a replica after (s)"] = await wait(both, 120, head, "up.log")
                await wait(gained(20), 60, student, "train.log")
            status = await client.server_status()
        student.kill()
        up.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(up.wait, 90) == 0, head.read("up.log")[-3000:]
        log = student.read("train.log")
        with capsys.disabled():
            told |= {"up after (s)": up_s, "steps in all": steps(tmp_path / "student")}
            print("\n" + "\n".join(f"{name}: {value:.1f}" for name, value in told.items()))
            print(f"answered {status.teachers[0].answered}, failed {status.teachers[0].failed}")
            print("\n".join(line for line in head.read("up.log").splitlines()[-15:]))
        assert status.teachers[0].failed == 0
        assert "Traceback" not in log
