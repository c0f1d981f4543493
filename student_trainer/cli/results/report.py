"""`student-trainer report`: runs and comparisons as one page and as Markdown. Loads no torch before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from student_trainer.cli.asking import progress_console
from student_trainer.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_COMPARISON...", help="folders of `train` or `compare`")
    ],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="evaluation.json of `evaluate`, or a .jsonl of `infer`; may be given several times"),
    ] = None,
    out: Annotated[Path, typer.Option(help="the page; Markdown goes beside it as .md")] = Path("report.html"),
) -> None:
    """Make one HTML page, which needs no network, and Markdown of runs and comparisons.

    Runs stand side by side in one part, the first being the base; each comparison is a part of its own.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: must end in .html; Markdown is written beside it")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file, e.g. {out / 'report.html'}")
    console = progress_console()
    from student_trainer.comparison.reporting import write_page

    with console.status("reading"):
        written = write_page(sources, evaluation or [], out)
    for file in written:
        console.print(f"{file}  ({file.stat().st_size / 1e3:,.0f} kB)", markup=False)
