"""`student-trainer plan`: a run before it is one, as tables for people.

Loads no torch before the command runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from student_trainer.cli.asking import ConfigFile, Overrides, Resume, progress_console

if TYPE_CHECKING:
    from student_trainer.findings import Finding
    from student_trainer.training.planning.plan import TeacherCoverage


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Show what a run would do: its resolved config, every finding, and what teachers of another tokenizer can teach.

    Asks the teachers, loads no weights, and writes nothing but the cache. Exits with 2 if the run could not start.
    """
    from student_trainer.config.run import load_config

    loaded = load_config(config, overrides)
    progress = progress_console()
    from rich.syntax import Syntax

    from student_trainer.training.planning.plan import plan as make

    made = make(loaded, progress, resume=resume)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Syntax(made.config, "yaml", background_color="default") if console.is_terminal else made.config)
    for finding in made.findings:
        console.print(_line(finding))
    if made.coverage:
        console.print(_table(made.coverage))
        for taught in made.coverage:
            shares = ", ".join(f"{kind} {share:.1%}" for kind, share in taught.rows.kind_shares().items())
            console.print(f"groups of {escape(taught.name)} (student's tokens-teacher's): {shares or 'none'}")
    if not made.can_start:
        bad = sum(not finding.ok for finding in made.findings)
        console.print(f"[bold red]this run cannot start:[/] {bad} of {len(made.findings)} checks failed")
        raise typer.Exit(2)
    console.print("[bold green]this run can start[/]")


def _line(finding: Finding) -> str:
    """One finding, with its advice or what to change."""
    mark = "[red]bad [/]" if not finding.ok else "[yellow]note[/]" if finding.fix else "[green]ok  [/]"
    if finding.fix.startswith(finding.what):  # advice is a sentence of its own, as `train` prints it alone
        told = finding.fix
    else:
        told = finding.what + (f": {finding.fix}" if finding.fix and finding.fix not in finding.what else "")
    return f"{mark} {escape(finding.setting)}: {escape(told)}"


def _table(coverage: tuple[TeacherCoverage, ...]) -> Table:
    """A column per teacher with another tokenizer."""
    table = Table(
        title="what teachers with another tokenizer can teach (docs/cross_tokenizer.md)", title_justify="left"
    )
    table.add_column("")
    for taught in coverage:
        table.add_column(escape(taught.name), justify="right")
    figures = [taught.figures() for taught in coverage]
    for name in figures[0]:
        table.add_row(name, *(_shown(name, held[name]) for held in figures))
    return table


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"
