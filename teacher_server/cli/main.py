"""`teacher-server`: every command in a file of its own that is read when it is called; help loads neither torch nor ray.

Exit codes: 0 done; 1 a fault of ours, or Ray has ended; 2 something must be changed (one line says what and where); 75 the same command
may be tried again as it is: the server is away, too busy or too slow; 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from teacher_server.cli.frame.table import Command, CommandTable

COMMANDS = (
    Command(
        "up", "teacher_server.cli.up", "Start every teacher and the edge; Ctrl-C drains and ends all of it.",
        ("teacher-server up teacher.yaml", "teacher-server up teacher.yaml edge.port=50052 --log-format json"),
    ),
    Command(
        "check", "teacher_server.cli.check", "Check a config, its files, this machine and its port, and start nothing.",
        ("teacher-server check teacher.yaml", "teacher-server check --config teacher.yaml --set edge.port=50052 --json"),
    ),
    Command(
        "describe", "teacher_server.cli.describe", "Ask a running server who its teachers are.",
        ("teacher-server describe --address 127.0.0.1:50051", "teacher-server describe --address gpu-box:8443 --ca-file ca.pem --json"),
    ),
    Command(
        "status", "teacher_server.cli.status", "Show replicas, queues, speed, tenants and stored labels of a running server.",
        ("teacher-server status --address 127.0.0.1:50051 --watch",),
    ),
    Command(
        "doctor", "teacher_server.cli.doctor", "Look what is wrong around a server, and how to mend it.",
        ("teacher-server doctor", "teacher-server doctor teacher.yaml --json"),
    ),
    Command(
        "config", "teacher_server.cli.config", "Show a resolved config, or the schema of all settings.",
        ("teacher-server config show teacher.yaml", "teacher-server config schema > teacher.schema.json"),
    ),
    Command("serve-under-guard", "teacher_server.cli.serve", "The server itself.", is_hidden=True),
)  # fmt: skip


class _Commands(CommandTable):
    table = COMMANDS


app = typer.Typer(
    cls=_Commands,
    help="Serve teacher models to students over gRPC.",
    epilog="Examples:\n\nteacher-server check teacher.yaml\n\nteacher-server up teacher.yaml\n\n"
    "teacher-server COMMAND --help shows more of each",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from teacher_wire import PROTOCOL, __version__

        print(f"teacher-server {__version__} (protocol {PROTOCOL})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show it and exit")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script: one line and an exit code for what is known to go wrong."""
    from teacher_server.errors import ServerConfigError, exit_code_of
    from teacher_wire.core.errors import TeacherWireError

    try:
        app(prog_name="teacher-server")
    except (ServerConfigError, TeacherWireError) as error:
        print(f"teacher-server: {error}", file=sys.stderr)
        raise SystemExit(exit_code_of(error)) from None
