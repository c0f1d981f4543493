"""Equal time: how many optimizer steps of each arm fit into so many minutes of training, from a short run of each.

In: a comparison; out: steps by arm, kept in its folder, so that a comparison that goes on has the same. A schedule needs to know its end
before it begins, so the steps are counted first and the runs then make all of theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from student_trainer.comparison.arms import Arm
from student_trainer.comparison.ledger import Watch
from student_trainer.comparison.plan import Comparison
from student_trainer.config.run import TrainConfig
from student_trainer.errors import RunError
from student_trainer.files import read_object, write_whole

PACE_NAME = "pace.json"
PILOT_STEPS, WARM_STEPS = 24, 6  # of which the first are left out: loading kernels, compiling, the first labels


def steps_of_arms(
    comparison: Comparison, trains: Callable[[TrainConfig, Watch], Any], tell: Callable[[str], None]
) -> dict[str, int]:
    """Optimizer steps of each arm within `comparison.minutes` of training, waiting for labels included; at least one.

    Raises:
        RunError: pace.json is damaged.
        StudentError, TeacherWireError: a pilot cannot be trained.
    """
    assert comparison.minutes is not None
    file = comparison.folder / PACE_NAME
    seconds: dict[str, float] = {}
    if file.is_file():
        try:
            seconds = {str(name): float(value) for name, value in read_object(file)["seconds_per_step"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{file} is damaged ({error}): delete it, and steps are measured again") from error
    for arm in comparison.arms:
        if arm.name not in seconds:
            seconds[arm.name] = _seconds_per_step(comparison, arm, trains)
            write_whole(file, json.dumps({"seconds_per_step": seconds}, indent=1) + "\n")
    steps = {arm.name: max(1, int(comparison.minutes * 60 / seconds[arm.name])) for arm in comparison.arms}
    for name, count in steps.items():
        tell(f"{name}: {seconds[name]:.3g} s per step, so {count:,} steps in {comparison.minutes:g} min")
    return steps


def _seconds_per_step(comparison: Comparison, arm: Arm, trains: Callable[[TrainConfig, Watch], Any]) -> float:
    """Of a run of `PILOT_STEPS` steps with the first seed, whose folder goes again."""
    config = comparison.config(arm, comparison.seeds[0], steps=PILOT_STEPS)
    folder = comparison.folder / "pilots" / arm.name
    shutil.rmtree(folder, ignore_errors=True)
    watch = Watch(lambda step: None, lambda step, seconds: None)
    try:
        trains(_pilot(config, folder), watch)
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
    warm_s, all_s = watch.ended_s[WARM_STEPS - 1], watch.ended_s[-1]
    return max(1e-6, (all_s - warm_s) / (len(watch.ended_s) - WARM_STEPS))


def _pilot(config: TrainConfig, folder: Any) -> TrainConfig:
    """The same run with nothing measured or kept."""
    quiet = {"eval_steps": 0, "save_steps": 0, "report_to": ()}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": folder}),
            "data": config.data.model_copy(update={"eval": ()}),
            "train": config.train.model_copy(update=quiet),
        }
    )
