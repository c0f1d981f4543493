"""`best` and `last` in a run folder: which checkpoint was measured best, and which is the newest.

In: a run folder, and the log entries of its run; out: relative symlinks, or a file that holds the name where the file system has no
links. Nothing is remembered beside the log, which every checkpoint holds: a resumed run finds the same best. A thing of that name which
we did not make is left alone.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from student_trainer.files import sync, write_whole
from student_trainer.training.checkpoints import checkpoint

BEST, LAST = "best", "last"


def best_of(run_folder: Path, history: Sequence[Mapping[str, Any]], metric: str) -> Path | None:
    """The whole checkpoint whose held-out figure is the best, the earliest of equals; None if none was measured at its own step.

    Args:
        history: log entries with `step` and `eval_METRIC`.
        metric: a figure as in `train.best_metric`.
    """
    sign = -1.0 if metric.startswith("acc") else 1.0
    found = {
        int(entry["step"]): sign * float(entry[f"eval_{metric}"])
        for entry in history
        if entry.get(f"eval_{metric}") is not None and math.isfinite(entry[f"eval_{metric}"])
    }
    there = [folder for folder in checkpoint.all_ours(run_folder) if checkpoint.step_of(folder) in found]
    return min(there, key=lambda folder: (found[checkpoint.step_of(folder)], checkpoint.step_of(folder)), default=None)


def point(run_folder: Path, name: str, folder: Path | None, tell: Callable[[str], None] = lambda _: None) -> None:
    """Makes `name` in a run folder stand for a checkpoint of it, all or nothing; None takes it away.

    Args:
        tell: called with a sentence if something else has that name.

    Raises:
        OSError: the disk does not take it.
    """
    place = run_folder / name
    if os.path.lexists(place) and _named_in(place) is None:
        tell(f"{place} is not of this run and stays: no link {name!r} is made")
        return
    if folder is None:
        place.unlink(missing_ok=True)
        return
    if _named_in(place) == folder.name:
        return
    made = run_folder / f".{name}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        made.unlink()
    try:
        os.symlink(folder.name, made, target_is_directory=True)
    except (OSError, NotImplementedError):  # FAT, some network file systems
        write_whole(place, f"{folder.name}\n")
        return
    os.replace(made, place)
    sync(run_folder)


def resolve(run_folder: Path, name: str) -> Path | None:
    """The checkpoint that `best` or `last` stands for; None if there is no such name, or its checkpoint is gone."""
    found = _named_in(run_folder / name)
    return run_folder / found if found is not None and (run_folder / found).is_dir() else None


def update(
    run_folder: Path, history: Sequence[Mapping[str, Any]], metric: str, tell: Callable[[str], None] = lambda _: None
) -> Path | None:
    """Points both names at what they stand for now; returns the best checkpoint, which is not to be rotated away."""
    best = best_of(run_folder, history, metric)
    point(run_folder, BEST, best, tell)
    point(run_folder, LAST, checkpoint.newest_whole(run_folder), tell)
    return best


def _named_in(place: Path) -> str | None:
    """The checkpoint's name that a link or a file of ours holds; None if it is something else, or nothing."""
    try:
        said = os.readlink(place) if place.is_symlink() else place.read_text(encoding="utf-8")[:100].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return said if checkpoint.is_name(said) else None
