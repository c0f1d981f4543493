"""What commands have in common: the arguments of a config, a console on standard error, and how an interrupted one ends."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from student_trainer.errors import ConfigError
from student_trainer.interruption import interrupted_in_order

if TYPE_CHECKING:
    from rich.console import Console

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. train.max_steps=100")]
AsJson = Annotated[bool, typer.Option("--json", help="the result as one JSON object on standard output")]
Resume = Annotated[
    bool, typer.Option("--resume", help="go on with the run in output_dir, from its newest whole checkpoint")
]
ResumeFrom = Annotated[
    Path | None,
    typer.Option(
        "--resume-from", help="go on from this checkpoint-N of the run; newer ones are set aside, not deleted"
    ),
]


def resuming(resume: bool, resume_from: Path | None) -> bool | Path:
    """Whether, and from where, a run is taken up: False, True for the newest checkpoint, or a checkpoint.

    Raises:
        ConfigError: a checkpoint that is not there.
    """
    if resume_from is None:
        return resume
    if not resume_from.expanduser().is_dir():
        raise ConfigError(
            f"--resume-from {resume_from}: no such folder; it is a checkpoint-N in run.output_dir, or leave it out for the newest by --resume"
        )
    return resume_from.expanduser()


def print_json(found: Mapping[str, Any]) -> None:
    """One line of JSON on standard output; what is not finite becomes null, and what JSON has no form for becomes text."""
    print(json.dumps(_finite(found), default=str, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress_console() -> Console:
    """The console for progress and results: standard error, so that standard output stays a program's."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def going_on(console: Console, command: str, config: Path, overrides: list[str] | None, more: str) -> Iterator[None]:
    """Ends in order when interrupted, and says by which command to go on."""

    def told() -> None:
        console.print(
            "interrupted: a run finishes its current step and writes a checkpoint first; interrupt again to stop at once",
            markup=False,
        )

    try:
        with interrupted_in_order(told):
            yield
    except KeyboardInterrupt:
        again = shlex.join(["student-trainer", *command.split(), str(config), *(overrides or [])])
        console.print(f"interrupted; go on with: {again} {more}".rstrip(), markup=False)
        raise SystemExit(130) from None
