"""s01, s07, s16 and the review's 5, 13, 15: who a caller is, from the tokens file or a client certificate, and until when."""

import asyncio
import os

import pytest

from teacher_server.config.server import TlsConfig
from teacher_server.edge import auth
from teacher_server.edge.auth import TokenFile, tenant_of
from teacher_server.errors import ServerConfigError
from teacher_wire.core.errors import AuthenticationError, ForbiddenError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.transport.channel import Credentials
from tests.cases.certificates import Authority
from tests.teacher_server.edge.test_server import batch, client_of, edge

A, B = "a" * 20, "b" * 20


def test_a_mark_before_the_first_name_is_no_part_of_it(tmp_path):
    file = tmp_path / "tokens"
    file.write_bytes(b"\xef\xbb\xbf" + f"alice {A}\r\nbob {B}\r\n".encode())
    tokens = TokenFile(file)
    assert (tokens.tenant(A), tokens.tenant(B)) == ("alice", "bob")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"alice {A}\nbob {A}\n", ":2: the token of bob is that of alice on line 1"),
        (f"alice {A}\nalice {A}\n", ":2:"),
        (f"alice {B}\ncarol: {A}\n", ":2: 'carol:' is no tenant's name"),
        (f'"alice" {A}\n', ":1:"),
        (f"al/ice {A}\n", ":1:"),
        (f"j\u00f6rg {A}\n", ":1: 'j\\xf6rg' is no tenant's name"),
        (f"{'x' * 64} {A}\n", ":1:"),
        (f"alice {'ü' * 20}\n", ":1: the token of alice"),
        (f"alice\t{A} extra\n", ":1: expected TENANT TOKEN"),
    ],
)
def test_slips_are_refused_with_their_line_and_without_the_token(tmp_path, content, said):
    file = tmp_path / "tokens"
    file.write_text(content)
    with pytest.raises(ServerConfigError) as caught:
        TokenFile(file)
    assert said in str(caught.value)
    assert A not in str(caught.value) and "ü" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [f"alice {A}\n".encode("utf-16"), b"alice \xff\xfe" + b"x" * 20, f"zoë {A}".encode("latin-1")]
)
def test_a_file_that_is_not_utf8_is_one_line(tmp_path, content):
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(ServerConfigError, match="UTF-8"):
        TokenFile(file)


def test_the_tokens_before_stay_while_the_file_is_wrong_and_the_reason_is_said_once(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"alice {A}\n")
    tokens = TokenFile(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in tokens.follow()
    assert tokens.follow() == "" and tokens.tenant(A) == "alice"
    file.write_text(f"alice {B}\n")
    assert tokens.tenant(A) is None and tokens.tenant(B) == "alice"


@pytest.mark.parametrize("how", ["symlink", "rename"])
def test_a_file_swapped_with_equal_size_and_time_is_read_again(tmp_path, how):
    names = [tmp_path / "one", tmp_path / "two"]
    for name, token in zip(names, (A, B), strict=True):
        name.write_text(f"alice {token}\n")
        os.utime(name, ns=(10**18, 10**18))
    file = tmp_path / "tokens"
    file.symlink_to(names[0]) if how == "symlink" else file.hardlink_to(names[0])
    tokens = TokenFile(file)
    fresh = tmp_path / "fresh"
    fresh.symlink_to(names[1]) if how == "symlink" else fresh.hardlink_to(names[1])
    fresh.replace(file)
    assert tokens.tenant(A) is None and tokens.tenant(B) == "alice"


class _Context:
    """What `tenant_of` asks of a call."""

    def __init__(self, metadata=(), **shown):
        self._metadata, self._shown = metadata, shown

    def invocation_metadata(self):
        return self._metadata

    def auth_context(self):
        return self._shown


def test_a_token_taken_out_in_between_is_nobody(tmp_path):
    """After the interceptor has looked: it was the tenant without a name, who sees everybody."""
    file = tmp_path / "tokens"
    file.write_text(f"alice {A}\nbob {B}\n")
    find = tenant_of(TokenFile(file))
    call = _Context([("authorization", f"Bearer {A}")])
    assert find(call) == "alice"
    file.write_text(f"bob {B}\n")
    with pytest.raises(AuthenticationError):
        find(call)


@pytest.mark.parametrize("idle", [True, False])
async def test_a_revoked_token_ends_its_open_stream_and_nobody_elses(tmp_path, monkeypatch, idle):
    monkeypatch.setattr(auth, "REVOKE_EVERY_S", 0.05)
    file = tmp_path / "tokens"
    file.write_text(f"alice {A}\nbob {B}\n")
    teacher = FakeTeacher(delay_s=0 if idle else 60)
    async with (
        edge(teacher, tokens_file=file) as server,
        client_of(server, token=A) as alice,
        client_of(server, token=B) as bob,
    ):
        spec = spec_of("top_k", 64, k=4)
        calls = [asyncio.create_task(who.score(await who.teacher(), spec, batch(1))) for who in (alice, bob)]
        if idle:
            await asyncio.gather(*calls)
        while server.counters()["open_streams"] < 2:
            await asyncio.sleep(0.01)
        file.write_text(f"bob {B}\n")
        async with asyncio.timeout(60):
            if idle:
                while server.counters()["open_streams"] > 1:
                    await asyncio.sleep(0.01)
            else:
                with pytest.raises(AuthenticationError):
                    await calls[0]
                assert not calls[1].done()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


def mutual(ca, kind="dns"):
    cert, key = ca.sign("server", "IP:127.0.0.1")
    return TlsConfig(cert_file=cert, key_file=key, client_ca_file=ca.cert, tenant=kind)


def shown_by(ca, name, alternative="", tenant=""):
    cert, key = ca.sign(name, alternative)
    return Credentials(ca_file=ca.cert, cert_file=cert, key_file=key, tenant=tenant)


async def ask(server, credentials):
    async with TeacherClient(server.address, credentials=credentials, retry_for_s=20) as client:
        await client.score(await client.teacher(), spec_of("top_k", 64, k=4), batch(1))


@pytest.mark.parametrize(
    ("kind", "alternative", "tenant"),
    [
        ("dns", "DNS:alice,DNS:second.example", "alice"),
        ("uri", "URI:spiffe://lab.example/tenants/bob", "bob"),
        ("common_name", "", "subject"),
    ],
)
async def test_a_certificate_names_its_tenant(ca, kind, alternative, tenant):
    async with edge(tls=mutual(ca, kind)) as server:
        await ask(server, shown_by(ca, "subject", alternative))
        assert set(server.counters()["tenants"]) == {tenant}


async def test_nobody_names_himself_beside_a_certificate(ca):
    async with edge(tls=mutual(ca)) as server:
        await ask(server, shown_by(ca, "one", "DNS:alice", tenant="alice"))
        with pytest.raises(ForbiddenError):
            await ask(server, shown_by(ca, "one", "DNS:alice", tenant="bob"))
        for alternative in ("", "IP:127.0.0.1", "DNS:*.example"):
            with pytest.raises(AuthenticationError):
                await ask(server, shown_by(ca, "two", alternative))
        assert set(server.counters()["tenants"]) == {"alice"}
