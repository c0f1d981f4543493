"""`student-trainer doctor`: what is wrong around a run, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from student_trainer.cli.asking import Overrides

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_STYLES = {"ok": "green", "note": "yellow", "bad": "bold red"}


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a run; without it the machine alone is looked at")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Look at versions, GPU, disks, limits, clock, proxies, TLS and teachers; start and change nothing. Exits with 1 if something is bad."""
    from student_trainer.planning.doctor import examine
    from teacher_wire.diagnosis import report

    checks = list(examine(config, overrides))
    if as_json:
        print(report.as_json(checks))
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for check in checks:
            told = escape(check.what) + (f"\n[dim]fix:[/] {escape(check.fix)}" if check.fix else "")
            table.add_row(f"[{_STYLES[check.state]}]{check.state}[/]", escape(check.subject), told)
        console = Console(highlight=False)
        console.print(table)
        console.print(report.summary(checks))
    if not report.is_well(checks):
        raise typer.Exit(1)
