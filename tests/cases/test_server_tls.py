"""s03, and certificates that rotate: the edge's TLS files are looked at before anything starts, and followed afterwards."""

import asyncio
import datetime
import shutil

import grpc
import pytest
import yaml

from teacher_server.config.server import TlsConfig
from teacher_server.edge.tls import Rotation, check_tls
from teacher_server.errors import ServerConfigError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.transport.channel import Credentials
from tests.cases.certificates import Authority, openssl
from tests.cases.material import command
from tests.e2e.conftest import free_port
from tests.teacher_server.edge.test_server import edge


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def pair(ca):
    return ca.sign("server", "IP:127.0.0.1,DNS:localhost")


def encrypted(ca, pair, folder):
    key = folder / "encrypted.key"
    openssl("pkey", "-in", pair[1], "-aes256", "-passout", "pass:secret", "-out", key)
    return pair[0], key


def foreign(ca, pair, folder):
    return pair[0], ca.sign("other")[1]


def der(ca, pair, folder):
    cert = folder / "server.der"
    openssl("x509", "-in", pair[0], "-outform", "der", "-out", cert)
    return cert, pair[1]


def empty(ca, pair, folder):
    (folder / "empty.pem").write_text("\n")
    return folder / "empty.pem", pair[1]


def swapped(ca, pair, folder):
    return pair[1], pair[0]


def torn(ca, pair, folder):
    cert = folder / "torn.pem"
    cert.write_bytes(pair[0].read_bytes()[:200])
    return cert, pair[1]


def missing(ca, pair, folder):
    return pair[0], folder / "none.key"


def expired(ca, pair, folder):
    """openssl 3.0 makes none of the past."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization

    key = serialization.load_pem_private_key(pair[1].read_bytes(), None)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "old")])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = (
        builder.serial_number(7).not_valid_before(now - 3 * day).not_valid_after(now - day).sign(key, hashes.SHA256())
    )
    cert = folder / "expired.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return cert, pair[1]


FAULTS = [
    (encrypted, "edge.tls.key_file", "encrypted"),
    (foreign, "edge.tls.key_file", "not the key of the certificate"),
    (der, "edge.tls.cert_file", "DER"),
    (empty, "edge.tls.cert_file", "is empty"),
    (swapped, "edge.tls.cert_file", "holds a private key"),
    (torn, "edge.tls.cert_file", "cannot be read"),
    (missing, "edge.tls.key_file", "no such file"),
    (expired, "edge.tls.cert_file", "expired"),
]


@pytest.mark.parametrize(("spoil", "field", "why"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_each_file_that_cannot_work_is_named_with_its_reason(ca, pair, tmp_path, spoil, field, why):
    cert, key = spoil(ca, pair, tmp_path)
    with pytest.raises(ServerConfigError) as caught:
        check_tls(TlsConfig(cert_file=cert, key_file=key))
    assert str(caught.value).startswith(field) and why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_authority_that_is_none_is_named(ca, pair, tmp_path):
    (tmp_path / "ca.pem").write_text("hello")
    with pytest.raises(ServerConfigError, match=r"edge\.tls\.client_ca_file"):
        check_tls(TlsConfig(cert_file=pair[0], key_file=pair[1], client_ca_file=tmp_path / "ca.pem"))


def test_right_files_pass(ca, pair):
    check_tls(TlsConfig(cert_file=pair[0], key_file=pair[1], client_ca_file=ca.cert))


def test_check_says_it_in_one_line(ca, pair, tmp_path):
    cert, key = encrypted(ca, pair, tmp_path)
    config = tmp_path / "server.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "edge": {"port": free_port(), "tls": {"cert_file": str(cert), "key_file": str(key)}},
                "teachers": [{"name": "fake", "backend": {"kind": "fake"}}],
            }
        )
    )
    result = command("check", config, cwd=tmp_path, house="teacher_server")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "edge.tls.key_file" in line and "encrypted" in line


async def test_new_connections_meet_the_new_certificate(ca, pair, tmp_path):
    """Another authority signs the new one: only a client of that authority comes in afterwards, without a restart."""
    cert, key = (shutil.copy(file, tmp_path / name) for file, name in zip(pair, ("c.pem", "c.key"), strict=True))
    other = Authority(tmp_path, "other-ca")
    async with edge(tls=TlsConfig(cert_file=cert, key_file=key)) as server, reached(server, ca) as old:
        await old.describe()
        for new, place in zip(other.sign("renewed", "IP:127.0.0.1"), (cert, key), strict=True):
            shutil.copy(new, place)
        async with reached(server, other) as fresh:
            await fresh.describe()
        await old.describe()  # its connection goes on


def reached(server, authority):
    return TeacherClient(server.address, credentials=Credentials(ca_file=authority.cert), retry_for_s=20)


def test_a_bad_renewal_leaves_the_one_before_in_force(ca, pair, tmp_path):
    cert, key = (shutil.copy(file, tmp_path / name) for file, name in zip(pair, ("c.pem", "c.key"), strict=True))
    said = []
    rotation = Rotation(TlsConfig(cert_file=cert, key_file=key), said.append)
    assert rotation.changed() is None
    (tmp_path / "c.pem").write_text("half a fi")
    assert [rotation.changed(), rotation.changed()] == [None, None]
    assert len(said) == 1 and "edge.tls.cert_file" in said[0] and "stay in force" in said[0]
    shutil.copy(pair[0], cert)
    assert rotation.changed() is not None
    assert rotation.changed() is None


async def test_a_client_without_a_certificate_hears_what_may_be_missing(ca, pair, tmp_path):
    async with edge(tls=TlsConfig(cert_file=pair[0], key_file=pair[1], client_ca_file=ca.cert)) as server:
        arguments = ["describe", "--address", server.address, "--ca-file", ca.cert]
        result = await asyncio.to_thread(command, *arguments, cwd=tmp_path, house="teacher_server")
    assert result.returncode == 2
    assert "--cert-file" in result.stderr.strip().splitlines()[-1]


async def test_reflection_lists_the_health_service():
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with edge(reflection=True) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        (answer,) = [answer async for answer in asked]
    assert "grpc.health.v1.Health" in {service.name for service in answer.list_services_response.service}
