"""The page of commands: usage, arguments, options and examples of each, from the commands themselves."""

from __future__ import annotations

import importlib
import re
from typing import Any

import typer.core
import typer.main

from student_trainer.cli.main import COMMANDS as OF_STUDENT
from teacher_server.cli.main import COMMANDS as OF_SERVER


def command_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for program, commands in (("student-trainer", OF_STUDENT), ("teacher-server", OF_SERVER)):
        for command in commands:
            if command.is_hidden:
                continue
            found = typer.main.get_command(importlib.import_module(command.module).app)
            inner = found.commands.items() if isinstance(found, typer.core.TyperGroup) else [("", found)]
            parts.append(f"## {program} {command.name}\n\n{command.help}\n")
            for name, one in inner:
                called = f"{program} {command.name} {name}".strip()
                parts.append(_one(called, one, is_inner=bool(name)))
            if command.examples:
                parts.append("```bash\n" + "\n".join(command.examples) + "\n```\n")
    return "\n".join(parts)


def _one(called: str, command: Any, *, is_inner: bool) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [
        parameter for parameter in command.params if parameter.param_type_name == "option" and not parameter.hidden
    ]
    usage = " ".join([called, *(_argument(one) for one in arguments), *(["[OPTIONS]"] if options else [])])
    told = re.sub(r"\s+", " ", (command.help or "").partition("\n\n")[0]).strip() if is_inner else ""
    lines = [f"`{usage}`" + (f": {told}" if told else "") + "\n"]
    lines += [f"- `{_argument(one)}`: {_clean(one.help)}" for one in arguments if getattr(one, "help", None)]
    lines += [f"- `{', '.join([*one.opts, *one.secondary_opts])}`{_kind(one)}: {_clean(one.help)}" for one in options]
    return "\n".join(lines) + "\n"


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name.upper()).strip("[].") + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _kind(parameter: Any) -> str:
    if parameter.is_flag or parameter.is_bool_flag:
        return ""
    shown = parameter.metavar or getattr(parameter.type_descriptor.annotation, "__name__", "text").replace(
        "str", "text"
    )
    known = isinstance(parameter.default, int | float | str) and parameter.default != ""
    return f" {shown.upper()}" + (f" (default `{parameter.default}`)" if known else "")


def _clean(text: str | None) -> str:
    text = re.sub(r"\s+", " ", text or "").strip()
    return text if text.endswith(".") or not text else f"{text}."


_HEAD = """# Every command and option

<!-- Made by `make reference` from the commands. -->

What all of them share (`--config`, `--set`, exit codes, completion) is in [commands](commands.md).
"""
