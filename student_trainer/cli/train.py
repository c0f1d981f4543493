"""`student-trainer train`. Loads no torch before it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from student_trainer.cli.asking import ConfigFile, Overrides, going_on, progress_console
from student_trainer.config.run import load_config
from student_trainer.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
    console = progress_console()
    from student_trainer.training.run import train as run

    with going_on(console, "train", config, overrides, "--resume auto"):
        result = run(loaded, resume=resume == "auto", console=console, allow_other_teachers=allow_other_teachers)
    figures = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    console.print(f"[bold green]done[/] {result.steps} steps  {figures}")
    if result.usage is not None and result.usage.tokens:
        usage = result.usage
        console.print(f"labels: {usage.disk_tokens:,} tokens from disk, {usage.teacher_tokens:,} from the teacher")
    console.print(f"model: {result.output_dir / 'final'}")
