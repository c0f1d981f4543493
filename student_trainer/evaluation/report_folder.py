"""The folder of a comparison: plots, report.md and, last, report.json, each replaced whole.

In: `Results` and the points of the curves; out: files. What they say is in `report`, how they are drawn in `plots`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from student_trainer.evaluation.plots import write_plots
from student_trainer.evaluation.report import CurvePoint, Results, as_json, as_markdown
from student_trainer.files import write_whole


def write_report(folder: Path, results: Results, curves: Sequence[CurvePoint] = ()) -> None:
    """Write the plots, report.md and, last, report.json into `folder`, which is made if missing.

    Raises:
        OSError: the disk does not take them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = write_plots(folder, results, curves)
    write_whole(folder / "report.md", as_markdown(results, plots))
    write_whole(folder / "report.json", json.dumps(as_json(results), indent=2, allow_nan=False) + "\n")
