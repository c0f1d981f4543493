"""A teacher server started beside the trainer, for one command on one machine: the same server, in a child process.

In: a teacher-server config; out: its address while the block runs. It never imports the teacher's house; without
the teacher extra it says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from student_trainer.errors import ConfigError, RunError
from teacher_wire.core.errors import TeacherWireError

START_LIMIT_S = 600.0
_STOP_LIMIT_S = 60.0
_KEPT_LOGS = 10
# Above the ports that Ray gives its workers, below those that Linux hands out on request (32,768 and above).
_PORTS = range(20_000, 32_768)
_LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextlib.contextmanager
def embedded_teacher(config: Path) -> Iterator[str]:
    """Runs `teacher-server up` on a free loopback port until the block ends; the block starts when the server says that it serves there.

    What it writes is kept in `log_folder()`; an error inside the block that the server may have caused names the file in a note.

    Raises:
        ConfigError: no such file, or the teacher extra is not installed.
        RunError: the server did not come up; holds its last line and the path of its log.
    """
    config = config.expanduser()
    if not config.is_file():
        raise ConfigError(f"teacher.embedded {config}: no such file")
    if importlib.util.find_spec("teacher_server") is None or importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "teacher.embedded needs the teacher extra: pip install 'lyceum-distill[teacher]', or set teacher.address"
        )
    port = free_port()
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
    path = _new_log()
    with path.open("w+") as log:
        # A session of its own: Ctrl-C reaches the trainer first, which then stops the server in order.
        # The pipe closes even when we are killed without a word: then the server goes too.
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE, start_new_session=True)
        try:
            _wait_until_ready(process, f"127.0.0.1:{port}", path)
            yield f"127.0.0.1:{port}"
        except TeacherWireError as error:
            error.add_note(f"the log of the embedded teacher is {path}")
            raise
        finally:
            _stop(process)


def log_folder() -> Path:
    """Where embedded teachers of this user write, the newest ten of them."""
    return Path(tempfile.gettempdir()) / f"lyceum-{os.getuid()}"


def _new_log() -> Path:
    """An empty file for what a server writes; the oldest of the others go."""
    folder = log_folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        before = sorted(folder.glob("teacher-*.log"), key=lambda path: path.stat().st_mtime)
        for path in before[: max(0, len(before) - _KEPT_LOGS + 1)]:
            path.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(prefix=time.strftime("teacher-%Y%m%d-%H%M%S-"), suffix=".log", dir=folder)
    except OSError as error:
        raise RunError(f"the log of the embedded teacher: {error.filename or folder}: {error.strerror}") from error
    os.close(handle)
    return Path(name)


def free_port() -> int:
    """A loopback port for a server that takes seconds to start: none of those that the system hands out meanwhile.

    A port of the system's own range is free now and the near end of somebody's connection, or one of Ray's many
    servers, before ours listens on it.
    """
    first = _first_local_port()
    tried = [port for port in _PORTS if port < first]
    for port in random.SystemRandom().sample(tried, min(100, len(tried))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:  # a machine whose own range begins below ours
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_local_port() -> int:
    try:
        return int(_LOCAL_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _PORTS.stop


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Waits for the server's own word: an open port may be anybody's."""
    deadline = time.monotonic() + START_LIMIT_S
    word = f" ready on {address} ("
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunError(f"the embedded teacher ended with code {process.returncode}: {_last_line(log)}")
        if word in log.read_text(errors="replace"):
            return
        time.sleep(0.2)
    raise RunError(f"the embedded teacher did not come up in {START_LIMIT_S:.0f} s: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it said nothing'} (all it said: {log})"


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
