"""`student-trainer doctor` and `teacher-server doctor` against everything that they look for, broken: one line each, and on to the next."""

import json
import os
import re
import socket
import ssl
import threading

import pytest
import yaml
from typer.testing import CliRunner

from student_trainer.cli.main import app as student
from student_trainer.config.run import dump_config, parse_config
from student_trainer.planning import doctor as student_doctor
from teacher_server.cli.main import app as teacher
from teacher_wire.diagnosis import certificates, machine
from teacher_wire.diagnosis.check import Check, surviving
from tests.cases.certificates import Authority, openssl
from tests.e2e.conftest import free_port
from tests.student_trainer.conftest import run_config


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the machine's own state, which differs."""
    monkeypatch.setattr(machine, "gpu", lambda: iter([Check("ok", "GPU driver", "left out")]))
    monkeypatch.setattr(student_doctor, "_torch", lambda: iter(()))
    monkeypatch.setattr(machine, "versions", lambda *_: iter(()))


@pytest.fixture
def run_file(tmp_path, model_factory, rows_file):
    """Sections -> a run's config file."""

    def write(address="127.0.0.1:1", **sections):
        path = tmp_path / "run.yaml"
        tree = run_config(tmp_path, model_factory("qwen2"), rows_file, address, **sections)
        path.write_text(dump_config(parse_config(tree, "test")))
        return path

    return write


def looked(app, *arguments):
    """Exit code, and the checks by subject."""
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    found = json.loads(result.stdout)
    assert found["ok"] == (result.exit_code == 0)
    for check in found["checks"]:
        assert "\n" not in check["what"] and (check["state"] != "bad" or check["what"])
    return result.exit_code, found["checks"]


def bad(checks):
    return {check["subject"]: check for check in checks if check["state"] == "bad"}


def files(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_sound_run_is_well_and_nothing_changes(run_file, server, tmp_path):
    path = run_file(server.address)
    before = files(tmp_path)
    code, checks = looked(student, path)
    assert code == 0, bad(checks)
    assert any("gives hidden labels" in check["what"] for check in checks)
    assert files(tmp_path) == before
    shown = CliRunner().invoke(student, ["doctor", str(path)])
    assert shown.exit_code == 0 and re.search(r"\d+ ok, \d+ notes, 0 bad", shown.stdout)


def test_a_dead_teacher_and_broken_folders_are_a_line_each(run_file, tmp_path):
    (tmp_path / "file").write_text("x")
    path = run_file(
        run={"output_dir": str(tmp_path / "file" / "run"), "cache_dir": str(tmp_path / "cache")},
        model={"path": str(tmp_path / "none")},
    )
    code, checks = looked(student, path)
    assert code == 1 and {"run.output_dir", "model.path", "teacher"} <= set(bad(checks))
    assert all(check["fix"] for check in bad(checks).values())


def test_what_a_teacher_cannot_give_is_named_with_what_it_gives(run_file, server):
    code, checks = looked(student, run_file(server.address), "generate={system: x}", "data.max_tokens=100000")
    assert code in (0, 1)
    code, checks = looked(student, run_file(server.address), "teacher.name=nobody")
    assert code == 1 and "nobody" in bad(checks)["teacher nobody"]["what"]


def test_a_config_that_is_missing_or_misspelt_ends_no_check_of_the_machine(tmp_path):
    for app in (student, teacher):
        code, checks = looked(app, tmp_path / "none.yaml")
        assert code == 1 and set(bad(checks)) == {"config"} and len(checks) > 3
        (tmp_path / "odd.yaml").write_text("run: [")
        assert set(bad(looked(app, tmp_path / "odd.yaml")[1])) == {"config"}


def test_without_a_config_the_machine_alone_is_looked_at():
    for app in (student, teacher):
        code, checks = looked(app)
        assert code == 0 and {"clock", "file limits"} <= {check["subject"] for check in checks}
    assert CliRunner().invoke(student, ["doctor", "--nonsense"]).exit_code == 2


class TlsServer:
    """Accepts TLS connections and closes them."""

    def __init__(self, cert, key):
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(cert, key)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            try:
                self._context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

    def close(self):
        self._socket.close()


def expired(authority, folder):
    """A certificate of long ago; only `openssl ca` writes dates of one's own."""
    cert, key, request, settings = (folder / f"old.{end}" for end in ("pem", "key", "csr", "cnf"))
    openssl(
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-keyout",
        key,
        "-out",
        request,
        "-subj",
        "/CN=old",
    )
    settings.write_text(
        f"[ca]\ndefault_ca=d\n[d]\ndatabase={folder}/db\nnew_certs_dir={folder}\nserial={folder}/serial\ndefault_md=sha256\npolicy=p\n"
        "[p]\ncommonName=supplied\n[e]\nsubjectAltName=IP:127.0.0.1\n"
    )
    (folder / "db").touch()
    (folder / "serial").write_text("01\n")
    openssl("ca", "-batch", "-config", settings, "-in", request, "-out", cert, "-cert", authority.cert, "-keyfile",
            authority.folder / f"{authority.name}.key", "-startdate", "20200101000000Z", "-enddate", "20200201000000Z", "-extensions", "e", "-notext")  # fmt: skip
    return cert, key


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def certificate(authority):
    return authority.sign("server", "IP:127.0.0.1,DNS:localhost")


def test_every_way_in_which_a_certificate_is_wrong_has_its_line(authority, certificate, tmp_path):
    other = Authority(tmp_path, "other")
    named = authority.sign("elsewhere", "DNS:elsewhere.example")
    cases = [
        (certificate, authority.cert, "note", "is valid until"),  # for two days more
        (certificate, other.cert, "bad", "authority that ca_file does not hold"),
        (named, authority.cert, "bad", "is for another"),
        (certificate, tmp_path / "none.pem", "bad", "there is no such file"),
        (certificate, certificate[1], "bad", "cannot be read as PEM"),
    ]
    cases.append((expired(authority, tmp_path), authority.cert, "bad", "has expired"))
    for pair, ca, state, said in cases:
        server = TlsServer(*pair)
        (check,) = certificates.handshake(server.address, ca, None, None)
        server.close()
        assert (check.state, said in check.what) == (state, True), check
        assert check.fix or state == "ok"
    (gone,) = certificates.handshake("127.0.0.1:1", authority.cert, None, None)
    assert gone.state == "bad" and "no connection" in gone.what
    plain = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: plain.accept()[0].send(b"SSH-2.0-no\r\n"), daemon=True).start()
    (strange,) = certificates.handshake(f"127.0.0.1:{plain.getsockname()[1]}", authority.cert, None, None)
    plain.close()
    assert strange.state == "bad"


def test_a_run_with_a_wrong_authority_is_told_so_once(run_file, authority, certificate, tmp_path):
    other = Authority(tmp_path, "other")
    server = TlsServer(*certificate)
    code, checks = looked(
        student, run_file(server.address, teacher={"address": server.address, "ca_file": str(other.cert)})
    )
    server.close()
    assert code == 1 and list(bad(checks)) == [f"TLS to {server.address}"]


@pytest.fixture
def server_file(tmp_path, model_factory):
    """Sections of `edge` -> a server's config file."""

    def write(model=None, **edge):
        path = tmp_path / "server.yaml"
        backend = {"kind": "transformers", "model": str(model or model_factory("qwen2"))}
        path.write_text(
            yaml.safe_dump({"edge": {"port": free_port(), **edge}, "teachers": [{"name": "t", "backend": backend}]})
        )
        return path

    return write


def test_a_server_is_looked_at_without_a_change(server_file, certificate, tmp_path):
    path = server_file(
        tls={"cert_file": str(certificate[0]), "key_file": str(certificate[1])},
        store={"folder": str(tmp_path / "store")},
    )
    before = files(tmp_path)
    code, checks = looked(teacher, path)
    assert code == 0, bad(checks)
    assert files(tmp_path) == before and not (tmp_path / "store").exists()
    assert {"edge.port", "edge.tls", "edge.store.folder", "teachers.t"} <= {check["subject"] for check in checks}


def test_what_is_broken_around_a_server_is_a_line_each(server_file, certificate, authority, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = server_file(
            tmp_path / "nowhere", port=taken.getsockname()[1], tokens_file=str(tmp_path / "tokens"),
            tls={"cert_file": str(certificate[0]), "key_file": str(authority.sign("another")[1])},
        )  # fmt: skip
        code, checks = looked(teacher, path)
    found = bad(checks)
    assert code == 1 and {"edge.port", "edge.tls", "edge.tokens_file", "teachers.t"} <= set(found)
    assert all(check["fix"] for check in found.values())


def test_a_disk_that_is_mounted_read_only_is_named(monkeypatch, tmp_path):
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: type("S", (), {"f_flag": real.f_flag | os.ST_RDONLY}))
    (check,) = machine.folder(tmp_path / "run", "run.output_dir")
    assert check.state == "bad" and "read-only" in check.what


def test_versions_are_held_against_the_bounds_of_our_own_package(monkeypatch):
    monkeypatch.undo()
    lines = ["grpcio>=1.71", 'torch<2.14,>=2.11; extra == "student"', 'ray[serve]<2.61,>=2.60; extra == "teacher"']
    assert machine.needed(lines, "student") == {"grpcio": ">=1.71", "torch": "<2.14,>=2.11"}
    assert machine.needed(lines, "teacher")["ray"] == "<2.61,>=2.60"
    for installed, bounds, good in (
        ("2.13.0+cpu", ">=2.11,<2.14", True), ("2.14", ">=2.11,<2.14", False), ("2.9.1", ">=2.11", False),
        ("9.0.1", ">=9,<10", True), ("1.0", "!=1.0", False), ("1.0rc1", "", True),
    ):  # fmt: skip
        assert machine.within(installed, bounds) is good, (installed, bounds)
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"grpcio": "1.0"}[name])
    assert machine.version("grpcio", ">=1.71", needed=True).state == "bad"
    assert all(check.state != "bad" or check.fix for check in machine.versions("student", {}, "no-such-distribution"))


def test_clock_limits_and_proxies_have_lines(monkeypatch):
    (late,) = machine.clock(0.0)
    assert late.state == "bad" and "1970" in late.what
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    (few,) = machine.file_limits()
    assert few.state == "note" and "ulimit" in few.fix and "ask root" in few.fix
    (way,) = machine.proxies({"far.example:50051": "auto"}, {"https_proxy": "http://user:secret@proxy:3128"})
    assert way.state == "note" and "proxy:3128" in way.what and "secret" not in way.what
    (wrong,) = machine.proxies({"far.example:50051": "auto"}, {"https_proxy": "socks5://proxy"})
    assert wrong.state == "bad" and wrong.fix


def test_a_check_that_breaks_is_a_line():
    def breaks():
        yield Check("ok", "a", "before")
        raise RuntimeError("two\nlines")

    first, second = surviving("a", breaks)
    assert first.state == "ok" and second.state == "bad" and "two lines" in second.what
