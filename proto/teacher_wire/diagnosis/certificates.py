"""Checks of TLS: what a certificate says, and whether a handshake with a server succeeds and why not. The standard library alone."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from teacher_wire.diagnosis.check import Check

SOON_DAYS = 14
_CONNECT_S = 5.0
_REASONS = {
    9: ("is not valid yet", "compare both machines' clocks, or make a new certificate"),
    10: ("has expired", "make a new certificate for the server"),
    18: ("is signed by itself", "use its own file as ca_file, or the authority's that signed it"),
    19: (
        "is of an authority that ca_file does not hold",
        "use the PEM of the authority that signed the server's certificate",
    ),
    20: (
        "is of an authority that ca_file does not hold",
        "use the PEM of the authority that signed the server's certificate",
    ),
    62: ("is for another host name", "connect by a name in the certificate, or make one that holds this name"),
    64: ("is for another IP address", "connect by a name in the certificate, or make one that holds this address"),
}


def names_of(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """The host names and addresses that a certificate is for."""
    return tuple(str(value) for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address"))


def dated(certificate: Mapping[str, Any], subject: str) -> Check:
    """How long a certificate still holds."""
    left_s = ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()
    days = left_s / 86_400
    names = ", ".join(names_of(certificate)) or "no name"
    told = f"the certificate for {names} is valid until {certificate['notAfter']}"
    if left_s < 0:
        return Check(
            "bad", subject, f"the certificate for {names} expired on {certificate['notAfter']}", _REASONS[10][1]
        )
    if days < SOON_DAYS:
        return Check("note", subject, told, f"renew it: {days:,.0f} days are left")
    return Check("ok", subject, told)


def own_certificate(cert: Path, key: Path) -> dict[str, Any]:
    """What a certificate of ours says, read by a handshake with itself.

    Raises:
        OSError, ssl.SSLError: it cannot be read, or is out of its time.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(cert, key, password="")
    client.check_hostname = False
    client.load_verify_locations(cert)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True))
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return dict(ends[0].getpeercert() or {})


def handshake(address: str, ca: Path, cert: Path | None, key: Path | None) -> Iterator[Check]:
    """A TLS connection to HOST:PORT, closed at once; says in one line what would keep a student out."""
    subject = f"TLS to {address}"
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except FileNotFoundError:
        yield Check(
            "bad", subject, f"ca_file {ca}: there is no such file", "copy the authority's PEM here, or correct the path"
        )
        return
    except (OSError, ssl.SSLError) as error:
        yield Check(
            "bad",
            subject,
            f"ca_file {ca}: cannot be read as PEM certificates ({error})",
            "use the authority's PEM file",
        )
        return
    if cert is not None and key is not None:
        try:
            context.load_cert_chain(cert, key, password="")
        except (OSError, ssl.SSLError, ValueError) as error:
            yield Check(
                "bad", subject, f"cert_file {cert} and key_file {key}: {error}", "use a PEM certificate and its own key"
            )
            return
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), _CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            yield dated(tls.getpeercert() or {}, subject)
    except ssl.SSLCertVerificationError as error:
        why, fix = _REASONS.get(
            error.verify_code, (f"is refused: {error.verify_message}", "look at it with openssl s_client")
        )
        yield Check("bad", subject, f"the server's certificate {why}", fix)
    except ssl.SSLError as error:
        what = f"the server speaks no TLS that this side understands ({error.reason or error})"
        yield Check(
            "bad", subject, what, "set edge.tls on the server, or leave ca_file out for plain text on this machine"
        )
    except OSError as error:
        yield Check(
            "bad", subject, f"no connection: {error.strerror or error}", "is the server up, and the address right?"
        )
