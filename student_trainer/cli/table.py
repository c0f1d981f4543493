"""A table of commands of which only the called one is imported: help of all of them costs no more than its text."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, NamedTuple

import typer
import typer.core
import typer.main


class Command(NamedTuple):
    """A command: its name, the module whose `app` is its typer application, and a line of help."""

    name: str
    module: str
    help: str


class CommandTable(typer.core.TyperGroup):
    """A group whose commands stand in `table`; a subclass says which.

    An `app` with one command is that command; with several it is a group of its own.
    """

    table: ClassVar[tuple[Command, ...]] = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in self.table:
            self.add_command(typer.core.TyperCommand(command.name, help=command.help), command.name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, stub, rest = super().resolve_command(ctx, args)
        module = next((command.module for command in self.table if command.name == name), None)
        if module is None:
            return name, stub, rest
        found = typer.main.get_command(importlib.import_module(module).app)
        found.name = name
        return name, found, rest
