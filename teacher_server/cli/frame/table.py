"""A table of commands of which only the called one is imported: help of all of them costs no more than its text."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import typer
import typer.core
import typer.main

from teacher_server.cli.frame.habits import adopt


class Command(NamedTuple):
    """A command: its name, the module whose `app` is its typer application, a line of help, and lines that one would type.

    A hidden one is called by a process of ours alone.
    """

    name: str
    module: str
    help: str
    examples: tuple[str, ...] = ()
    is_hidden: bool = False


@contextlib.contextmanager
def _interrupted_in_one_line(program: str | None) -> Iterator[None]:
    """Ctrl-C is one line and exit code 130 wherever a command was; one that has more to say of it catches it first."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


class CommandTable(typer.core.TyperGroup):
    """A group whose commands stand in `table`; a subclass says which.

    An `app` with one command is that command; with several it is a group of its own.
    """

    table: ClassVar[tuple[Command, ...]] = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in self.table:
            self.add_command(
                typer.core.TyperCommand(command.name, help=command.help, hidden=command.is_hidden), command.name
            )

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **named: Any) -> Any:
        with _interrupted_in_one_line(info_name):
            return super().make_context(info_name, args, *more, **named)

    def invoke(self, ctx: Any) -> Any:
        with _interrupted_in_one_line(ctx.info_name):
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, stub, rest = super().resolve_command(ctx, args)
        command = next((command for command in self.table if command.name == name), None)
        if command is None:
            return name, stub, rest
        found = typer.main.get_command(importlib.import_module(command.module).app)
        found.name = name
        adopt(found, command.examples)
        return name, found, rest
