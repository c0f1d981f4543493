"""`student-trainer cache`: what labels, output heads and tokenised rows there are on this machine, whether they are whole, and what may go.

Options and help alone; `cli/kept.py` does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from student_trainer.cli.asking import AsJson

app = typer.Typer(help="Look after the labels on this machine's disk.", no_args_is_help=True, add_completion=False)

CacheDir = Annotated[Path, typer.Option("--cache-dir", help="run.cache_dir of the runs that share it")]
Teacher = Annotated[str, typer.Option(help="only labels of the teacher whose fingerprint begins so")]
_DEFAULT = Path("~/.cache/lyceum")


@app.command()
def stats(cache_dir: CacheDir = _DEFAULT, as_json: AsJson = False) -> None:
    """List the labels by teacher and transport, the teachers that are known, their output heads, and the tokenised datasets."""
    from student_trainer.cli import kept

    kept.stats(cache_dir, as_json=as_json)


@app.command()
def verify(cache_dir: CacheDir = _DEFAULT, as_json: AsJson = False) -> None:
    """Read everything; delete what is damaged. Exit code 1 if something was, or could not be read."""
    from student_trainer.cli import kept

    kept.verify(cache_dir, as_json=as_json)


@app.command()
def prune(
    cache_dir: CacheDir = _DEFAULT,
    max_gb: Annotated[float | None, typer.Option(min=0, help="delete the longest unused until so much is left")] = None,
    teacher: Teacher = "",
    older_than_days: Annotated[float | None, typer.Option(min=0, help="only labels not used for so long")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete labels, output heads and tokenised datasets: what fits every option given. --teacher spares what belongs to no one teacher."""
    from student_trainer.cli import kept

    kept.prune(
        cache_dir,
        max_gb=max_gb,
        teacher=teacher,
        older_than_days=older_than_days,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def export(
    to: Annotated[Path, typer.Argument(help="folder that can be --cache-dir or run.cache_dir on another machine")],
    cache_dir: CacheDir = _DEFAULT,
    teacher: Teacher = "",
    as_json: AsJson = False,
) -> None:
    """Copy labels, each verified, into another cache folder, with what training without their teacher needs; what is there stays."""
    from student_trainer.cli import kept

    kept.export(to, cache_dir, teacher=teacher, as_json=as_json)
