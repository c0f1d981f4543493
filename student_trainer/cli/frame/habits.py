"""What every command that reads a config takes beside its own options, whoever wrote it: `--config FILE` and `--set section.field=value`
beside the positional forms, `--resume` with the word that it once needed, and examples below its help.

In: a command as typer has made it; out: the same command, whose arguments are put into its positional form before they are parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args

import typer
import typer.core
import typer.main

_CONFIG, _SET, _RESUME = "--config", "--set", "--resume"
_RESUME_WORDS = ("auto", "no")
_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]  # click's, which typer has under names that change


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
    """A command that takes its config, its overrides and `--resume` in any of their forms."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        resume = next((parameter for parameter in self.params if _RESUME in parameter.opts), None)
        plain = positional(
            args,
            has_config=takes(self, "config"),
            has_overrides=takes(self, "overrides"),
            resume_is_flag=None if resume is None else bool(getattr(resume, "is_flag", False)),
        )
        try:
            return super().parse_args(ctx, plain)
        except _USAGE_ERROR as error:
            option = getattr(error, "option_name", None)  # of an option that there is not
            if option and takes(self, "overrides") and self.name != "traces" and (meant := _settings_called(option)):
                told = " or ".join(f"{setting}=..." for setting in meant)
                error.message = f"No such option: {option}; settings are written behind the config: {told}"
            raise


def _settings_called(option: str) -> list[str]:
    """Settings of a run whose field is called as an option that somebody typed, as other trainers have them."""
    from student_trainer.config.run import TrainConfig

    name, found = option.lstrip("-").replace("-", "_"), []
    for section, field in TrainConfig.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if name in getattr(kind, "model_fields", {}):
                found.append(f"{section}.{name}")
    return found


def positional(args: Sequence[str], *, has_config: bool, has_overrides: bool, resume_is_flag: bool | None) -> list[str]:
    """Arguments with the config first, overrides as plain arguments in their order, and `--resume` as the command takes it.

    Args:
        args: as they were typed.
        has_config, has_overrides: whether the command has such an argument; if not, the option is left for the parser to refuse.
        resume_is_flag: whether its `--resume` is a flag; False if it takes `auto` or `no`; None if it has none.
    """
    first: list[str] = []
    rest: list[str] = []
    pending = list(args)
    while pending:
        word = pending.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            return [*first, *rest, word, *pending]
        if (name == _CONFIG and has_config) or (name == _SET and has_overrides):
            if not equals and not pending:
                rest.append(word)  # the parser says that its value is missing
                continue
            (first if name == _CONFIG else rest).append(value if equals else pending.pop(0))
        elif name == _RESUME and resume_is_flag is not None:
            said = value if equals else pending.pop(0) if pending and pending[0] in _RESUME_WORDS else "auto"
            rest += _resume(said, resume_is_flag)
        else:
            rest.append(word)
    return [*first, *rest]


def _resume(said: str, is_flag: bool) -> list[str]:
    """`--resume` as a command takes it; a word that it never took is left for the parser, or the command, to refuse."""
    if not is_flag or said not in _RESUME_WORDS:
        return [f"{_RESUME}={said}"]
    return [_RESUME] if said == "auto" else []
