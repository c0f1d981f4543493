"""The server beside the trainer: what it says is kept and named when something goes wrong; no proxy between the two."""

import sys

import pytest

from student_trainer.errors import RunError
from student_trainer.teachers import embedded
from student_trainer.teachers.embedded import embedded_teacher, log_folder
from teacher_wire.core.errors import UnavailableError


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(script) -> the config of a server that is that script."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = tmp_path / "teacher.yaml"
    config.write_text("")
    popen = embedded.subprocess.Popen

    def build(script):
        monkeypatch.setattr(
            embedded.subprocess,
            "Popen",
            lambda command, **more: popen([sys.executable, "-c", script, *command[5:]], **more),
        )
        return config

    return build


PORT = """
import socket, sys, time
port = int([word for word in sys.argv if word.startswith("edge.port=")][0].partition("=")[2])
ready = f"2026-11-28 14:00:00 INFO    teacher-server ready on 127.0.0.1:{port} (plain text, loopback only)"
"""
SERVES = (
    PORT
    + """
print(ready, flush=True)
sys.stdin.read()
"""
)
LATE = (
    PORT
    + """
with socket.create_server(("127.0.0.1", port)):
    print("somebody else listens", flush=True)
    time.sleep(1)
    print(ready, flush=True)
    sys.stdin.read()
"""
)


def logs():
    return sorted(log_folder().glob("teacher-*.log"))


def test_a_server_that_does_not_come_up_leaves_its_log(server):
    config = server("print('one'); print('two'); raise SystemExit(3)")
    with pytest.raises(RunError) as caught, embedded_teacher(config):
        pass
    (log,) = logs()
    assert f"ended with code 3: two (all it said: {log})" in str(caught.value)
    assert log.read_text() == "one\ntwo\n"


def test_an_error_of_the_wire_names_the_log(server):
    with pytest.raises(UnavailableError) as caught, embedded_teacher(server(SERVES)):
        raise UnavailableError("gone")
    (log,) = logs()
    assert caught.value.__notes__ == [f"the log of the embedded teacher is {log}"] and " ready on " in log.read_text()


def test_the_newest_ten_logs_are_kept(server):
    config = server(SERVES)
    log_folder().mkdir()
    for number in range(15):
        (log_folder() / f"teacher-{number:02d}.log").write_text("")
    (log_folder() / "mine.txt").write_text("")
    with embedded_teacher(config) as address:
        assert address.startswith("127.0.0.1:")
    assert len(logs()) == 10 and (log_folder() / "mine.txt").exists()


def test_a_log_that_cannot_be_written_is_one_line(server):
    config = server(SERVES)
    log_folder().write_text("a file")
    with pytest.raises(RunError, match="the log of the embedded teacher"), embedded_teacher(config):
        pass


def test_an_open_port_is_not_yet_our_server(server):
    with embedded_teacher(server(LATE)):
        (log,) = logs()
        assert [line.split()[-1] for line in log.read_text().splitlines()] == ["listens", "only)"]


def test_a_port_of_another_server_is_one_line(server):
    config = server(PORT + "print('edge.port: taken'); raise SystemExit(2)")
    with pytest.raises(RunError, match=r"ended with code 2: edge\.port: taken"), embedded_teacher(config):
        pass


@pytest.mark.parametrize(("local", "below"), [("32768\t60999\n", 32_768), ("25000 60999", 25_000), ("none", 32_768)])
def test_ports_are_none_that_the_system_hands_out(monkeypatch, tmp_path, local, below):
    (tmp_path / "range").write_text(local)
    monkeypatch.setattr(embedded, "_LOCAL_PORTS", tmp_path / "range")
    assert all(20_000 <= embedded.free_port() < below for _ in range(50))


def test_a_machine_that_hands_out_every_port_still_gives_one(monkeypatch, tmp_path):
    (tmp_path / "range").write_text("1024 65000")
    monkeypatch.setattr(embedded, "_LOCAL_PORTS", tmp_path / "range")
    assert embedded.free_port() > 0
