"""Real servers: `teacher-server up` as a user starts it, on Ray Serve, in processes of its own."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from student_trainer.teachers.embedded import free_port

__all__ = ["free_port"]

START_LIMIT_S = 180
# For Ray Serve: a replica that cannot start is tried once and not three times. What our code does then is the same, and seconds earlier.
TRIED_ONCE = {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"}


class Server:
    """A running `teacher-server up`."""

    def __init__(self, folder: Path, config: dict) -> None:
        self.port = config["edge"]["port"]
        self.address = f"127.0.0.1:{self.port}"
        self.config_file = folder / "server.yaml"
        self.config_file.write_text(yaml.safe_dump(config))
        self.log_file = folder / "server.log"
        self.process: subprocess.Popen | None = None

    def start(self, **env: str) -> Server:
        with self.log_file.open("w") as log:
            command = [sys.executable, "-m", "teacher_server.cli", "up", str(self.config_file)]
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **env},
            )
        deadline = time.monotonic() + START_LIMIT_S
        while "ready" not in self.log():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        return self

    def log(self) -> str:
        return self.log_file.read_text()

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self, number: int = signal.SIGINT, limit_s: float = 60) -> int:
        if self.is_running():
            self.process.send_signal(number)
        return self.process.wait(timeout=limit_s)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def server_config(*teachers: dict, **edge) -> dict:
    return {
        "edge": {"port": free_port(), "drain_s": 10, **edge},
        "ray": {"num_cpus": 2, "object_store_mb": 100},
        "teachers": list(teachers),
    }


def transformers_teacher(name: str, model: Path, **changes) -> dict:
    backend = {"kind": "transformers", "model": str(model), "dtype": "float32", "device": "cpu", "threads": 1}
    return {"name": name, "num_cpus": 0.2, "backend": backend, **changes}


@contextlib.contextmanager
def serving(folder: Path, config: dict, **env: str):
    server = Server(folder, config).start(**env)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def _teachers(tmp_path_factory, model_factory):
    model = model_factory("qwen2", seed=5, hidden=48)
    config = server_config(
        transformers_teacher("exact", model, deterministic=True),
        transformers_teacher("shared", model),
        store={"memory_mb": 0},  # every answer is computed
    )
    server = Server(tmp_path_factory.mktemp("server"), config)
    server.model = model
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def teachers(_teachers, request):
    """One server with two teachers of the same weights: `exact` is deterministic, `shared` batches across callers.

    It runs from the first test that asks for it as long as the next one does too; a Ray that nobody asks takes a tenth of a core.
    """
    request.session.stash[_SERVER] = _teachers
    return _teachers if _teachers.is_running() else _teachers.start()


_SERVER = pytest.StashKey[Server]()
_HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if "teachers" in item.fixturenames and "teachers" not in getattr(nextitem, "fixturenames", ()):
        server = item.session.stash.get(_SERVER, None)
        if server is not None and server.is_running():
            server.stop()


def pytest_collection_modifyitems(items):
    """Of this folder the tests that ask `teachers` come first, one behind the other; all others keep their order."""
    places = [number for number, item in enumerate(items) if _HERE in item.path.parents]
    ours = sorted((items[number] for number in places), key=lambda item: "teachers" not in item.fixturenames)
    for number, item in zip(places, ours, strict=True):
        items[number] = item


def call_cli(capsys, monkeypatch, *arguments, house="student_trainer") -> tuple[int, str]:
    """A command in this process: exit code and what it wrote to stderr; seconds faster than a new one."""
    cli = importlib.import_module(f"{house}.cli.main")
    monkeypatch.setattr(sys, "argv", [house.replace("_", "-"), *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()  # of whoever was here before
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


def run_cli(*arguments, house="student_trainer", timeout=240, env=None, **options) -> subprocess.CompletedProcess:
    """A command as a user types it; `env` is added to ours."""
    env = {**os.environ, "COLUMNS": "200", **(env or {})}
    command = [sys.executable, "-m", f"{house}.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=env, stdin=subprocess.DEVNULL, **options
    )
