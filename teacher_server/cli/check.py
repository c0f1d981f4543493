"""`teacher-server check`: a config, its files, this machine and its port, and nothing started. Loads neither torch nor ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from teacher_server.cli.asking import AsJson, ConfigPath, Overrides, print_json

if TYPE_CHECKING:
    from teacher_server.config.server import ServerConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a config, its files, this machine's GPUs and its port, and start nothing. Exits with 2 if something must be changed."""
    from teacher_server.config.server import load_config
    from teacher_server.control.preflight import check as check_config
    from teacher_server.errors import ServerConfigError

    try:
        loaded = load_config(config, overrides)
        running = check_config(loaded)
    except ServerConfigError as error:
        if not as_json:
            raise
        print_json({"config": config, "ok": False, "error": str(error)})
        raise typer.Exit(2) from None
    if as_json:
        names = [teacher.name for teacher in loaded.teachers]
        print_json(
            {"config": config, "ok": True, "address": loaded.edge.address, "teachers": names, "listens_now": running}
        )
        return
    from rich.console import Console
    from rich.markup import escape

    now = "; a teacher-server listens there now" if running else ""
    Console(soft_wrap=True, highlight=False).print(escape(f"{config}: fine ({_summary(loaded)}{now})"))


def _summary(config: ServerConfig) -> str:
    teachers = ", ".join(teacher.name for teacher in config.teachers)
    return f"{config.edge.address}; teachers: {teachers}"
