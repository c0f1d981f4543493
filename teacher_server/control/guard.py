"""The process a user starts by `teacher-server up`: it runs the server in a session of its own and ends what that leaves.

Signals of a terminal, of `timeout` and of a process group reach this process alone, so that the server can drain while Ray's
daemons still live. If the server dies without a word (SIGKILL, the OOM killer, Ray giving up), everything it started is ended;
if this process dies, the server sees its lifeline close and stops by itself. No Ray here, so it cannot hang on Ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP, AT_ONCE = b"s", b"q"  # what the lifeline carries; its end means STOP too
_GRACE_S = 10.0  # for the server to end by itself after its drain, or after being told to end at once
_TERM_S = 3.0
_ONE_STOP_S = 0.5  # `timeout` and systemd send the same signal twice: to the process and to its group
_POLL_S = 0.1
_PR_SET_CHILD_SUBREAPER = 36


def run(command: Sequence[str], stop_within_s: float, say: Callable[[str], None]) -> int:
    """Runs `command --lifeline FD` in a session of its own until it ends, and ends whatever it leaves.

    Args:
        command: of the server.
        stop_within_s: how long it may take to stop once told to, in seconds; it is killed afterwards.
        say: told what the server cannot say any more.

    Returns:
        The exit code for the shell.
    """
    _adopt_orphans()
    read_fd, write_fd = os.pipe()
    stops: list[float] = []  # when a stop was asked for

    def on_signal(number: int, frame: object) -> None:
        if stops and time.monotonic() - stops[-1] < _ONE_STOP_S:
            return
        stops.append(time.monotonic())
        with contextlib.suppress(OSError):  # it is gone already
            os.write(write_fd, STOP if len(stops) == 1 else AT_ONCE)

    handle(on_signal)
    server = subprocess.Popen([*command, "--lifeline", str(read_fd)], pass_fds=(read_fd,), start_new_session=True)
    os.close(read_fd)
    try:
        killed = _wait(server, stops, stop_within_s)
        left = _end_all(server.pid)
    finally:
        os.close(write_fd)
    return _exit_code(server.returncode, asked=bool(stops), killed=killed, left=left, say=say)


def handle(action: Callable[[int, Any], object] | signal.Handlers) -> None:
    """Installs a handler of every signal that means stop; SIGHUP stays ignored where `nohup` had it so."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, action)


def _wait(server: subprocess.Popen[bytes], stops: list[float], stop_within_s: float) -> bool:
    """Waits for the server's end; whether it had to be killed."""
    while server.poll() is None:
        _reap(server.pid)
        now_s = time.monotonic()
        late = bool(stops) and now_s > stops[0] + stop_within_s
        if late or (len(stops) > 1 and now_s > stops[1] + _GRACE_S):
            server.kill()
            server.wait()
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_POLL_S)
    return False


def _reap(server: int) -> None:
    """Takes note of orphans that ended: the server waits for some of them, and a zombie seems to live."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == server:  # its exit code is for `Popen`
                return
            os.waitpid(ended.si_pid, 0)


def _exit_code(code: int, *, asked: bool, killed: bool, left: int, say: Callable[[str], None]) -> int:
    ended = f"; {left} processes it left are ended" if left else ""
    if killed:
        say(f"the server did not stop in time and was killed{ended}")
        return 1
    if asked and code not in (0, 2, 130):
        say(f"Ray ended before the server: what was under way could not be drained{ended}")
        return 0
    if code < 0:
        say(f"the server was killed by {signal.Signals(-code).name} (memory, perhaps){ended}")
        return 1
    return code


def _end_all(session: int) -> int:
    """Ends every process of the session, and every orphan that came to us; how many there were."""
    found = _left(session)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(found, timeout=_TERM_S)
    for process in _left(session):  # also those that were started meanwhile
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=_TERM_S)
    _reap(0)
    return len(found)


def _left(session: int) -> list[psutil.Process]:
    ours = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session:
                ours[process.pid] = process
    return [process for process in ours.values() if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _adopt_orphans() -> None:
    """On Linux, processes whose parent died become our children, so that none is missed, whatever session it made."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Lifeline:
    """The server's end of the pipe to its guard.

    Args:
        fd: to read from.
        stop: called, in a thread, when the server is to drain and stop: told so, or the guard is gone.
        at_once: called, in a thread, when it is to end without a drain.
    """

    def __init__(self, fd: int, stop: Callable[[], None], at_once: Callable[[], None]) -> None:
        os.set_inheritable(fd, False)
        self._pipe: IO[bytes] = os.fdopen(fd, "rb", buffering=0)
        self._stop = stop
        self._at_once = at_once
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for order in self._orders():
            if order == AT_ONCE:
                self._at_once()
            else:
                self._stop()

    def _orders(self) -> Iterator[bytes]:
        while order := self._pipe.read(1):
            yield order
        yield STOP
