"""`teacher-server`: up, check, describe, status, doctor. Loads neither torch nor ray before a command needs them.

Exit codes: 0 done, 1 a fault of ours, 2 something the user can mend (one line says what and where).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_server.cli.doctor import doctor
from teacher_server.config.server import ServerConfig, load_config
from teacher_server.control.config_watch import ConfigFile
from teacher_server.errors import RayEndedError, ServerConfigError
from teacher_wire.core.errors import TeacherWireError, UnavailableError

if TYPE_CHECKING:
    from teacher_server.control.supervisor import Server
    from teacher_wire.endpoint.client import TeacherClient

app = typer.Typer(
    help="Serve teacher models to students over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_SERVE = "serve-under-guard"
_STOP_S = 10.0  # beyond the drain: for the processes to end
_LEAVE_S = 60.0  # the same on a cluster that stays, from which our applications are removed
_LOOK_S = 0.5  # between two looks at the config file
_WATCH_S = 1.0
_CLOSED = ("Socket closed", "Connection reset", "CERTIFICATE_REQUIRED", "Broken pipe")  # gRPC's words
ConfigPath = Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")]
Address = Annotated[str, typer.Option(help="HOST:PORT of a running server")]
CaFile = Annotated[Path | None, typer.Option(help="PEM of the authority behind the server's certificate")]
CertFile = Annotated[Path | None, typer.Option(help="our own certificate, for mutual TLS")]
KeyFile = Annotated[Path | None, typer.Option(help="its key")]
TokenEnv = Annotated[str, typer.Option(help="environment variable that holds the token")]
UntilStdinCloses = Annotated[bool, typer.Option(help="also stop when standard input ends; for a parent process")]
Proxy = Annotated[str, typer.Option(help="auto, none, or http://HOST:PORT; never taken to this machine itself")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. edge.port=50052")]


@app.command()
def up(
    config: ConfigPath,
    overrides: Overrides = None,
    until_stdin_closes: UntilStdinCloses = False,
) -> None:
    """Start every teacher and the edge, and follow changes of CONFIG; Ctrl-C drains and ends all of it."""
    from teacher_server.control import guard

    loaded = load_config(config, overrides)
    stop_within_s = loaded.edge.drain_s + (_STOP_S if loaded.ray.own else _LEAVE_S)
    command = [sys.executable, "-m", "teacher_server.cli", _SERVE, str(config), *(overrides or [])]
    if until_stdin_closes:
        command.append("--until-stdin-closes")
    raise SystemExit(guard.run(command, stop_within_s, _say))


@app.command(_SERVE, hidden=True)
def serve_under_guard(
    config: ConfigPath,
    lifeline: Annotated[int, typer.Option(help="read end of the guard's pipe")],
    overrides: Overrides = None,
    until_stdin_closes: UntilStdinCloses = False,
) -> None:
    """The server itself, in the session that `up` makes for it."""
    from teacher_server.control.guard import Lifeline, handle

    stop = threading.Event()
    serving = threading.Event()

    def give_up(*_: object) -> None:
        handle(signal.SIG_IGN)  # once is enough; the guard does not wait for ever
        raise KeyboardInterrupt

    def end(*_: object) -> None:  # SIGINT: a terminal's, or the guard's second word
        if stop.is_set():
            give_up()
        stop.set()

    def told_to_stop() -> None:
        if not serving.is_set():
            os.kill(os.getpid(), signal.SIGINT)
        stop.set()

    def told_to_end() -> None:
        stop.set()
        os.kill(os.getpid(), signal.SIGINT)

    handle(give_up)
    try:
        Lifeline(lifeline, told_to_stop, told_to_end)
        file = ConfigFile(config, overrides)
        loaded = file.config
        from teacher_server.control.launch import running
        from teacher_server.control.preflight import check

        if check(loaded) and loaded.ray.own:
            raise ServerConfigError(f"edge.port: another teacher-server listens on {loaded.edge.address} already")
        with running(loaded, _say) as server:
            handle(lambda *_: stop.set())  # systemd sends SIGTERM to us as well as to the guard: one stop
            signal.signal(signal.SIGINT, end)
            serving.set()
            if until_stdin_closes:
                threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
            how = "TLS" if loaded.edge.tls else "plain text, loopback only"
            _console().print(f"[dim]teacher-server[/] [bold green]ready[/] on {escape(loaded.edge.address)} ({how})")
            while not stop.wait(_LOOK_S):
                _follow(file, server)
    except KeyboardInterrupt:
        _say("stopped at once")
        raise SystemExit(130) from None
    except RayEndedError as error:
        _say(f"{error}; stopped")
        os._exit(0 if stop.is_set() else 1)  # an orderly exit would wait for Ray
    _say("stopped")


def _follow(file: ConfigFile, server: Server) -> None:
    """One look at the config file, and one step towards what it says."""
    try:
        changed = file.poll()
        if changed is not None:
            server.change(changed)
    except ServerConfigError as error:
        _say(f"{file.path}: not followed: {error}" if str(file.path) not in str(error) else f"not followed: {error}")
    server.step()


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config, its files and its port, and start nothing."""
    loaded = load_config(config, overrides)
    from teacher_server.control.preflight import check as check_config

    running = check_config(loaded)
    now = "; a teacher-server listens there now" if running else ""
    Console(soft_wrap=True, highlight=False).print(escape(f"{config}: fine ({_summary(loaded)}{now})"))


@app.command()
def describe(
    address: Address,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    token_env: TokenEnv = "LYCEUM_TOKEN",
    proxy: Proxy = "auto",
) -> None:
    """Ask a running server who its teachers are."""

    async def ask() -> None:
        async with _client(address, ca_file, cert_file, key_file, token_env, proxy) as client:
            for info in await client.describe():
                table = Table(title=info.name, show_header=False, title_justify="left")
                for field, value in vars(info).items():
                    table.add_row(field, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
                Console().print(table)

    with _explained(ca_file, cert_file):
        asyncio.run(ask())


@app.command()
def status(
    address: Address,
    watch: Annotated[bool, typer.Option("--watch", help="show it anew every second until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, or one a second with --watch")] = False,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    token_env: TokenEnv = "LYCEUM_TOKEN",
    proxy: Proxy = "auto",
) -> None:
    """Show replicas, queues, speed, shares of tenants and stored labels of a running server."""
    from dataclasses import asdict

    from rich.live import Live

    from teacher_server.cli.status_table import render
    from teacher_wire.core.status import ServerStatus

    async def show(tell: Callable[[ServerStatus], None]) -> None:
        async with _client(address, ca_file, cert_file, key_file, token_env, proxy) as client:
            tell(await client.server_status())
            while watch:
                await asyncio.sleep(_WATCH_S)
                tell(await client.server_status())

    with contextlib.suppress(KeyboardInterrupt), _explained(ca_file, cert_file):
        if as_json:
            asyncio.run(show(lambda found: print(json.dumps(asdict(found)), flush=True)))
        elif watch:
            with Live(console=Console(), auto_refresh=False) as live:
                asyncio.run(show(lambda found: live.update(render(found), refresh=True)))
        else:
            asyncio.run(show(lambda found: Console().print(render(found))))


app.command()(doctor)


@contextlib.contextmanager
def _explained(ca_file: Path | None, cert_file: Path | None) -> Iterator[None]:
    """Adds what TLS cannot say: a server that misses a client certificate just closes the connection."""
    try:
        yield
    except UnavailableError as error:
        if ca_file is None or cert_file is not None or not any(word in str(error) for word in _CLOSED):
            raise
        raise ServerConfigError(
            f"{error}; a server that wants a client certificate closes the connection so: try --cert-file and --key-file"
        ) from error


def _client(
    address: str, ca_file: Path | None, cert_file: Path | None, key_file: Path | None, token_env: str, proxy: str
) -> TeacherClient:
    from teacher_wire.endpoint.client import TeacherClient
    from teacher_wire.transport.channel import Credentials

    credentials = Credentials.from_environment(ca_file, cert_file, key_file, token_env, proxy=proxy)
    return TeacherClient(address, credentials=credentials)


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    _console().print(f"[dim]teacher-server[/] {escape(text)}")


def _stop_at_end_of_input(stop: threading.Event) -> None:
    sys.stdin.buffer.read()
    stop.set()


def _summary(config: ServerConfig) -> str:
    teachers = ", ".join(teacher.name for teacher in config.teachers)
    return f"{config.edge.address}; teachers: {teachers}"


def main() -> None:
    """The console script: one line and exit code 2 for what the user can mend."""
    try:
        app()
    except (ServerConfigError, TeacherWireError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        raise SystemExit(2) from None
