"""The guard of `teacher-server up`, with a small script in the server's place: who gets which signal, and what is left."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

# What the server does with its lifeline, in a file that the test reads. Its child makes a session of its own.
SERVER = """
import os, signal, subprocess, sys, time
folder, fd = sys.argv[1], int(sys.argv[-1])
signal.signal(signal.SIGTERM, lambda *_: open(folder + "/signalled", "w").close())
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(folder + "/child", "w").write(str(child.pid))
os.rename(folder + "/child", folder + "/ready")
orders = []
while order := os.read(fd, 1):
    orders.append(order.decode())
    open(folder + "/orders", "w").write("".join(orders))
    if {ends}:
        child.kill(), child.wait(), sys.exit({code})
open(folder + "/orders", "w").write("".join(orders) + "end")
child.kill()
"""
GUARD = """
import sys
from teacher_server.control import guard
sys.exit(guard.run([sys.executable, sys.argv[1], sys.argv[2]], float(sys.argv[3]), lambda text: print(text, flush=True)))
"""


def from_a_terminal():
    """Whoever runs the tests by `nohup` has SIGHUP ignored, and all that they start."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Guarded:
    def __init__(self, folder, ends="True", code=0, stop_within_s=60.0, before=from_a_terminal):
        self.folder = folder
        (folder / "server.py").write_text(textwrap.dedent(SERVER.format(ends=ends, code=code)))
        (folder / "guard.py").write_text(GUARD)
        command = [sys.executable, folder / "guard.py", folder / "server.py", folder, str(stop_within_s)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=before,
        )
        self.child = psutil.Process(int(self.wait_for("ready")))
        (self.server,) = psutil.Process(self.process.pid).children()

    def wait_for(self, name, text=""):
        for _ in range(1200):
            file = self.folder / name
            if file.exists() and text in file.read_text():
                return file.read_text()
            time.sleep(0.05)
        raise AssertionError(f"{name} did not come")

    def end(self):
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def nothing_is_left(self):
        _, alive = psutil.wait_procs([self.server, self.child], timeout=30)
        return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_is_one_order_and_none_for_the_server(tmp_path, number):
    guarded = Guarded(tmp_path)
    guarded.process.send_signal(number)  # `timeout` sends it to the process and to the group
    os.killpg(guarded.process.pid, number)
    assert guarded.end() == (0, "")
    assert guarded.wait_for("orders") == "s"
    assert not (tmp_path / "signalled").exists()
    assert guarded.nothing_is_left()


def test_a_second_signal_means_at_once(tmp_path):
    guarded = Guarded(tmp_path, ends="order == b'q'", code=130)
    guarded.process.send_signal(signal.SIGINT)
    guarded.wait_for("orders", "s")
    time.sleep(0.7)
    guarded.process.send_signal(signal.SIGINT)
    assert guarded.end()[0] == 130
    assert guarded.wait_for("orders") == "sq"


def test_a_server_that_dies_without_a_word_leaves_nothing(tmp_path):
    guarded = Guarded(tmp_path)
    guarded.server.kill()
    code, said = guarded.end()
    assert code == 1 and "SIGKILL" in said
    assert guarded.nothing_is_left()


def test_a_server_that_does_not_stop_is_ended(tmp_path):
    guarded = Guarded(tmp_path, ends="False", stop_within_s=1.0)
    guarded.process.send_signal(signal.SIGTERM)
    code, said = guarded.end()
    assert code == 1 and "did not stop in time" in said
    assert guarded.nothing_is_left()


def test_a_server_whose_guard_dies_hears_of_it(tmp_path):
    guarded = Guarded(tmp_path)
    guarded.process.kill()
    guarded.wait_for("orders", "end")
    assert guarded.nothing_is_left()


def test_a_server_that_ray_ended_while_it_stopped_is_no_failure(tmp_path):
    guarded = Guarded(tmp_path, code=7)
    guarded.process.send_signal(signal.SIGTERM)
    code, said = guarded.end()
    assert code == 0 and "could not be drained" in said


def test_what_a_user_can_mend_stays_exit_code_2(tmp_path):
    guarded = Guarded(tmp_path, code=2)
    guarded.process.send_signal(signal.SIGTERM)
    assert guarded.end()[0] == 2


def test_nohup_is_obeyed(tmp_path):
    guarded = Guarded(tmp_path, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    guarded.process.send_signal(signal.SIGHUP)
    time.sleep(0.7)
    assert guarded.process.poll() is None and not (tmp_path / "orders").exists()
    guarded.process.send_signal(signal.SIGTERM)
    assert guarded.end()[0] == 0
