"""Must show 9: up, down, up again; what a wrong config says; who may come in."""

import asyncio
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import AuthenticationError, UnavailableError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.transport.channel import Credentials
from tests.e2e.conftest import TRIED_ONCE, Server, call_cli, run_cli, server_config, serving, transformers_teacher

pytestmark = pytest.mark.ray
SPEC = spec_of("hidden", 64)
FAKE = {"name": "fake", "num_cpus": 0.2, "backend": {"kind": "fake", "delay_s": 0.05}}


async def load(address, until, answered, refused):
    """Requests one after another, until told to stop."""
    async with TeacherClient(address, retry_for_s=0, on_trouble=lambda error: None) as client:
        info = await client.teacher()
        while not until.is_set():
            try:
                answered.append(await client.score(info, SPEC, TokenBatch.pack([[1, 2, 3], [4, 5]])))
            except UnavailableError as error:
                refused.append(error)
                return


def end_under_load(server, number):
    """Ends a server that eight students ask without pause, and asserts that each was told and nothing is left."""

    async def scene():
        until, answered, refused = asyncio.Event(), [], []
        clients = [asyncio.create_task(load(server.address, until, answered, refused)) for _ in range(8)]
        async with asyncio.timeout(60):
            while len(answered) < 8:
                await asyncio.sleep(0.05)
        family = server.processes()
        assert not refused
        code = await asyncio.to_thread(server.stop, number)
        until.set()
        await asyncio.gather(*clients)  # every other error than UNAVAILABLE comes out here
        return family, code, refused

    family, code, refused = asyncio.run(scene())
    assert code == 0, server.log()
    assert len(refused) == 8, "each client was told that the server is going"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [process.cmdline() for process in alive]


def test_ctrl_c_during_load_ends_everything_and_the_port_is_free(tmp_path):
    """By SIGINT first, and by SIGTERM the server that came up again on the same port."""
    server = Server(tmp_path, server_config(FAKE)).start()
    end_under_load(server, signal.SIGINT)
    again = server.start()
    assert run_cli("describe", "--address", again.address, house="teacher_server").returncode == 0
    end_under_load(again, signal.SIGTERM)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may still be remembered
        free.bind(("127.0.0.1", again.port))
        free.listen()


def test_a_parent_that_is_gone_while_the_server_starts_is_not_waited_for(tmp_path):
    """An embedded teacher's, killed without a word: nothing is started to its end for nobody, and nothing is left."""
    (tmp_path / "server.yaml").write_text(yaml.safe_dump(server_config(FAKE)))
    with (tmp_path / "log").open("w") as log:
        command = [
            sys.executable,
            "-m",
            "teacher_server.cli",
            "up",
            "--until-stdin-closes",
            str(tmp_path / "server.yaml"),
        ]
        up = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    while "starting Ray" not in (tmp_path / "log").read_text() and up.poll() is None:
        time.sleep(0.05)
    below = psutil.Process(up.pid).children(recursive=True)
    up.stdin.close()
    assert up.wait(120) == 130
    assert "ready on" not in (tmp_path / "log").read_text()
    assert not psutil.wait_procs(below, timeout=10)[1]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda c: c["teachers"][0].update(nmae="x"), ["teachers.0.nmae", "unknown key"]),
        (lambda c: c["teachers"][0]["backend"].update(model="/no/such/folder"), ["exact", "/no/such/folder"]),
        (lambda c: c["teachers"][0]["backend"].update(kind="magic"), ["teachers.0.backend", "magic"]),
        (lambda c: c["edge"].update(host="0.0.0.0"), ["edge", "0.0.0.0", "tls"]),
        (lambda c: c["edge"].update(port=70000), ["edge.port", "70000"]),
        (lambda c: c["teachers"].append(dict(c["teachers"][0])), ["distinct names"]),
        (lambda c: c.update(teachers=[]), ["teachers"]),
        (lambda c: c["teachers"][0].update(name="edge"), ["edge", "call the teacher otherwise"]),
        (
            lambda c: c["edge"].update(tls={"cert_file": "/no/cert", "key_file": "/no/key"}),
            ["edge.tls.cert_file", "/no/cert"],
        ),
    ],
)
def test_a_wrong_config_is_one_clear_line(model_factory, tmp_path, capsys, monkeypatch, spoil, named):
    config = server_config(transformers_teacher("exact", model_factory("qwen2")))
    spoil(config)
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump(config))
    started = run_cli("up", path, house="teacher_server")
    for code, said in (
        (started.returncode, started.stderr),
        call_cli(capsys, monkeypatch, "check", path, house="teacher_server"),
    ):
        assert code == 2, said
        (line,) = said.strip().splitlines()
        assert all(text in line for text in named), line


def test_a_teacher_that_no_machine_of_the_cluster_can_hold_is_refused(tmp_path):
    """Serve would wait for a GPU without a word."""
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump(server_config({**FAKE, "num_gpus": 1})))
    result = run_cli("up", path, house="teacher_server")
    assert result.returncode == 2
    assert "num_gpus" in result.stderr.strip().splitlines()[-1]


def test_a_taken_port_is_named(tmp_path):
    config = server_config(FAKE)
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump(config))
    with socket.socket() as other:
        other.bind(("127.0.0.1", config["edge"]["port"]))
        other.listen()
        result = run_cli("up", path, house="teacher_server")
    assert result.returncode == 2 and str(config["edge"]["port"]) in result.stderr


def test_a_model_that_fails_while_loading_is_named(model_factory, tmp_path):
    """Its files are whole, so that nothing is seen before a replica loads it."""
    import json
    import shutil

    folder = shutil.copytree(model_factory("qwen2"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "none_such", "architectures": ["NoneSuch"]})
    )
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump(server_config(transformers_teacher("exact", folder))))
    result = run_cli("up", path, house="teacher_server", env=TRIED_ONCE)
    assert result.returncode == 2
    assert "cannot be loaded" in result.stderr.strip().splitlines()[-1]


def make_certificates(folder, address="127.0.0.1"):
    """A CA and a server certificate for an address."""

    def openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    ca_key, ca = folder / "ca.key", folder / "ca.pem"
    key, request, cert = folder / "server.key", folder / "server.csr", folder / "server.pem"
    names = folder / "names"
    names.write_text(f"subjectAltName=IP:{address},DNS:localhost\n")
    openssl(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        ca_key,
        "-out",
        ca,
        "-days",
        2,
        "-subj",
        "/CN=test ca",
    )
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", "/CN=localhost")
    openssl(
        "x509",
        "-req",
        "-in",
        request,
        "-CA",
        ca,
        "-CAkey",
        ca_key,
        "-CAcreateserial",
        "-out",
        cert,
        "-days",
        2,
        "-extfile",
        names,
    )
    return ca, cert, key


def test_tls_and_tokens(tmp_path):
    ca, cert, key = make_certificates(tmp_path)
    tokens = tmp_path / "tokens"
    secret = "a-token-of-sufficient-length"
    tokens.write_text(f"# comment\nteam-a {secret}\n")
    config = server_config(FAKE, tls={"cert_file": str(cert), "key_file": str(key)}, tokens_file=str(tokens))
    with serving(tmp_path, config) as server:

        async def ask(credentials):
            async with TeacherClient(server.address, credentials=credentials) as client:
                info = await client.teacher()
                return await client.score(info, SPEC, TokenBatch.pack([[1, 2, 3]]))

        assert asyncio.run(ask(Credentials(ca_file=ca, token=secret))).rows == 2
        for token in ("", "wrong-token-of-some-length"):
            with pytest.raises(AuthenticationError) as caught:
                asyncio.run(ask(Credentials(ca_file=ca, token=token)))
            assert secret not in str(caught.value) and "$LYCEUM_TOKEN" in str(caught.value)
            assert ("edge.tokens_file" in str(caught.value)) == bool(token)
        with pytest.raises(UnavailableError):
            asyncio.run(ask(Credentials(token=secret)))  # plain text to a TLS port
        (other := tmp_path / "other").mkdir()
        with pytest.raises(UnavailableError):
            asyncio.run(ask(Credentials(ca_file=make_certificates(other)[0], token=secret)))
        tokens.write_text("team-a another-token-of-good-length\n")  # rotated without a restart
        time.sleep(0.1)
        assert asyncio.run(ask(Credentials(ca_file=ca, token="another-token-of-good-length"))).rows == 2
        with pytest.raises(AuthenticationError):
            asyncio.run(ask(Credentials(ca_file=ca, token=secret)))
        assert secret not in server.log()


def test_only_loopback_is_opened_by_the_edge(teachers):
    listening = [
        c.laddr for p in teachers.processes() for c in p.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN
    ]
    assert {a.ip.removeprefix("::ffff:") for a in listening if a.port == teachers.port} == {"127.0.0.1"}
