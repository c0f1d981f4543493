"""Processes of a replica that was killed do not outlive it, and nobody else is touched."""

import signal
import subprocess
import sys

import psutil
import pytest

from teacher_server.backends import death_watch

PARENT = """
import subprocess, sys, time
from teacher_server.backends import death_watch
sleeper = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.run(['sleep', '600'])"], start_new_session=True)
death_watch.start([sleeper.pid])
print(sleeper.pid, flush=True)
time.sleep(600)
"""


def test_what_a_killed_parent_left_is_ended():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    left = psutil.Process(int(parent.stdout.readline()))
    while not (inner := left.children()):
        assert left.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone, alive = psutil.wait_procs([left, *inner], timeout=20)
    assert len(gone) == 2 and not alive


@pytest.mark.parametrize("reused", [False, True])
def test_a_pid_that_is_somebody_elses_is_left_alone(reused):
    sleeper = subprocess.Popen(["sleep", "600"])
    created = psutil.Process(sleeper.pid).create_time() - (50 if reused else 0)
    watch = [sys.executable, death_watch.__file__, f"{sleeper.pid}:{created}"]
    subprocess.run(watch, stdin=subprocess.DEVNULL, check=True)
    try:
        assert (sleeper.poll() if reused else sleeper.wait(10)) == (None if reused else -signal.SIGKILL)
    finally:
        sleeper.kill()
        sleeper.wait()
