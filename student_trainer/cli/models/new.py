"""`student-trainer new`: a student made from a teacher. Loads no torch before it runs."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from student_trainer.cli.asking import progress_console
from student_trainer.errors import ConfigError

if TYPE_CHECKING:
    from student_trainer.making.new import Made

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def new(
    out: Annotated[Path, typer.Argument(help="the student's folder; must not exist")],
    teacher: Annotated[str, typer.Option("--from", help="the teacher: a folder or a hub id", metavar="TEACHER")],
    layers: Annotated[int | None, typer.Option(help="how many layers the student has")] = None,
    by: Annotated[
        str, typer.Option(help="which layers are kept: even (spaced, first and last among them) or influence")
    ] = "even",
    sample: Annotated[str | None, typer.Option(help="rows that --by influence is measured on: path, or path#N")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="longest row of the sample")] = 2048,
    width: Annotated[
        str | None, typer.Option(help="a published size of the family, such as 0.5b; its weights are random")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of random weights")] = 0,
    dtype: Annotated[str | None, typer.Option(help="of random weights; the teacher's if not given")] = None,
    data: Annotated[str | None, typer.Option(help="rows that student.yaml names for training")] = None,
) -> None:
    """Make a student from a teacher, with a starter config for the pair."""
    if by not in ("even", "influence"):
        raise ConfigError(f"--by {by}: choose even or influence")
    console = progress_console()
    from student_trainer.making.new import NewStudent, make_student

    asked = NewStudent(out.expanduser(), teacher, layers, by, sample, width, data, max_tokens, seed, dtype)  # type: ignore[arg-type]
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a scheduler's word: nothing is left behind, as on Ctrl-C
    try:
        made = make_student(asked, console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was left behind")
        raise SystemExit(130) from None
    _tell(made, data or sample)


def _tell(made: Made, rows: str | None) -> None:
    console = progress_console()
    ours, whole = made.parameters
    console.print(
        f"[bold green]done[/] {escape(str(made.folder))}: {ours:,} parameters, {ours / whole:.1%} of the teacher's {whole:,}"
    )
    if made.influence:
        from rich.table import Table

        table = Table(
            "layer", "influence", "", title="1 - cos(state before, state after) of each layer", title_justify="left"
        )
        for number, value in enumerate(made.influence):
            table.add_row(str(number), f"{value:.4f}", "kept" if number in made.kept else "[dim]taken out[/]")
        console.print(table)
    elif made.kept:
        console.print(f"layers of the teacher that were kept: {', '.join(map(str, made.kept))}")
    for note in made.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    folder = shlex.quote(str(made.folder))
    if rows is None:
        console.print("next: name your rows in data.train of student.yaml, then")
    console.print(f"  teacher-server up {folder}/teacher.yaml", markup=False)
    console.print(f"  student-trainer plan {folder}/student.yaml", markup=False)
    console.print(f"  student-trainer train {folder}/student.yaml", markup=False)
