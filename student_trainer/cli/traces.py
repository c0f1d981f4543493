"""`student-trainer traces`. Loads no torch before it runs."""

from __future__ import annotations

import typer
from rich.markup import escape

from student_trainer.cli.asking import ConfigFile, Overrides, Resume, going_on, progress_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def traces(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Ask a teacher for reasoning traces, verify them, and write them as rows to train on."""
    from student_trainer.config.traces import load_traces_config

    loaded = load_traces_config(config, overrides)
    console = progress_console()
    from student_trainer.traces.run import make_traces

    with going_on(console, "traces", config, overrides, "--resume"):
        result = make_traces(loaded, resume=resume, console=console)
    file = result.output_dir / "traces.jsonl"
    if result.poor:
        stats = result.stats
        console.print(
            f"[bold red]ended with little[/]: only {stats.accepted:,} of {stats.samples:,} samples were accepted ({stats.rate:.1%}; "
            f"accept.min_rate is {loaded.accept.min_rate:.0%}); read quarantine.jsonl before you train on {escape(str(file))}"
        )
    else:
        console.print(f"[bold green]done[/] {escape(str(file))}")
