"""How a connection is made: channel options, TLS, token. The same options on both sides.

Keepalive finds a dead or frozen peer within 40 s; reconnects back off 1-2 s (reliability.md A4).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from teacher_wire.errors import RequestError

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
        cert_file, key_file: the student's own certificate, for mutual TLS.
        token: bearer token; only ever sent over TLS or to a loopback address.
        tenant: whose account this is; with a token it must be the token's own, or empty.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    token: str = ""
    tenant: str = ""


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
    if credentials.ca_file is None:
        if credentials.token and not is_loopback(address):
            raise RequestError("a token is not sent in the clear: set a CA file", field="ca_file", value="none")
        return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
    tls = grpc.ssl_channel_credentials(
        root_certificates=_read(credentials.ca_file, "ca_file"),
        private_key=_read(credentials.key_file, "key_file") if credentials.key_file else None,
        certificate_chain=_read(credentials.cert_file, "cert_file") if credentials.cert_file else None,
    )
    return grpc.aio.secure_channel(address, tls, options=CLIENT_OPTIONS)


def call_metadata(credentials: Credentials | None) -> tuple[tuple[str, str], ...]:
    """Metadata that carries token and tenant."""
    if credentials is None:
        return ()
    token = (("authorization", f"Bearer {credentials.token}"),) if credentials.token else ()
    return token + (((TENANT_KEY, credentials.tenant),) if credentials.tenant else ())


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read: {error.strerror}", field=field, value=path) from error
