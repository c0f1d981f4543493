"""A whole run from a program: what `student-trainer train` does, with its result as a value and its errors as exceptions."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from student_trainer.config.files import override_tree, read_tree
from student_trainer.config.run import TrainConfig, parse_config
from student_trainer.training.run_folder import RunResult


def train(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    resume: bool = False,
    allow_other_teachers: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Trains a student.

    Args:
        config: a config file, its sections as plain data, or a parsed config.
        overrides: `section.field=value` texts as at the command line, or dotted names with values, such as {"train.max_steps": 100}.
        resume: go on from the newest complete checkpoint in `run.output_dir`, if there is one.
        allow_other_teachers: go on although the teachers have changed since the run was started.
        console: where progress is shown; None for standard error.

    Returns:
        Folder, steps, held-out figures and log entries of the run.

    Raises:
        ConfigError: an invalid config or override, named by its key.
        StudentError, TeacherWireError: whatever else a user can mend; nothing is left half-written.
    """
    texts = [*overrides] if not isinstance(overrides, Mapping) else [_override(*item) for item in overrides.items()]
    if isinstance(config, TrainConfig):
        parsed = parse_config(override_tree(config.model_dump(mode="json"), texts), "config") if texts else config
    elif isinstance(config, Mapping):
        parsed = parse_config(override_tree(copy.deepcopy(dict(config)), texts), "config")
    else:
        path = Path(config).expanduser()
        parsed = parse_config(read_tree(path, texts), str(config))
    from student_trainer.training.run import train as run

    return run(parsed, resume=resume, console=console, allow_other_teachers=allow_other_teachers)


def _override(name: str, value: Any) -> str:
    """As one would write it behind the config file; JSON is YAML, but for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name}={'.nan' if math.isnan(value) else '.inf' if value > 0 else '-.inf'}"
    return f"{name}={json.dumps(value, default=str)}"
