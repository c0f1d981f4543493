"""`student-trainer label`: labels, or the teacher's own answers, ahead of a run. Loads no torch before it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from student_trainer.cli.asking import ConfigFile, Overrides, going_on, progress_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def label(
    config: ConfigFile,
    overrides: Overrides = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="let the teacher write the answers of data.train, as rows to train on")
    ] = False,
) -> None:
    """Ask for the labels of a run ahead of it; those that are on disk already are skipped."""
    from student_trainer.config.run import load_config

    loaded = load_config(config, overrides)
    console = progress_console()
    if generate:
        from student_trainer.traces.seq_kd.run import ROWS, generate_rows

        with going_on(console, "label --generate", config, overrides, ""):
            made = generate_rows(loaded, console)
        console.print("[bold green]done[/]", end=" ")
        console.print(f"{made.stats.written:,} rows are in {made.output_dir / ROWS}", markup=False)
        return
    from student_trainer.training.label_ahead import label as run

    with going_on(console, "label", config, overrides, ""):
        filled = run(loaded, console)
    usage = filled.usage
    console.print(
        f"[bold green]done[/] labels of {usage.sequences:,} sequences, {usage.tokens:,} tokens, "
        f"{filled.bytes / 2**20:,.1f} MB are on disk; {usage.disk_share:.0%} of the sequences were there before"
    )
