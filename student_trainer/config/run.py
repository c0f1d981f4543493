"""The trainer's configuration: frozen, strict, parsed before torch is imported.

In: a YAML file and `section.field=value` overrides; out: `TrainConfig`. An unknown key is an error
that names the key; nothing here builds anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from student_trainer.config.data import DataConfig
from student_trainer.config.fields import AbsolutePath
from student_trainer.config.files import Settings, parse_as, read_tree
from student_trainer.config.losses import LossConfig
from student_trainer.config.model import ModelConfig
from student_trainer.config.on_policy import OnPolicyConfig
from student_trainer.config.teachers import (
    CacheConfig,
    Combine,
    ContextConfig,
    FeedConfig,
    LabelConfig,
    OneOfTeachersConfig,
    TeacherConfig,
    WhenMissing,
)
from student_trainer.config.traces import GenerateConfig
from student_trainer.config.training import OptimizationConfig
from student_trainer.errors import ConfigError


class RunConfig(Settings):
    """Where the run lives and what makes it repeatable.

    Attributes:
        output_dir: folder of this run; must not hold another run. Kept absolute, as `cache_dir`; `~` is the home directory.
        seed: of initialisation, order and dropout.
        cache_dir: shared by all runs of this machine (labels, tokenised rows, output heads).
    """

    output_dir: AbsolutePath
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    cache_dir: Annotated[AbsolutePath, Field(validate_default=True)] = Path("~/.cache/lyceum")


class TrainConfig(Settings):
    """Everything `student-trainer train` needs."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    teacher: TeacherConfig | None = None
    teachers: tuple[OneOfTeachersConfig, ...] = ()
    combine: Combine = "loss_sum"
    when_missing: WhenMissing = "wait"
    labels: LabelConfig = LabelConfig()
    loss: LossConfig = LossConfig()
    on_policy: OnPolicyConfig | None = None
    generate: GenerateConfig | None = None
    train: OptimizationConfig = OptimizationConfig()
    feed: FeedConfig = FeedConfig()
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _teacher_for_distillation(self) -> TrainConfig:
        if self.loss.output is not None and not self.every_teacher:
            raise ValueError("loss.output needs a teacher: set the section teacher or teachers, or loss.output to null")
        if self.teacher is not None and self.teachers:
            raise ValueError("teacher and teachers: set one of them; a single teacher is a list of one too")
        called = [teacher.called for teacher in self.teachers]
        if len(set(called)) < len(called) or (len(called) > 1 and "" in called):
            raise ValueError(
                f"teachers are called {', '.join(map(repr, called))}: give each another name, or another alias"
            )
        if not self.teachers and (self.combine != "loss_sum" or self.when_missing != "wait"):
            raise ValueError("combine and when_missing belong to the section teachers, which is empty")
        if self.train.eval_steps and not self.data.eval:
            raise ValueError("train.eval_steps needs data.eval")
        if self.train.save_steps % self.train.log_steps:
            # A log entry is a mean since the last one: after a resumption between two entries it would be another mean.
            raise ValueError(
                f"train.save_steps={self.train.save_steps} must be a multiple of train.log_steps={self.train.log_steps}"
            )
        return self

    @property
    def every_teacher(self) -> tuple[TeacherConfig, ...]:
        """Every teacher that the run learns from: none, the one of the section `teacher`, or those of `teachers`."""
        return self.teachers if self.teacher is None else (self.teacher,)

    @property
    def context(self) -> ContextConfig | None:
        """What of each row the teacher alone is told; None for nothing."""
        return self.teacher.context if self.teacher else None


TOKENS = "tokens"  # folder of tokenised rows in a cache folder


def labels_folder(cache_dir: Path) -> Path:
    """Where labels are kept.

    Raises:
        ConfigError: `~`, and this user has no home.
    """
    return cache_folder(cache_dir) / "labels"


def cache_folder(cache_dir: Path) -> Path:
    """The folder that all runs of this machine share.

    Raises:
        ConfigError: `~`, and this user has no home.
    """
    try:
        return cache_dir.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{cache_dir}: there is no home folder (HOME is not set): set --cache-dir, in a config run.cache_dir"
        ) from error


def load_config(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a config file and applies `section.field=value` overrides.

    Raises:
        ConfigError: one line that names file and key.
    """
    return parse_config(read_tree(path.expanduser(), overrides), str(path))


def parse_config(tree: dict[str, Any], origin: str) -> TrainConfig:
    """A config from plain data.

    Raises:
        ConfigError: one line that names `origin` and every wrong key.
    """
    return parse_as(TrainConfig, tree, origin)


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
