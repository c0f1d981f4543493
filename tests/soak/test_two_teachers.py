"""Must show 7 of issue 17: two teachers in two network namespaces, one of them behind TLS and a token, and a student of both in a third.

The machines are those of tests/soak/hosts.py; each teacher is a `teacher-server up` with a Ray of its own. No server listens to other machines in plain text: the other teacher
knows the student by a certificate, and each machine has an authority of its own. With another token, or in plain text, there is one line and no run.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import transformers_teacher
from tests.e2e.test_server_lifecycle import make_certificates
from tests.soak.hosts import Host, hosts
from tests.soak.test_two_nodes import wait
from tests.student_trainer.conftest import run_config
from tests.tiny import WORDS

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not os.environ.get("LYCEUM_SOAK"), reason="takes minutes: run make soak"),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]
PORT, STEPS = 50071, 12


def write_rows(path: Path) -> Path:
    rows = [{"instruction": f"Go on {i}.", "output": f"{i} " + " ".join(WORDS[: 2 + i % 6])} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start_server(host: Host, model: Path, **edge: object):
    """`teacher-server up` on that machine, with a teacher called `exact`."""
    config = {
        "edge": {"host": "0.0.0.0", "port": PORT, **edge},
        "ray": {"num_cpus": 1, "object_store_mb": 100},
        "teachers": [{**transformers_teacher("exact", model, deterministic=True), "num_cpus": 0.2}],
    }
    (host.folder / "server.yaml").write_text(yaml.safe_dump(config))
    return host.start(sys.executable, "-m", "teacher_server.cli", "up", host.folder / "server.yaml", log="up.log")


def authority(host: Host) -> tuple[str, dict]:
    """The certificate of an authority of that machine's own, and the settings of an edge with a certificate of it."""
    ca, cert, key = make_certificates(host.folder, host.address)
    return str(ca), {"tls": {"cert_file": str(cert), "key_file": str(key)}}


async def train(host: Host, file: Path, log: str, **env: str) -> int:
    """Exit code of `student-trainer train` on that machine."""
    run = host.start(sys.executable, "-m", "student_trainer.cli", "train", file, log=log, COLUMNS="200", **env)
    return await asyncio.to_thread(run.wait, 240)


async def test_a_student_of_two_machines(model_factory, tmp_path):
    first, second = model_factory("qwen2", seed=5), model_factory("qwen2", seed=6)
    token = secrets.token_hex(16)
    with hosts(tmp_path, "known", "guarded", "student") as machines:
        known_by_certificate, guarded, student = machines.values()
        (tmp_path / "tokens").write_text(f"lab {token}\n")
        ca, guard = authority(guarded)
        guard["tokens_file"] = str(tmp_path / "tokens")
        known_ca, known = authority(known_by_certificate)
        client_ca, client_cert, client_key = map(str, make_certificates(student.folder, student.address))
        known["tls"]["client_ca_file"] = client_ca
        servers = [start_server(known_by_certificate, first, **known), start_server(guarded, second, **guard)]
        for host, server in zip((known_by_certificate, guarded), servers, strict=True):

            async def ready(host=host, server=server):
                assert server.poll() is None, host.read("up.log")[-3000:]
                return "ready" in host.read("up.log")

            await wait(ready, 180, host, "up.log")
        sections = {"train": {"max_steps": STEPS, "accumulation": 1, "log_steps": 1, "save_steps": 0}}
        tree = run_config(tmp_path / "trained", first, write_rows(tmp_path / "rows.jsonl"), **sections)
        del tree["teacher"], tree["data"]["eval"]
        of_guarded = {
            "name": "exact", "alias": "guarded", "address": f"{guarded.address}:{PORT}", "weight": 0.4, "labels": "top_k",
            "ca_file": ca, "token_env": "GUARDED_TOKEN", "wait_s": 30,
        }  # fmt: skip
        of_known = {
            "name": "exact", "alias": "known", "address": f"{known_by_certificate.address}:{PORT}", "weight": 0.6, "wait_s": 30,
            "ca_file": known_ca, "cert_file": client_cert, "key_file": client_key,
        }  # fmt: skip

        def config(name: str, **changed: object) -> Path:
            file = tmp_path / name
            guarded_as = {key: value for key, value in (of_guarded | changed).items() if value is not None}
            file.write_text(yaml.safe_dump(tree | {"teachers": [of_known, guarded_as]}))
            return file

        for name, env, changed in (
            ("no token", {"GUARDED_TOKEN": ""}, {}),
            ("another token", {"GUARDED_TOKEN": "0" * 32}, {}),
            ("plain text", {"GUARDED_TOKEN": token}, {"ca_file": None, "wait_s": 3}),
        ):
            log = f"{name.replace(' ', '-')}.log"
            code = await train(student, config("refused.yaml", **changed), log, **env)
            told = student.read(log)
            assert code == 2, (name, told)
            assert "Traceback" not in told
            assert not (tmp_path / "trained" / "run").exists(), name
        code = await train(student, config("both.yaml"), "both.log", GUARDED_TOKEN=token)
        assert code == 0, student.read("both.log")[-3000:]
        run = tmp_path / "trained" / "run"
        log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
        steps = [entry for entry in log if "kd_loss" in entry]
        assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1))
        for entry in steps:
            assert entry["coverage.known"] == entry["coverage.guarded"] == 1
            shared = 0.6 * entry["kd_loss.known"] + 0.4 * entry["kd_loss.guarded"]
            assert entry["kd_loss"] == pytest.approx(shared, rel=1e-4)
        ledger = (run / "teachers.jsonl").read_text()
        assert ledger.count("known") >= STEPS and ledger.count("guarded") >= STEPS
        assert token not in ledger + (run / "config.yaml").read_text() + (run / "run.json").read_text()
