"""What every command that reads a config takes beside its own options, whoever wrote it: `--config FILE` and `--set section.field=value`
beside the positional forms, and examples below its help. The other house has the same habits, since neither imports the other.

In: a command as typer has made it; out: the same command, whose arguments are put into its positional form before they are parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main

_CONFIG, _SET = "--config", "--set"


def adopt(command: Any, examples: Sequence[str] = ()) -> None:
    """Gives a command, or every command of a group, these habits."""
    if examples and not command.epilog:
        command.epilog = "\n\n".join(["Examples:", *examples])
    if isinstance(command, typer.core.TyperGroup):
        for inner in command.commands.values():
            adopt(inner)
    elif type(command) is typer.core.TyperCommand:
        command.__class__ = ConfigCommand
        shown = _shown()
        command.params += [shown[name] for name in ("config", "overrides") if takes(command, name)]


def takes(command: Any, name: str) -> bool:
    """Whether a command has an argument of that name; an option of its own stays what it is."""
    return any(parameter.name == name and parameter.param_type_name == "argument" for parameter in command.params)


def _shown() -> dict[str, Any]:
    """The two options, to be shown and completed; their values have become arguments before the command is parsed."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def shown(
        config: Annotated[
            str | None, typer.Option(_CONFIG, metavar="FILE", help="the config file, in place of the first argument")
        ] = None,
        overrides: Annotated[
            list[str] | None,
            typer.Option(
                _SET, metavar="SECTION.FIELD=VALUE", help="a setting, as behind the config file; may be repeated"
            ),
        ] = None,
    ) -> None:
        """Only a way to have typer make the options."""

    found = {str(option.name): option for option in typer.main.get_command(app).params}
    for option in found.values():
        option.expose_value = False
    return found


class ConfigCommand(typer.core.TyperCommand):
    """A command that takes its config and its overrides in either of their forms."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        plain = positional(args, has_config=takes(self, "config"), has_overrides=takes(self, "overrides"))
        return super().parse_args(ctx, plain)


def positional(args: Sequence[str], *, has_config: bool, has_overrides: bool) -> list[str]:
    """Arguments with the config first, and overrides as plain arguments in their order.

    Args:
        args: as they were typed.
        has_config, has_overrides: whether the command has such an argument; if not, the option is left for the parser to refuse.
    """
    first: list[str] = []
    rest: list[str] = []
    pending = list(args)
    while pending:
        word = pending.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            return [*first, *rest, word, *pending]
        is_ours = (name == _CONFIG and has_config) or (name == _SET and has_overrides)
        if is_ours and (equals or pending):
            (first if name == _CONFIG else rest).append(value if equals else pending.pop(0))
        else:
            rest.append(word)  # without a value too: the parser says that it is missing
    return [*first, *rest]
