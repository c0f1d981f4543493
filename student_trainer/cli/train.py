"""`student-trainer train`. Loads no torch before it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from student_trainer.cli.asking import (
    AsJson,
    ConfigFile,
    Overrides,
    Resume,
    ResumeFrom,
    going_on,
    print_json,
    progress_console,
    resuming,
)
from student_trainer.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    allow_other_teachers: Annotated[
        bool,
        typer.Option("--allow-other-teachers", help="with --resume: go on with other teachers; recorded in run.json"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a student."""
    going = resuming(resume, resume_from)
    if allow_other_teachers and not going:
        raise ConfigError("--allow-other-teachers: is for a run that is taken up: add --resume")
    from student_trainer.config.run import load_config

    loaded = load_config(config, overrides)
    console = progress_console()
    from student_trainer.training.run import train as run

    with going_on(console, "train", config, overrides, "--resume"):
        result = run(loaded, resume=going, console=console, allow_other_teachers=allow_other_teachers)
    figures = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    console.print(f"[bold green]done[/] {result.steps} steps  {figures}")
    if result.usage is not None and result.usage.tokens:
        usage = result.usage
        console.print(f"labels: {usage.disk_tokens:,} tokens from disk, {usage.teacher_tokens:,} from the teacher")
    console.print(f"model: {result.output_dir / 'final'}", markup=False)
    if as_json:
        print_json(
            {
                "output_dir": result.output_dir,
                "model": result.output_dir / "final",
                "steps": result.steps,
                "metrics": result.metrics,
                "labels": vars(result.usage) if result.usage else None,
            }
        )
