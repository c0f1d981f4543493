"""What the commands have in common: the arguments of a config, and a client of a running server with its errors explained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from teacher_wire.endpoint.client import TeacherClient

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. edge.port=50052")]
Address = Annotated[str, typer.Option(help="HOST:PORT of a running server")]
CaFile = Annotated[Path | None, typer.Option(help="PEM of the authority behind the server's certificate")]
CertFile = Annotated[Path | None, typer.Option(help="our own certificate, for mutual TLS")]
KeyFile = Annotated[Path | None, typer.Option(help="its key")]
TokenEnv = Annotated[str, typer.Option(help="environment variable that holds the token")]
Proxy = Annotated[str, typer.Option(help="auto, none, or http://HOST:PORT; never taken to this machine itself")]
AsJson = Annotated[bool, typer.Option("--json", help="the result as one JSON object on standard output")]

_CLOSED = ("Socket closed", "Connection reset", "CERTIFICATE_REQUIRED", "Broken pipe")  # gRPC's words


def print_json(found: Any) -> None:
    """One line of JSON on standard output; what JSON has no form for becomes text."""
    print(json.dumps(found, default=str), flush=True)


@contextlib.contextmanager
def explained(ca_file: Path | None, cert_file: Path | None) -> Iterator[None]:
    """Adds what TLS cannot say: a server that misses a client certificate just closes the connection."""
    from teacher_server.errors import ServerConfigError
    from teacher_wire.core.errors import UnavailableError

    try:
        yield
    except UnavailableError as error:
        if ca_file is None or cert_file is not None or not any(word in str(error) for word in _CLOSED):
            raise
        raise ServerConfigError(
            f"{error}; a server that wants a client certificate closes the connection so: try --cert-file and --key-file"
        ) from error


def client_of(
    address: str, ca_file: Path | None, cert_file: Path | None, key_file: Path | None, token_env: str, proxy: str
) -> TeacherClient:
    """A client of a running server, to be used in an event loop.

    Raises:
        RequestError: an address, a file or a token that cannot be used.
    """
    from teacher_wire.endpoint.client import TeacherClient
    from teacher_wire.transport.channel import Credentials

    credentials = Credentials.from_environment(ca_file, cert_file, key_file, token_env, proxy=proxy)
    return TeacherClient(address, credentials=credentials)
