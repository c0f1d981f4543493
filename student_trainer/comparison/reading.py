"""A run folder as an outcome: what a run left, whole or broken off, without loading a model.

In: the folder of a run, of a comparison, or a comparison.json; out: an `Outcome`. Reads only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from student_trainer.config.losses import as_used
from student_trainer.errors import DataError
from student_trainer.evaluation.outcome import (
    FILE_NAME,
    Budget,
    Cost,
    Layers,
    Outcome,
    RunOutcome,
    finite,
    read_outcome,
)
from student_trainer.files import read_object

# As `training.run_folder` names them, which loads torch; a test keeps them equal.
CONFIG_NAME, IDENTITY_NAME, LAYERS_NAME, LOG_NAME, RESULT_NAME = (
    "config.yaml", "run.json", "layers.json", "train_log.jsonl", "result.json",
)  # fmt: skip


def is_run(path: Path) -> bool:
    """Whether a folder is one of `train`, and not of a comparison."""
    return (path / IDENTITY_NAME).is_file() and not (path / FILE_NAME).is_file()


def read_source(path: Path) -> Outcome:
    """A comparison by its folder or file, or a run by its folder.

    Raises:
        DataError: there is neither, or it cannot be read.
    """
    path = path.expanduser()
    if path.is_file():
        return read_outcome(path)
    if (path / FILE_NAME).is_file():
        return read_outcome(path / FILE_NAME)
    if is_run(path):
        return of_runs([path])
    if not path.is_dir():
        raise DataError("is not there: give the folder of a run or of a comparison", file=str(path))
    raise DataError(f"holds neither {FILE_NAME} (of `compare`) nor {IDENTITY_NAME} (of `train`)", file=str(path))


def of_runs(folders: Sequence[Path]) -> Outcome:
    """Runs that were not made to be compared, side by side: each an arm of its own, called as its folder; the first is the base."""
    names = _names(folders)
    configs = [_config(folder) for folder in folders]
    settings = [_settings(folder) for folder in folders]
    runs = []
    for name, folder, config, own in zip(names, folders, configs, settings, strict=True):
        seed = config.get("run", {}).get("seed", 0) if isinstance(config.get("run"), Mapping) else 0
        other = {key: value for key, value in changed(settings[0], own).items() if key != "run.seed"}
        runs.append(read_run(folder, name, seed if isinstance(seed, int) else 0, settings=other))
    seeds = sorted({run.seed for run in runs})
    notes = []
    if any(run.cost.train_s is not None for run in runs):
        notes.append(
            "The time of these runs is what the command train logs at its end, of its last process, measuring and saving included."
        )
    if len(runs) > 1 and len(seeds) > 1:
        notes.append("These runs have different seeds: no difference between them is paired.")
    steps = {run.name: run.steps for run in runs}
    if len(set(steps.values())) > 1:
        notes.append("These runs made different numbers of steps.")
    for name, folder, config in zip(names, folders, configs, strict=True):
        if unread := _log(folder)[1]:
            notes.append(f"{name}: lines of {LOG_NAME} that cannot be read, and are no part of its curve: {unread:,}.")
        if not config:
            notes.append(f"{name}: its {CONFIG_NAME} cannot be read, so no settings of it are shown.")
    return Outcome(
        title=" · ".join(names),
        base=names[0],
        budget=Budget(steps={name: count for name, count in steps.items() if count}),
        seeds=seeds,
        arms=runs,
        notes=notes,
        config=configs[0],
    )


def _names(folders: Sequence[Path]) -> list[str]:
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def read_run(
    folder: Path,
    name: str,
    seed: int,
    *,
    settings: Mapping[str, Any] | None = None,
    cost: Cost | None = None,
    error: str = "",
) -> RunOutcome:
    """What a run has left so far.

    Args:
        name, seed: of the arm.
        settings, cost: as in `RunOutcome`.
        error: that ended it; a finished run has none.
    """
    curve, _ = _log(folder)
    finished = _result(folder)
    done = finished is not None
    result = finished or {"steps": int(curve[-1]["step"]) if curve else 0, "metrics": {}}
    return RunOutcome(
        name=name,
        seed=seed,
        state="done" if done else "failed" if error else "unfinished",
        error="" if done else error,
        steps=result["steps"],
        metrics=finite({key: value for key, value in result["metrics"].items() if _is_number(value)}),
        curve=curve,
        settings=dict(settings or {}),
        layers=_layers(folder),
        cost=cost or _cost(curve),
        folder=str(folder),
    )


def changed(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `other` that are other than in `base`, with None for those that it lacks."""
    base, other = as_used(base), as_used(other)
    keys = [*other, *(name for name in base if name not in other)]
    return {name: other.get(name) for name in keys if base.get(name) != other.get(name)}


def _result(folder: Path) -> dict[str, Any] | None:
    """What a finished run says of its end; None of a run that is not, or whose result is damaged and will be made again."""
    try:
        found = read_object(folder / RESULT_NAME)
    except (OSError, ValueError):
        return None
    return found if isinstance(found.get("steps"), int) and isinstance(found.get("metrics"), dict) else None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _log(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of the log, and how many lines are none."""
    try:
        lines = (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [], 0
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("step") is not None and _is_number(entry["step"]):
            found.append(finite(entry))
    return found, len(lines) - len(found)


def _layers(folder: Path) -> Layers | None:
    try:
        found = read_object(folder / LAYERS_NAME)
        return Layers(before=finite(found.get("before", {})), after=finite(found.get("after", {})))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _cost(curve: Sequence[Mapping[str, Any]]) -> Cost:
    """Of a run that nobody has watched: what transformers logs at its end."""
    seconds = [value for entry in curve if isinstance(value := entry.get("train_runtime"), int | float)]
    return Cost(train_s=seconds[-1] if seconds else None)


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = read_object(folder / IDENTITY_NAME)["settings"]
    except (OSError, ValueError, KeyError):
        return {}
    return dict(found) if isinstance(found, dict) else {}
