"""A teacher server started beside the trainer, for one command on one machine: the same server, in a child process.

In: a teacher-server config; out: its address while the block runs. It never imports the teacher's house; without
the teacher extra it says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from student_trainer.errors import ConfigError, RunError

START_LIMIT_S = 600.0
_STOP_LIMIT_S = 60.0


@contextlib.contextmanager
def embedded_teacher(config: Path) -> Iterator[str]:
    """Runs `teacher-server up` on a free loopback port until the block ends.

    Raises:
        ConfigError: no such file, or the teacher extra is not installed.
        RunError: the server did not come up; holds its last line.
    """
    if not config.is_file():
        raise ConfigError(f"teacher.embedded {config}: no such file")
    if importlib.util.find_spec("teacher_server") is None or importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "teacher.embedded needs the teacher extra: pip install 'lyceum[teacher]', or set teacher.address"
        )
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "teacher_server.cli",
        "up",
        "--until-stdin-closes",
        str(config),
        f"edge.port={port}",
        "edge.host=127.0.0.1",
    ]
    with tempfile.TemporaryFile("w+") as log:
        # A session of its own: Ctrl-C reaches the trainer first, which then stops the server in order.
        # The pipe closes even when we are killed without a word: then the server goes too.
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE, start_new_session=True)
        try:
            _wait_until_open(process, port, log)
            yield f"127.0.0.1:{port}"
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_open(process: subprocess.Popen[bytes], port: int, log: object) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunError(f"the embedded teacher ended with code {process.returncode}: {_last_line(log)}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise RunError(f"the embedded teacher did not come up in {START_LIMIT_S:.0f} s: {_last_line(log)}")


def _last_line(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    lines = [line for line in log.read().splitlines() if line.strip()]  # type: ignore[attr-defined]
    return lines[-1] if lines else "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
