"""`teacher-server`: up, check, describe. Loads neither torch nor ray before a command needs them.

Exit codes: 0 done, 1 a fault of ours, 2 something the user can mend (one line says what and where).
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from teacher_server.config import ServerConfig, load_config
from teacher_server.errors import ServerConfigError
from teacher_wire.errors import TeacherWireError

app = typer.Typer(
    help="Serve teacher models to students over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. edge.port=50052")]


@app.command()
def up(
    config: ConfigPath,
    overrides: Overrides = None,
    until_stdin_closes: Annotated[
        bool, typer.Option(help="also stop when standard input ends; for a parent process")
    ] = False,
) -> None:
    """Start every teacher and the edge; Ctrl-C drains and ends all of it."""
    loaded = load_config(config, overrides)
    from teacher_server.app import check, running

    check(loaded)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    stop = threading.Event()

    def say(text: str) -> None:
        console.print(f"[dim]teacher-server[/] {text}")

    def on_signal(action: Callable[..., object]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, action)

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    on_signal(give_up)
    try:
        with running(loaded, say):
            on_signal(lambda *_: stop.set())
            if until_stdin_closes:
                threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
            how = "TLS" if loaded.edge.tls else "plain text, loopback only"
            say(f"[bold green]ready[/] on {loaded.edge.address} ({how})")
            while not stop.wait(0.2):
                pass
            on_signal(give_up)  # a second Ctrl-C does not wait for the drain
    except KeyboardInterrupt:
        say("stopped at once")
        raise SystemExit(130) from None
    say("stopped")


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config, its files and its port, and start nothing."""
    loaded = load_config(config, overrides)
    from teacher_server.app import check as check_config

    check_config(loaded)
    Console().print(f"{config}: fine ({_summary(loaded)})")


@app.command()
def describe(
    address: Annotated[str, typer.Option(help="HOST:PORT of a running server")],
    ca_file: Annotated[Path | None, typer.Option(help="PEM of the authority behind the server's certificate")] = None,
    cert_file: Annotated[Path | None, typer.Option(help="our own certificate, for mutual TLS")] = None,
    key_file: Annotated[Path | None, typer.Option(help="its key")] = None,
    token_env: Annotated[str, typer.Option(help="environment variable that holds the token")] = "LYCEUM_TOKEN",
) -> None:
    """Ask a running server who its teachers are."""
    import os

    from teacher_wire.channel import Credentials
    from teacher_wire.client import TeacherClient

    credentials = Credentials(ca_file, cert_file, key_file, os.environ.get(token_env, ""))

    async def ask() -> None:
        async with TeacherClient(address, credentials=credentials) as client:
            for info in await client.describe():
                table = Table(title=info.name, show_header=False, title_justify="left")
                for field, value in vars(info).items():
                    table.add_row(field, ", ".join(value) if isinstance(value, tuple) else str(value))
                Console().print(table)

    asyncio.run(ask())


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


if __name__ == "__main__":
    main()
