"""The edge's certificates: looked at before they are used, and read again when their files change. No Ray here.

In: a TlsConfig; out: credentials for grpc, or one line that names the field and what is wrong with its file.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc

from teacher_server.config.file_stamp import Stamp, stamp_of
from teacher_server.config.server import TlsConfig
from teacher_server.errors import ServerConfigError

log = logging.getLogger(__name__)

_CERTIFICATE, _KEY = b"-----BEGIN CERTIFICATE-----", b"PRIVATE KEY-----"


def check_tls(tls: TlsConfig) -> None:
    """Refuses files with which no handshake could succeed.

    Raises:
        ServerConfigError: naming the field, the file and the reason.
    """
    _load(tls)


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Credentials that follow their files: a new connection gets what they hold then, open ones go on.

    Raises:
        ServerConfigError: as `check_tls`.
    """
    rotation = Rotation(tls)
    return grpc.dynamic_ssl_server_credentials(
        rotation.first, rotation.changed, require_client_authentication=tls.client_ca_file is not None
    )


class Rotation:
    """The certificates in force.

    Args:
        tls: whose files are watched. A new content that cannot be used is told once, and the one before stays in force.
        say: told of new certificates, and of those that cannot be used.
    """

    def __init__(self, tls: TlsConfig, say: Callable[[str], None] = log.warning) -> None:
        self._tls = tls
        self._say = say
        self._stamps = self._seen = self._look()
        self.first = _configuration(tls)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, if the files hold another one; called by grpc in a thread of its own at each handshake."""
        found = self._look()
        if found == self._stamps:
            return None
        try:
            new = _configuration(self._tls)
        except ServerConfigError as error:
            if found != self._seen:
                self._say(f"{error}; the certificates before stay in force")
            self._seen = found
            return None
        self._stamps = self._seen = found
        self._say("edge.tls: new certificates are in force")
        return new

    def _look(self) -> list[Stamp | None]:
        return [stamp_of(path) for path in _files(self._tls).values()]


def _files(tls: TlsConfig) -> dict[str, Path]:
    files = {"cert_file": tls.cert_file, "key_file": tls.key_file, "client_ca_file": tls.client_ca_file}
    return {field: path.expanduser() for field, path in files.items() if path is not None}


def _configuration(tls: TlsConfig) -> grpc.ServerCertificateConfiguration:
    found = _load(tls)
    return grpc.ssl_server_certificate_configuration(
        [(found["key_file"], found["cert_file"])], root_certificates=found.get("client_ca_file")
    )


def _load(tls: TlsConfig) -> dict[str, bytes]:
    """The files' bytes, after a look at them."""
    files = _files(tls)
    found = {field: _read(path, field) for field, path in files.items()}
    for field, data in found.items():
        wanted, other = (_KEY, _CERTIFICATE) if field == "key_file" else (_CERTIFICATE, _KEY)
        if not data.strip():
            raise _wrong(field, files, "is empty")
        if wanted not in data:
            what = "a private key" if other in data and field != "key_file" else "a certificate"
            why = f"holds {what}" if other in data else "is not PEM text (convert DER with openssl -inform der)"
            raise _wrong(field, files, why)
    if b"ENCRYPTED" in found["key_file"]:
        raise _wrong("key_file", files, "is encrypted: write it without a passphrase (openssl pkey -in FILE -out NEW)")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files["cert_file"], files["key_file"], password="")
    except (ssl.SSLError, ValueError) as error:
        if "KEY_VALUES_MISMATCH" in str(error):
            raise _wrong("key_file", files, f"is not the key of the certificate in {files['cert_file']}") from error
        raise _wrong("cert_file", files, f"and its key_file cannot be read: {error}") from error
    if "client_ca_file" in files:
        try:
            context.load_verify_locations(files["client_ca_file"])
        except (ssl.SSLError, ValueError) as error:
            raise _wrong("client_ca_file", files, f"cannot be read: {error}") from error
    _check_dates(files)
    return found


def _check_dates(files: dict[str, Path]) -> None:
    """Refuses a certificate out of its time, by a handshake with itself that asks for nothing but that."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files["cert_file"], files["key_file"])
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(files["cert_file"])
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is trusted, whoever signed it
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                if error.verify_code in _OUT_OF_TIME:
                    raise _wrong("cert_file", files, f"is {_OUT_OF_TIME[error.verify_code]}") from error
                return  # nothing else is asked here
            except ssl.SSLError:
                return


_OUT_OF_TIME = {9: "not valid yet", 10: "expired"}  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED


def _wrong(field: str, files: dict[str, Path], why: str) -> ServerConfigError:
    return ServerConfigError(f"edge.tls.{field} {files[field]} {why}")


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ServerConfigError(f"edge.tls.{field} {path}: {why}") from error
