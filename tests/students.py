"""`student-trainer` in processes of their own, forked from one that has loaded its libraries: each start costs 9 CPU seconds less.

In: arguments, folder, environment and where the output goes; out: what `subprocess.Popen` gives, as far as tests need it. A forked command has
its own process id, output, signals, exit code and end of the interpreter; what it shares with the others is what a start gives to all
alike, the imported modules. Must never run anything in the host itself: it has one thread and has opened nothing when it forks.

What is about a start (a fresh interpreter, its hash seed, a variable that libraries read while they are loaded) is for a real one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
HOST = "LYCEUM_STUDENTS_HOST"  # for scripts that a test starts: `run_as_python` beneath them asks the test's own host


def _ready(files: list[Any], limit_s: float | None) -> list[Any]:
    """Those that can be read within the time; descriptors may be above 1,023, which select refuses."""
    with selectors.PollSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(limit_s)]


class StudentProcess:
    """A running command, as `subprocess.Popen` gives it.

    Attributes:
        pid: of the command itself.
        returncode: None while it runs; minus the signal that ended it.
    """

    def __init__(self, connection: socket.socket, stdout: int | None, stderr: int | None) -> None:
        self._connection = connection
        self._word = b""
        self._read_line(None)
        self.pid, self.returncode = int(self._word), None
        self._word = b""
        self._pipes = [stdout, stderr]

    def _read_line(self, limit_s: float | None) -> bool:
        """Whether the host has said a whole line within the time; a host that is gone is an error."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while not self._word.endswith(b"\n"):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not _ready([self._connection], left):
                return False
            said = self._connection.recv(64)
            if not said:
                raise RuntimeError("the process that starts students has ended")
            self._word += said
        return True

    def poll(self) -> int | None:
        if self.returncode is None and self._read_line(0):
            self._ended()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._read_line(timeout):
                raise subprocess.TimeoutExpired("student-trainer", timeout or 0)
            self._ended()
        assert self.returncode is not None
        return self.returncode

    def _ended(self) -> None:
        self.returncode = int(self._word)
        self._connection.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to its pipes, when it has ended; "" for what went elsewhere."""
        deadline = None if timeout is None else time.monotonic() + timeout
        found = {pipe: bytearray() for pipe in self._pipes if pipe is not None}
        open_pipes = set(found)
        while open_pipes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = _ready(list(open_pipes), left)
            if not ready:
                raise subprocess.TimeoutExpired("student-trainer", timeout or 0)
            for pipe in ready:
                read = os.read(pipe, 1 << 16)
                found[pipe] += read
                if not read:
                    os.close(pipe)
                    open_pipes.remove(pipe)
        self.wait(None if deadline is None else max(1.0, deadline - time.monotonic()))
        stdout, stderr = ("" if pipe is None else found[pipe].decode() for pipe in self._pipes)
        self._pipes = [None, None]
        return stdout, stderr


def start_student(*arguments: object, stdout: int | None = None, stderr: int | None = None, cwd: Path | str | None = None, env: dict[str, str] | None = None) -> StudentProcess:  # fmt: skip
    """Starts `student-trainer ARGUMENTS`.

    Args:
        arguments: as a user types them.
        stdout, stderr: subprocess.PIPE, or None for nowhere.
        cwd: of the command; ours by default.
        env: all its variables; ours by default. Those that are not in the host must not be read while libraries are loaded.
    """
    request = {"arguments": list(map(str, arguments)), "cwd": str(cwd or Path.cwd()), "env": {**os.environ, **(env or {})}}  # fmt: skip
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_host())
    ours: list[int | None] = []
    theirs: list[int] = []
    for wanted in (stdout, stderr):
        if wanted == subprocess.PIPE:
            reads, writes = os.pipe()
        else:
            reads, writes = None, os.open(os.devnull, os.O_WRONLY)
        ours.append(reads)
        theirs.append(writes)
    socket.send_fds(connection, [b"!"], theirs)
    for number in theirs:
        os.close(number)
    connection.sendall(json.dumps(request).encode() + b"\n")
    return StudentProcess(connection, *ours)


def run_student(*arguments: object, timeout: float = 240, cwd: Path | str | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Runs `student-trainer ARGUMENTS` to its end; see `start_student`. A command that takes longer than `timeout` seconds is killed."""
    process = start_student(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=env)
    try:
        stdout, stderr = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(["student-trainer", *map(str, arguments)], process.wait(), stdout, stderr)


def run_as_python(folder: Path) -> dict[str, str]:
    """Variables for a script that calls `$PYTHON`: a program in `folder` that is Python but for `-m student_trainer.cli`, which is forked."""
    program = folder / "python"
    program.write_text(
        f"""#!/bin/sh
if [ "$1 $2" = "-m student_trainer.cli" ]; then shift 2; exec {sys.executable} {__file__} run "$@"; fi
exec {sys.executable} "$@"
"""
    )
    program.chmod(0o755)
    return {"PYTHON": str(program), HOST: _host()}


@functools.cache
def _host() -> str:
    """The address of this process's host, which ends with it; or of the host of a process above this one, if that has told it."""
    if HOST in os.environ:
        return os.environ[HOST]
    folder = tempfile.mkdtemp(prefix="students-")
    address = os.path.join(folder, "host")
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "proto"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}  # it makes threads while it is loaded
    host = subprocess.Popen(
        [sys.executable, "-m", "tests.students", address], stdin=subprocess.PIPE, cwd=_ROOT, env=env
    )

    def end() -> None:
        host.kill()
        host.wait()
        with contextlib.suppress(OSError):
            os.unlink(address)
            os.rmdir(folder)

    atexit.register(end)
    deadline = time.monotonic() + 120
    while not os.path.exists(address):
        assert host.poll() is None and time.monotonic() < deadline, "the process that starts students did not come up"
        time.sleep(0.05)
    return address


# ------------------------------------------------------------------ the host


def _serve(address: str) -> list[str]:
    """Forks for every request until our parent ends; returns in the forked process alone, with the command's arguments."""
    import threading

    import student_trainer.cli.main
    import student_trainer.training.label_ahead
    import student_trainer.training.run  # noqa: F401

    assert threading.active_count() == 1, "a fork would lose a thread"
    gc.collect()
    gc.freeze()  # a collector that looks at what is shared would copy its pages
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(16)
    os.rename(f"{address}.new", address)
    while True:
        ready = _ready([listener, 0], None)
        if 0 in ready:  # the pipe that our parent holds
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _begin(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):  # those that have waited for commands that are over
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _begin(connection: socket.socket) -> list[str]:
    """Becomes the parent of the command, which tells how it ended; returns in the command."""
    _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
    text = b""
    while not text.endswith(b"\n"):
        read = connection.recv(1 << 16)
        if not read:
            os._exit(1)
        text += read
    pid = os.fork()
    if pid:
        for number in (0, 1, 2, *outputs):
            os.close(number)
        with contextlib.suppress(OSError):
            connection.sendall(b"%d\n" % pid)
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    connection.close()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, to in ((nothing, 0), (outputs[0], 1), (outputs[1], 2)):
        os.dup2(number, to)
        os.close(number)
    request = json.loads(text)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    atexit.register(gc.unfreeze)  # some libraries tell of what is left at the end
    return request["arguments"]


if __name__ == "__main__" and sys.argv[1] == "run":  # as `run_as_python` has it
    done = run_student(*sys.argv[2:], timeout=800)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    sys.exit(done.returncode)
if __name__ == "__main__":
    sys.argv = ["student-trainer", *_serve(sys.argv[1])]
    runpy.run_module("student_trainer.cli", run_name="__main__", alter_sys=True)
