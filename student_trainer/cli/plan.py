"""`student-trainer plan`: a run before it is one, as tables for people or as one JSON object.

Loads no torch before the command runs.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from student_trainer.cli.asking import ConfigFile, Overrides, Resume, progress_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
    allow_other_teachers: Annotated[
        bool, typer.Option("--allow-other-teachers", help="with --resume: with other teachers, as train has it")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="rows that are shown as tokens with their loss masks")] = 5,
    card: Annotated[
        str | None, typer.Option(help="plan for a card of this size, such as 24GiB, not this machine's")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="exit with 1 above this size, such as 24GiB, and name the cheapest way under it")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="load the student and time a few of its steps")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Show what a run would do: config, samples with loss masks, peak memory, label bytes, hours, teachers and every finding.

    Asks the teachers for a few labels, loads no weights without --measure, and writes nothing but the caches. Exits with 1 above the budget,
    with 2 if the run could not start.
    """
    from student_trainer.config.run import load_config
    from student_trainer.errors import ConfigError

    if allow_other_teachers and not resume:
        raise ConfigError("--allow-other-teachers: is for a run that is taken up: add --resume")
    loaded = load_config(config, overrides)
    progress = progress_console()
    from rich.markup import escape
    from rich.syntax import Syntax

    from student_trainer.planning.memory import parse_size
    from student_trainer.planning.plan import Asked
    from student_trainer.planning.plan import plan as make
    from student_trainer.planning.tables import as_data, shown, size

    limit = None if budget is None else parse_size(budget, "--budget")
    made = make(loaded, progress, Asked(resume, allow_other_teachers, samples, card, limit, budget, measure))
    if as_json:
        print(json.dumps(as_data(made, loaded.model_dump(mode="json"))))
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            Syntax(made.config, "yaml", background_color="default") if console.is_terminal else made.config,
            markup=False,
        )
        for part in shown(made, console):
            console.print(part)
    told = progress if as_json else Console(highlight=False, soft_wrap=True)
    if not made.can_start:
        bad = sum(not finding.ok for finding in made.findings)
        told.print(f"[bold red]this run cannot start:[/] {bad} of {len(made.findings)} checks failed")
        raise typer.Exit(2)
    if made.over_budget and made.memory is not None:
        way = f"; under it: {escape(made.way_out.overrides)}" if made.way_out is not None else ""
        told.print(f"[bold red]above the budget:[/] {size(made.memory.on_card)} of {budget}{way}", markup=True)
        raise typer.Exit(1)
    if limit is not None and made.memory is None:
        told.print("[bold red]whether it fits the budget is unknown:[/] its memory cannot be estimated (see the notes)")
        raise typer.Exit(1)
    told.print("[bold green]this run can start[/]")
