"""How a connection is made: channel options, TLS, token. The same options on both sides.

Keepalive finds a dead or frozen peer within 40 s; reconnects back off 1-2 s.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from teacher_wire.core.errors import RequestError
from teacher_wire.transport.proxy import AUTO, route_to

MAX_MESSAGE_BYTES = 16 << 20
KEEPALIVE_TIME_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000

_MESSAGE_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CLIENT_OPTIONS = [
    *_MESSAGE_OPTIONS,
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),  # a stream is resumed by us, request by request
    ("grpc.use_local_subchannel_pool", 1),  # a new client gets a new connection, not another's back-off
]
TENANT_KEY = "lyceum-tenant"


def server_options(
    keepalive_s: float = KEEPALIVE_TIME_MS / 1000, keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_MS / 1000
) -> list[tuple[str, int]]:
    """Channel options of a server.

    Args:
        keepalive_s: silence after which a student is asked whether it is still there.
        keepalive_timeout_s: after which it is dropped, with all it asked for, if it does not answer.
    """
    return [
        *_MESSAGE_OPTIONS,
        ("grpc.keepalive_time_ms", round(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", round(keepalive_timeout_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 3),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ]


@dataclass(frozen=True)
class Credentials:
    """How a student proves itself and checks the server.

    Attributes:
        ca_file: PEM of the authority that signed the server; None for plain text.
        cert_file, key_file: the student's own certificate, for mutual TLS; both or neither, and not without `ca_file`.
        token: bearer token; only ever sent over TLS or to a loopback address. White space around it is no part of it.
        tenant: whose account this is; with a token it must be the token's own, or empty.
        proxy: `auto` takes the one that the environment names, `none` none, else a URL; never to a loopback address.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    token: str = ""
    tenant: str = ""
    proxy: str = AUTO

    @classmethod
    def from_environment(
        cls,
        ca_file: Path | None,
        cert_file: Path | None,
        key_file: Path | None,
        token_env: str,
        tenant: str = "",
        proxy: str = AUTO,
    ) -> Credentials:
        """Credentials whose token is the value of the environment variable `token_env`; without the variable there is none."""
        return cls(ca_file, cert_file, key_file, os.environ.get(token_env, ""), tenant, proxy)


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT stays on this machine."""
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: only this one is known to stay here
        return host == "localhost"


def addresses_of(text: str) -> tuple[str, ...]:
    """The addresses in HOST:PORT[,HOST:PORT...]: the edges of one server, of which any will do.

    Raises:
        RequestError: naming what is none.
    """
    found = tuple(part.strip() for part in text.split(","))
    for address in found:
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
            raise RequestError("an address is HOST:PORT", field="address", value=address, limit="host:1..65535")
    return found


def open_channel(address: str, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """A channel to HOST:PORT; nothing is sent yet.

    Raises:
        RequestError: not an address, an unreadable file, or a token that would cross a network in the clear.
    """
    addresses_of(address)
    credentials = credentials or Credentials()
    options = [*CLIENT_OPTIONS, *route_to(address, credentials.proxy).options]
    tls = _tls(credentials)
    if tls is None:
        if credentials.token.strip() and not is_loopback(address):
            raise RequestError("a token is not sent in the clear: set a CA file", field="ca_file", value="none")
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls, options=options)


def check_connection(addresses: str, credentials: Credentials) -> None:
    """Looks at all that `open_channel` and `call_metadata` will use, and connects to nobody.

    Raises:
        RequestError: as they do.
    """
    for address in addresses_of(addresses):
        route_to(address, credentials.proxy)
    _tls(credentials)
    call_metadata(credentials)


def call_metadata(credentials: Credentials | None) -> tuple[tuple[str, str], ...]:
    """Metadata that carries token and tenant.

    Raises:
        RequestError: they hold what no header may hold; the token is not shown.
    """
    if credentials is None:
        return ()
    token, tenant = credentials.token.strip(), credentials.tenant.strip()
    if not _is_visible_ascii(token):
        raise RequestError(
            "the token holds something other than visible ASCII characters (it is not shown here)", field="token"
        )
    if not _is_visible_ascii(tenant):
        raise RequestError("a tenant's name is visible ASCII characters", field="tenant", value=ascii(tenant))
    return ((("authorization", f"Bearer {token}"),) if token else ()) + (((TENANT_KEY, tenant),) if tenant else ())


def _is_visible_ascii(text: str) -> bool:
    return all("!" <= character <= "~" for character in text)


def _tls(credentials: Credentials) -> grpc.ChannelCredentials | None:
    """TLS as the files say, each looked at first: gRPC's core ends the process for half a pair, and is silent about the rest."""
    ca, cert, key = credentials.ca_file, credentials.cert_file, credentials.key_file
    for field, path, other in (("key_file", key, "cert_file"), ("cert_file", cert, "key_file")):
        if path is None and (cert or key):
            raise RequestError(
                f"{other} is set and {field} is not: a certificate needs its key", field=field, value="none"
            )
    if ca is None:
        if cert is not None:
            raise RequestError(
                "a certificate is set and no CA file: without one the connection is plain text",
                field="ca_file",
                value="none",
            )
        return None
    roots = _read(ca, "ca_file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=ca.expanduser())
    except (OSError, ValueError) as error:
        raise RequestError("not a PEM certificate", field="ca_file", value=ca) from error
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(root_certificates=roots)
    chain, private = _read(cert, "cert_file"), _read(key, "key_file")
    if b"ENCRYPTED" in private:
        raise RequestError("the key is encrypted: write it without a passphrase", field="key_file", value=key)
    try:
        context.load_cert_chain(cert.expanduser(), key.expanduser(), password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        why = (
            "the key is not the certificate's"
            if "KEY_VALUES_MISMATCH" in str(error)
            else "not a PEM certificate and its PEM key"
        )
        raise RequestError(why, field="cert_file, key_file", value=f"{cert}, {key}") from error
    return grpc.ssl_channel_credentials(root_certificates=roots, private_key=private, certificate_chain=chain)


def _read(path: Path, field: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read: {error.strerror}", field=field, value=path) from error
    except RuntimeError as error:  # "~" and no home
        raise RequestError(f"cannot read: {error}", field=field, value=path) from error
