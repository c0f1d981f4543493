"""`student-trainer`: train. Loads neither torch nor ray before a command needs them.

Exit codes: 0 done, 1 a fault of ours, 2 something the user can mend (one line says what and where), 130 interrupted.
"""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from student_trainer.config import load_config
from student_trainer.errors import ConfigError, StudentError
from teacher_wire.errors import TeacherWireError

app = typer.Typer(
    help="Train a student on a served teacher's labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Keeps `train` a subcommand while it is the only one."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. train.max_steps=100")] = None,
    resume: Annotated[str, typer.Option(help="auto: go on from the newest complete checkpoint")] = "no",
) -> None:
    """Train a student."""
    if resume not in ("auto", "no"):
        raise ConfigError(f"--resume {resume}: choose auto or no")
    loaded = load_config(config, overrides)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    from student_trainer.train import train as run

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's word: end in order, as on Ctrl-C
    try:
        result = run(loaded, resume=resume == "auto", console=console)
    except KeyboardInterrupt:
        again = shlex.join([str(config), *(overrides or [])])
        console.print(f"interrupted; go on with: student-trainer train {again} --resume auto", markup=False)
        raise SystemExit(130) from None
    figures = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    console.print(f"[bold green]done[/] {result.steps} steps  {figures}\nmodel: {result.output_dir / 'final'}")


@app.command()
def traces(
    config: Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value")] = None,
    resume: Annotated[str, typer.Option(help="auto: go on with the run in output_dir")] = "no",
) -> None:
    """Ask a teacher for reasoning traces, verify them, and write them as rows to train on."""
    if resume not in ("auto", "no"):
        raise ConfigError(f"--resume {resume}: choose auto or no")
    from student_trainer.traces.config import load_traces_config

    loaded = load_traces_config(config, overrides)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    from student_trainer.traces.run import make_traces

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = make_traces(loaded, resume=resume == "auto", console=console)
    except KeyboardInterrupt:
        again = shlex.join([str(config), *(overrides or [])])
        console.print(f"interrupted; go on with: student-trainer traces {again} --resume auto", markup=False)
        raise SystemExit(130) from None
    console.print(f"[bold green]done[/] {result.output_dir / 'traces.jsonl'}")


def main() -> None:
    """The console script: one line and exit code 2 for what the user can mend."""
    try:
        app()
    except (StudentError, TeacherWireError) as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        print(f"student-trainer: {error}{f' ({notes})' if notes else ''}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
