"""What a comparison is: arms, seeds and a budget over one config; and its folder, which only the same comparison goes on with.

In: the arms and the config's plain data; out: a resolved config for every arm and seed, each checked before the first run begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from student_trainer.comparison.arms import Arm, Tree
from student_trainer.comparison.reading import changed
from student_trainer.config.run import TrainConfig, parse_config
from student_trainer.errors import ConfigError, RunError
from student_trainer.files import read_object, write_whole

ARMS_NAME = "arms.json"
RUNS_NAME = "arms"  # folder of the runs
_CHECKPOINTS = 4  # of a run whose config says nothing of them
# Of `run_folder.decisive`, what a comparison decides itself; and the settings that decide rows and weights, which a run knows as digests.
_OWN = ("run.seed", "run.output_dir")
_BY_DIGEST = ("data", "model")
_HOW = ("threads", "compiled", "graphs")  # of `model`: how it is computed


@dataclass(frozen=True)
class Comparison:
    """Arms, seeds and what each of them is given.

    Attributes:
        tree: the config's plain data.
        origin: where it is from, for errors.
        arms: the first is the base that the others are compared with.
        seeds: of every arm.
        folder: of the comparison.
        equal: `steps`, or `time`: as many steps as fit into `minutes` of training.
        minutes: of training per run.
        of_seed: changes the plain data for a seed, such as another student; none by default.
    """

    tree: Tree
    origin: str
    arms: Sequence[Arm]
    seeds: Sequence[int]
    folder: Path
    equal: Literal["steps", "time"] = "steps"
    minutes: float | None = None
    of_seed: Callable[[Tree, int], Tree] = field(default=lambda tree, seed: tree)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names:
            raise ConfigError("compare: no arm is named: --arms sft gkd, for one")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"compare: arm {twice[0]!r} is there twice: give one of them another name")
        if (self.equal == "time") != (self.minutes is not None):
            raise ConfigError(
                f"compare: --equal {self.equal} "
                + (
                    "needs --minutes, of training per run"
                    if self.equal == "time"
                    else "has no --minutes: add --equal time"
                )
            )

    @property
    def base(self) -> str:
        """The name of the first arm."""
        return self.arms[0].name

    def config(self, arm: Arm, seed: int, steps: int | None = None) -> TrainConfig:
        """The resolved config of a run.

        Args:
            steps: optimizer steps under equal time.

        Raises:
            ConfigError: the arm cannot be made from this config; names both.
        """
        tree = self.of_seed(arm.of(self.tree), seed)
        run = tree.get("run")
        placed = {"output_dir": str(self.run_folder(arm, seed)), "seed": seed}
        tree = {**tree, "run": {**run, **placed} if isinstance(run, Mapping) else placed}
        if steps is not None:
            tree = _with(tree, "train", max_steps=steps)
        made = parse_config(tree, f"{self.origin}, arm {arm.name}")
        if not made.data.eval:
            raise ConfigError(
                f"{self.origin}: data.eval is empty, and arms are compared by held-out rows: set it, e.g. data.eval='[rows.jsonl#200]'"
            )
        return made.model_copy(update={"train": _with_checkpoints(made)})

    def run_folder(self, arm: Arm, seed: int) -> Path:
        """Where a run lies."""
        return self.folder / RUNS_NAME / f"{arm.name}-{seed}"

    def configs(self) -> dict[str, TrainConfig]:
        """That of every arm with the first seed, each checked.

        Raises:
            ConfigError: one cannot be made, or arms at equal steps differ in what decides their number.
        """
        found = {arm.name: self.config(arm, self.seeds[0]) for arm in self.arms}
        base = found[self.base]
        for name, config in found.items():
            for setting in ("max_steps", "epochs") if self.equal == "steps" else ():
                ours, theirs = (getattr(c.train, setting) for c in (config, base))
                if ours != theirs and not (setting == "epochs" and base.train.max_steps is not None):
                    raise ConfigError(
                        f"arm {name}: train.{setting}={ours} and {theirs} in arm {self.base}: at equal steps they must be the same; "
                        "for another budget use --equal time"
                    )
        return found


def _with(tree: Tree, section: str, **settings: Any) -> Tree:
    there = tree.get(section)
    return {**tree, section: {**there, **settings} if isinstance(there, Mapping) else settings}


def _with_checkpoints(config: TrainConfig) -> Any:
    """The section `train` by which a killed run goes on: one checkpoint at a time, if the config itself keeps none."""
    train = config.train
    if train.save_steps:
        return train
    steps = train.max_steps or 100 * train.log_steps
    every = (
        max(1, steps // _CHECKPOINTS // train.log_steps) * train.log_steps
    )  # a multiple of log_steps, as TrainConfig asks
    return train.model_copy(update={"save_steps": every, "keep_checkpoints": 1})


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What decides what an arm computes, rows and starting weights included, by dotted name; without folder and seed. Loads torch."""
    from student_trainer.training.run_folder import decisive

    found = decisive(config)
    dumped = config.model_dump(mode="json")
    for section in _BY_DIGEST:
        found |= {f"{section}.{name}": value for name, value in dumped[section].items() if name not in _HOW}
    return {name: value for name, value in found.items() if name not in _OWN and name != "train.max_steps"}


def open_comparison(comparison: Comparison, configs: Mapping[str, TrainConfig]) -> None:
    """Makes the folder of a comparison, which must be locked, or takes up the one that is there; further arms and seeds may be added to it.

    Raises:
        RunError: another comparison lies there, an arm had other settings, or its file is damaged.
    """
    file = comparison.folder / ARMS_NAME
    budget = {"equal": comparison.equal, "minutes": comparison.minutes}
    steps = {name: config.train.max_steps for name, config in configs.items()}
    # Through JSON, so that what is compared has the types of what was read.
    now = json.loads(
        json.dumps({name: settings_of(config) | {"train.max_steps": steps[name]} for name, config in configs.items()})
    )
    arms: dict[str, Any] = {}
    if file.is_file():
        try:
            before = read_object(file)
            arms, given = dict(before["arms"]), dict(before["budget"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} is damaged ({error}): put it back, or choose another folder with --out") from error
        if given != budget:
            raise RunError(
                f"{comparison.folder}: was begun at equal {given.get('equal')} ({given.get('minutes') or 'no'} minutes), not at equal "
                f"{comparison.equal} ({comparison.minutes or 'no'} minutes): go on with the old ones, or choose another folder with --out"
            )
        for name in (name for name in now if name in arms):
            if other := changed(arms[name], now[name]):
                told = ", ".join(
                    f"{key}: {arms[name].get(key)!r} -> {value!r}"[:160] for key, value in list(other.items())[:4]
                )
                raise RunError(
                    f"{comparison.folder}: arm {name} was begun with other settings ({told}): go on with the old ones, or choose another "
                    "folder with --out"
                )
    elif any(comparison.folder.glob(f"{RUNS_NAME}/*")):
        raise RunError(f"{comparison.folder}: holds runs and no {ARMS_NAME}: choose another folder with --out")
    write_whole(file, json.dumps({"format": 1, "budget": budget, "arms": {**arms, **now}}, indent=1) + "\n")
