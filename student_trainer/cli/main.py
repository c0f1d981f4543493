"""`student-trainer`: train, label, plan, traces, cache. Loads neither torch nor ray before a command needs them.

Exit codes: 0 done; 1 numbers of a run that are not finite (one line), or a fault of ours (a traceback); 2 something the user can mend
(one line says what and where); 3 one of several teachers is away, and the run can be resumed when it is back; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from student_trainer.cli.labels import app as cache_app
from student_trainer.cli.plan import plan
from student_trainer.config.run import load_config
from student_trainer.errors import ConfigError, StudentError
from teacher_wire.core.errors import TeacherWireError

app = typer.Typer(
    help="Train a student on a served teacher's labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app, name="cache")
app.command()(plan)


ConfigFile = Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. train.max_steps=100")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto: go on from the newest complete checkpoint")] = "no",
    allow_other_teachers: Annotated[
        bool,
        typer.Option("--allow-other-teachers", help="with --resume: go on with other teachers; recorded in run.json"),
    ] = False,
) -> None:
    """Train a student."""
    if resume not in ("auto", "no"):
        raise ConfigError(f"--resume {resume}: choose auto or no")
    if allow_other_teachers and resume != "auto":
        raise ConfigError("--allow-other-teachers: is for a run that is taken up: add --resume auto")
    loaded = load_config(config, overrides)
    console = _console()
    from student_trainer.training.run import train as run

    with _going_on(console, "train", config, overrides, "--resume auto"):
        result = run(loaded, resume=resume == "auto", console=console, allow_other_teachers=allow_other_teachers)
    figures = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    console.print(f"[bold green]done[/] {result.steps} steps  {figures}")
    if result.usage is not None and result.usage.tokens:
        usage = result.usage
        console.print(f"labels: {usage.disk_tokens:,} tokens from disk, {usage.teacher_tokens:,} from the teacher")
    console.print(f"model: {result.output_dir / 'final'}")


@app.command()
def label(
    config: ConfigFile,
    overrides: Overrides = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="let the teacher write the answers of data.train, as rows to train on")
    ] = False,
) -> None:
    """Ask for the labels of a run ahead of it; those that are on disk already are skipped."""
    loaded = load_config(config, overrides)
    console = _console()
    if generate:
        from student_trainer.traces.seq_kd.run import ROWS, generate_rows

        with _going_on(console, "label --generate", config, overrides, ""):
            made = generate_rows(loaded, console)
        console.print(f"[bold green]done[/] {made.stats.written:,} rows are in {made.output_dir / ROWS}")
        return
    from student_trainer.training.label_ahead import label as run

    with _going_on(console, "label", config, overrides, ""):
        filled = run(loaded, console)
    usage = filled.usage
    console.print(
        f"[bold green]done[/] labels of {usage.sequences:,} sequences, {usage.tokens:,} tokens, "
        f"{filled.bytes / 2**20:,.1f} MB are on disk; {usage.disk_share:.0%} of the sequences were there before"
    )


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _going_on(console: Console, command: str, config: Path, overrides: list[str] | None, more: str) -> Iterator[None]:
    """Ends in order when interrupted, and says by which command to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's word: end in order, as on Ctrl-C
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["student-trainer", *command.split(), str(config), *(overrides or [])])
        console.print(f"interrupted; go on with: {again} {more}".rstrip(), markup=False)
        raise SystemExit(130) from None


@app.command()
def traces(
    config: Annotated[Path, typer.Argument(help="YAML file, see deploy/examples/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value")] = None,
    resume: Annotated[str, typer.Option(help="auto: go on with the run in output_dir")] = "no",
) -> None:
    """Ask a teacher for reasoning traces, verify them, and write them as rows to train on."""
    if resume not in ("auto", "no"):
        raise ConfigError(f"--resume {resume}: choose auto or no")
    from student_trainer.config.traces import load_traces_config

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
    """The console script: one line and an exit code for what is known to go wrong."""
    try:
        app()
    except (StudentError, TeacherWireError) as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        print(f"student-trainer: {error}{f' ({notes})' if notes else ''}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 2)) from None
