"""s02, s10, s24: an operator's day with real servers on real Ray: foreign variables, signals to everybody, kills, and the way back."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.e2e.conftest import Server, free_port, run_cli, server_config

pytestmark = pytest.mark.ray
FAKE = {"name": "fake", "num_cpus": 0.2, "backend": {"kind": "fake"}}


def wait_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=60)
    return [process.cmdline() for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def server_of(server):
    """The process that runs under the guard."""
    return next(p for p in psutil.Process(server.process.pid).children() if "serve-under-guard" in p.cmdline())


def test_our_own_cluster_whatever_ray_address_says_and_a_signal_to_everybody(tmp_path, monkeypatch):
    """systemd sends SIGTERM to every process of a unit: Ray goes first, and nothing may hang or stay."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6399")
    server = Server(tmp_path, server_config(FAKE)).start()
    assert "RAY_ADDRESS is not used" in server.log()
    listening = next(line for line in server.log().splitlines() if "listening: " in line)
    assert f"127.0.0.1:{server.port}" in listening and "0.0.0.0" not in listening
    checked = run_cli("check", server.config_file, house="teacher_server")
    assert checked.returncode == 0 and "listens there now" in checked.stdout
    again = run_cli("up", server.config_file, house="teacher_server")
    assert again.returncode == 2 and "another teacher-server listens" in again.stderr
    family = server.processes()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0, server.log()
    assert not wait_gone(family)


def test_a_killed_server_leaves_no_process(tmp_path):
    server = Server(tmp_path, server_config(FAKE)).start()
    family = server.processes()
    server_of(server).kill()
    assert server.process.wait(timeout=60) == 1
    assert "SIGKILL" in server.log()
    assert not wait_gone(family)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Ray cluster of somebody else's making, that stays; HOST:PORT of its head."""
    folder = f"/tmp/lyceum-{os.getpid()}"  # short: Ray's sockets are below it
    os.makedirs(folder, exist_ok=True)
    monkeypatch.setenv("RAY_TMPDIR", folder)
    port = free_port()
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    options = [
        "--num-cpus=3",
        "--include-dashboard=false",
        "--object-store-memory=100000000",
        "--node-ip-address=127.0.0.1",
    ]
    subprocess.run([ray, "start", "--head", f"--port={port}", *options], check=True, capture_output=True, timeout=120)
    yield f"127.0.0.1:{port}"
    ours = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if (
                folder in line or f":{port} " in line
            ):  # the raylet's agents call themselves otherwise, but are its children
                ours += [process, *process.children(recursive=True)]
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_up_comes_back_to_a_cluster_that_it_left(tmp_path, cluster):
    other = {**FAKE, "name": "other", "backend": {"kind": "fake", "seed": 1}}
    config = {**server_config(FAKE, other), "ray": {"address": cluster}}
    server = Server(tmp_path, config).start()
    first, inner = psutil.Process(server.process.pid), server_of(server)
    first.kill()
    inner.kill()
    server.process.wait()
    third = {**FAKE, "name": "third", "backend": {"kind": "fake", "seed": 2}}
    server = Server(tmp_path, {**config, "teachers": [FAKE, third]}).start()
    log = server.log()
    assert "fake: still runs; adopted" in log and "the edge still runs; adopted" in log
    assert "other: taken away" in log
    assert "runs on this cluster already" in run_cli("up", server.config_file, house="teacher_server").stderr
    limit_s = time.monotonic() + 120
    while "third: the new version is up" not in server.log() or "other: gone" not in server.log():
        assert time.monotonic() < limit_s, server.log()
        time.sleep(0.2)
    described = run_cli("describe", "--address", server.address, house="teacher_server").stdout
    assert "third" in described and "other" not in described
    assert server.stop(limit_s=100) == 0
