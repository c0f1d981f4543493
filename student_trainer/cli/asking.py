"""What commands have in common: the arguments of a config, a console on standard error, and how an interrupted one ends."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. train.max_steps=100")]


def progress_console() -> Console:
    """The console for progress and results: standard error, so that standard output stays a program's."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def going_on(console: Console, command: str, config: Path, overrides: list[str] | None, more: str) -> Iterator[None]:
    """Ends in order when interrupted, and says by which command to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's word: end in order, as on Ctrl-C
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["student-trainer", *command.split(), str(config), *(overrides or [])])
        console.print(f"interrupted; go on with: {again} {more}".rstrip(), markup=False)
        raise SystemExit(130) from None
