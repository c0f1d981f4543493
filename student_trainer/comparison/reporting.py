"""`student-trainer report`: what runs, comparisons and evaluations have left, as a page and as Markdown.

In: folders and files; out: two files. Runs nothing and loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from student_trainer.comparison.reading import is_run, of_runs, read_source
from student_trainer.evaluation.outcome import Evaluated, Outcome, Sample
from student_trainer.evaluation.page.answers import EVALUATION_NAME, read_evaluation
from student_trainer.evaluation.page.content import report_of
from student_trainer.evaluation.page.html import as_html
from student_trainer.evaluation.page.markdown import as_markdown
from student_trainer.files import disk_trouble_named, write_whole


def write_page(sources: Sequence[Path], evaluations: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Writes the page and the Markdown beside it, in place of older ones.

    Args:
        sources: folders of runs, which become one part together, and of comparisons, each a part.
        evaluations: further evaluation.json and answers; without them those that lie in `sources` are taken.
        out: the page.

    Raises:
        DataError: a source or an evaluation cannot be read, or the page would be too large.
        RunError: the disk does not take it.
    """
    report = report_of(outcomes_of(sources), *_evaluated(sources, evaluations))
    out = out.expanduser()
    beside = out.with_suffix(".md")
    with disk_trouble_named(f"--out {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(beside, as_markdown(report))
        write_whole(out, as_html(report))
    return out, beside


def outcomes_of(sources: Sequence[Path]) -> list[Outcome]:
    """Comparisons in their order, the runs together in the place of the first run.

    Raises:
        DataError: a source is neither, or cannot be read.
    """
    runs = [source.expanduser() for source in sources if is_run(source.expanduser())]
    found: list[Outcome] = []
    for source in sources:
        if source.expanduser() not in runs:
            found.append(read_source(source))
        elif source.expanduser() == runs[0]:
            found.append(of_runs(list(dict.fromkeys(runs))))
    return found


def _evaluated(sources: Sequence[Path], evaluations: Sequence[Path]) -> tuple[list[Evaluated], list[Sample]]:
    files = list(evaluations)
    if not files:
        beside = [
            (s if s.is_dir() else s.parent) / EVALUATION_NAME for s in (source.expanduser() for source in sources)
        ]
        files = [file for file in dict.fromkeys(beside) if file.is_file()]
    models: list[Evaluated] = []
    samples: list[Sample] = []
    for file in files:
        its_models, its_samples = read_evaluation(file)
        models += its_models
        samples += its_samples
    return models, samples
