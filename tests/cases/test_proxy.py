"""Kinds 13, s04, s05, s17, s18, s19: proxies, certificates and tokens between a student and its teacher."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import threading

import pytest
from rich.console import Console

from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError
from student_trainer.training.label_ahead import label
from student_trainer.training.run import train
from teacher_wire.core.errors import RequestError, UnavailableError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.testing.loopback import serve
from teacher_wire.transport import proxy
from teacher_wire.transport.channel import TENANT_KEY, Credentials, call_metadata, check_connection
from teacher_wire.transport.proxy import route_to
from tests.cases.material import command
from tests.student_trainer.conftest import fake_for, run_config

QUIET = Console(file=io.StringIO())
DEAD = "http://127.0.0.1:9"  # the discard port: nobody listens
AWAY = "teacher.example:50051"


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


class ConnectProxy:
    """An HTTP proxy that connects everybody to one place and remembers where they wanted to go."""

    def __init__(self, target_port: int) -> None:
        self.asked: list[str] = []
        self._target = target_port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                student, _ = self._socket.accept()
                threading.Thread(target=self._connect, args=(student,), daemon=True).start()

    def _connect(self, student: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += student.recv(4096)
        self.asked.append(head.split()[1].decode())
        teacher = socket.create_connection(("127.0.0.1", self._target))
        student.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for source, sink in ((student, teacher), (teacher, student)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def world(tmp_path, model_factory, rows_file):
    """A teacher on loopback, and (sections) -> the config of a run of two steps."""
    model = model_factory("qwen2")
    fake = fake_for(model)
    with serve(fake) as server:

        def config(**sections):
            steps = {"max_steps": 2, "save_steps": 0, "accumulation": 1}
            return parse_config(run_config(tmp_path, model, rows_file, server.address, train=steps, **sections), "test")

        fake.config, fake.server, fake.model = config, server, model
        yield fake


async def describe(address, setting="auto"):
    async with TeacherClient(address, credentials=Credentials(proxy=setting)) as client:
        return await client.describe()


# ---------------------------------------------------------------------------------------------- loopback


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_loopback_takes_no_proxy_in_train_and_label(world, monkeypatch, variable):
    monkeypatch.setenv(variable, DEAD)
    assert label(world.config(), QUIET).usage.teacher_tokens > 0
    assert train(world.config(), console=QUIET).steps == 2


def test_loopback_takes_no_proxy_in_describe_and_status(world, monkeypatch, tmp_path):
    env = {"http_proxy": DEAD, "https_proxy": DEAD, "grpc_proxy": DEAD}
    done = command("describe", "--address", world.server.address, cwd=tmp_path, env=env, house="teacher_server")
    assert done.returncode == 0 and "fake" in done.stdout
    done = command("status", "--address", world.server.address, cwd=tmp_path, env=env, house="teacher_server")
    assert "keeps no status" in done.stderr or done.returncode == 0 or "UNIMPLEMENTED" in done.stderr, done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "[::1]", "localhost", "LOCALHOST", "localhost.", "a.localhost",
                                  "[::ffff:127.0.0.1]", "0.0.0.0", "ip6-localhost"])  # fmt: skip
def test_what_stays_on_this_machine(host):
    env = {"http_proxy": DEAD}
    assert route_to(f"{host}:50051", "auto", env).proxy == "" and route_to(f"{host}:50051", DEAD).proxy == ""
    assert route_to("unix:/run/teacher.sock", DEAD).options == [("grpc.enable_http_proxy", 0)]


# ---------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_elsewhere_the_variable_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, DEAD)
    with pytest.raises(UnavailableError) as caught:
        await describe(AWAY)
    assert f"through the proxy of ${variable} ({DEAD}); set teacher.proxy: none" in str(caught.value)


async def test_a_proxy_of_the_setting_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(UnavailableError) as caught:
        await describe(AWAY, "http://me:hunter2@127.0.0.1:9")
    assert "through the proxy http://127.0.0.1:9 of teacher.proxy" in str(caught.value)
    assert "hunter2" not in str(caught.value) and "127.0.0.1:1 " not in str(caught.value)


async def test_none_goes_straight(monkeypatch):
    monkeypatch.setenv("http_proxy", DEAD)
    with pytest.raises(UnavailableError) as caught:
        await describe("teacher.invalid:50051", "none")
    assert "proxy" not in str(caught.value)


async def test_a_proxy_is_taken_by_variable_and_by_setting(world, monkeypatch):
    through = ConnectProxy(world.server.port)
    assert [info.name for info in await describe(AWAY, through.url)] == ["fake"]
    monkeypatch.setenv("https_proxy", through.url)
    monkeypatch.setenv("http_proxy", DEAD)
    assert [info.name for info in await describe(AWAY)] == ["fake"], "gRPC's order: https_proxy before http_proxy"
    assert through.asked == [AWAY, AWAY]
    through.close()


def test_training_names_the_proxy_too(world, monkeypatch, tmp_path):
    monkeypatch.setenv("http_proxy", DEAD)
    config = world.config(teacher={"address": AWAY, "wait_s": 0})
    with pytest.raises(UnavailableError, match=r"\$http_proxy"):
        train(config, console=QUIET)
    assert not config.run.output_dir.exists()


@pytest.mark.parametrize(
    ("exceptions", "host", "straight"),
    [
        ("example.com", "teacher.example.com", True), (".example.com", "teacher.example.com", True),
        ("*.example.com", "teacher.example.com", True), ("ample.com", "teacher.example.com", False),
        ("10.0.0.0/8", "10.1.2.3", True), ("10.0.0.0/8", "11.1.2.3", False), ("*", "anywhere", True),
        ("a, teacher.example.com ,b", "teacher.example.com", True), ("", "x.example", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("variable", ["no_proxy", "no_grpc_proxy", "NO_PROXY"])
def test_exceptions(exceptions, host, straight, variable):
    route = route_to(f"{host}:1", "auto", {"http_proxy": DEAD, variable: exceptions})
    assert (route.proxy == "") == straight


@pytest.mark.parametrize(
    "value", ["https://proxy:1", "socks5://proxy:1", "http://", "http://proxy:port", "http://u:secret@p:1/x"]
)
def test_what_is_no_proxy_is_refused_by_name(world, value):
    with pytest.raises(RequestError, match=r"\$https_proxy") as caught:
        route_to(AWAY, "auto", {"https_proxy": value})
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"teacher\.proxy"):
        world.config(teacher={"proxy": value})


def test_a_proxy_without_scheme_or_port():
    assert proxy.proxy_url("squid:3128") == "http://squid:3128" and proxy.proxy_url("http://squid") == "http://squid:80"
    assert route_to(AWAY, "auto", {"http_proxy": " "}).proxy == "", "an empty variable names none"


# ------------------------------------------------------------------------------ certificates and tokens


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A certificate with its key, another key, an encrypted one, and files that are none."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=folder)

    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", 2, "-subj", "/CN=x")
    openssl(*new, "-nodes", "-keyout", "key.pem", "-out", "cert.pem")
    openssl(*new, "-nodes", "-keyout", "other.pem", "-out", "other-cert.pem")
    openssl("ec", "-in", "key.pem", "-aes256", "-passout", "pass:secret", "-out", "locked.pem")
    openssl("x509", "-in", "cert.pem", "-outform", "DER", "-out", "cert.der")
    (folder / "empty.pem").touch()
    return folder


TLS_SLIPS = [
    (("cert.pem", "cert.pem", None), "key_file"),
    (("cert.pem", None, "key.pem"), "cert_file"),
    ((None, "cert.pem", "key.pem"), "plain text"),
    (("gone.pem", None, None), "cannot read: No such file"),
    (("cert.pem", "cert.pem", "gone.pem"), "cannot read: No such file"),
    (("cert.pem", "gone.pem", "key.pem"), "cannot read: No such file"),
    (("empty.pem", None, None), "not a PEM certificate"),
    (("cert.der", None, None), "not a PEM certificate"),
    (("cert.pem", "cert.der", "key.pem"), "not a PEM certificate and its PEM key"),
    (("cert.pem", "key.pem", "cert.pem"), "not a PEM certificate and its PEM key"),
    (("cert.pem", "cert.pem", "other.pem"), "the key is not the certificate's"),
    (("cert.pem", "cert.pem", "locked.pem"), "the key is encrypted"),
    ((".", None, None), "cannot read: Is a directory"),
]


@pytest.mark.parametrize(("files", "said"), TLS_SLIPS)
def test_tls_files_are_looked_at(certificates, files, said):
    ca, cert, key = (certificates / name if name else None for name in files)
    with pytest.raises(RequestError, match=said):
        check_connection(AWAY, Credentials(ca, cert, key))


def test_a_good_pair_is_taken(certificates):
    check_connection(
        AWAY, Credentials(*(certificates / name for name in ("cert.pem", "cert.pem", "key.pem")), token="t")
    )


@pytest.mark.parametrize("half", [("--cert-file", "cert.pem"), ("--key-file", "key.pem")])
def test_half_a_pair_ends_no_process(certificates, tmp_path, half):
    """gRPC's core aborts for it."""
    option, name = half
    done = command("describe", "--address", "127.0.0.1:9", option, certificates / name, "--ca-file", certificates / "cert.pem",
                   cwd=tmp_path, house="teacher_server")  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "needs its key" in done.stderr


@pytest.mark.parametrize("half", ["cert_file", "key_file"])
def test_half_a_pair_in_a_config(world, certificates, half):
    with pytest.raises(ConfigError, match="both of cert_file and key_file"):
        world.config(teacher={half: str(certificates / "cert.pem"), "ca_file": str(certificates / "cert.pem")})
    with pytest.raises(ConfigError, match="cert_file needs ca_file"):
        world.config(teacher={"cert_file": "a", "key_file": "b"})


def test_a_file_that_is_gone_is_said_before_the_model_is_loaded(world, monkeypatch):
    monkeypatch.setattr("student_trainer.training.run.load_student", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RequestError, match=r"no/ca\.pem"):
        train(world.config(teacher={"ca_file": "/no/ca.pem"}), console=QUIET)


@pytest.mark.parametrize("token", ["abc\n", "abc\r\n", "  abc\t", "\nabc"])
def test_white_space_is_no_part_of_a_token(token):
    assert call_metadata(Credentials(token=token)) == (("authorization", "Bearer abc"),)


@pytest.mark.parametrize("token", ["geheimü", "two words", "a\nb", "a\0b", "\ufeffabc"])
def test_what_no_token_can_hold_is_refused_and_not_shown(token, tmp_path):
    with pytest.raises(RequestError, match="not shown") as caught:
        call_metadata(Credentials(token=token))
    assert token.strip() not in str(caught.value) and "geheim" not in str(caught.value)


def test_the_commands_say_it_in_one_line(tmp_path):
    done = command(
        "describe", "--address", "127.0.0.1:9", cwd=tmp_path, env={"LYCEUM_TOKEN": "geheimü"}, house="teacher_server"
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "geheim" not in done.stderr


def test_a_tenant_that_no_header_can_hold(tmp_path):
    with pytest.raises(RequestError, match="tenant"):
        call_metadata(Credentials(tenant="älice"))
    assert call_metadata(Credentials(tenant="alice")) == ((TENANT_KEY, "alice"),)


# --------------------------------------------------------------------------------------- whose account


def test_traces_are_on_the_tenants_account(world, tmp_path, monkeypatch):
    """As training and labelling are: one way to connect for all three."""
    from student_trainer.config.files import parse_as
    from student_trainer.config.traces import TracesConfig
    from student_trainer.traces import run

    rows = tmp_path / "questions.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1?"}) + "\n")
    tree = {"output_dir": str(tmp_path / "out"), "tokenizer": str(world.model), "data": {"sources": [str(rows)]},
            "teacher": {"address": world.server.address, "tenant": "alice", "proxy": "none"}}  # fmt: skip
    seen = []

    class Heard(TeacherClient):
        async def teacher(self, *args, **kwargs):
            connection = self._connection
            seen.append((connection.metadata, connection._credentials.proxy))
            raise asyncio.CancelledError

    monkeypatch.setattr("student_trainer.teachers.connect.TeacherClient", Heard)
    with pytest.raises(BaseException):  # noqa: B017
        run.make_traces(parse_as(TracesConfig, tree, "test"), console=QUIET)
    assert seen == [(((TENANT_KEY, "alice"),), "none")]
