"""The trainer's configuration: frozen, strict, parsed before torch is imported.

In: a YAML file and `section.field=value` overrides; out: `TrainConfig`. An unknown key is an error
that names the key; nothing here builds anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
from student_trainer.config.order.curriculum import CurriculumConfig, check_curriculum
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
        output_dir: folder of this run; it must not hold another run. Kept absolute, as `cache_dir` is; `~` is the home directory.
        seed: seed of initialisation, order and dropout.
        cache_dir: folder shared by all runs of this machine, for labels, tokenised rows and output heads.
    """

    output_dir: AbsolutePath
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    cache_dir: Annotated[AbsolutePath, Field(validate_default=True)] = Path("~/.cache/lyceum")


class TrainConfig(Settings):
    """Everything `student-trainer train` needs.

    Attributes:
        teacher: the one teacher to learn from. Set this or `teachers`; neither is needed if `loss.output` is null.
        teachers: several teachers to learn from, each with a weight and rows of its own.
        combine: how several teachers teach together: the weighted sum of their losses (`loss_sum`), the loss of their mixture (`prob_mix`),
            each row by the one teacher that has a tag of it (`route`), or weighted by how certain each is (`confidence`).
        when_missing: what is done while one of several teachers does not answer: `wait` for it, learn from the others alone (`reweight`),
            or `fail`.
    """

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
    curriculum: CurriculumConfig | None = None
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
        if not self.teachers and (self.combine != "loss_sum" or self.when_missing != "wait"):
            raise ValueError("combine and when_missing belong to the section teachers, which is empty")
        check_teachers(self.teachers, self.combine, self.labels, self.loss)
        self._check_tags()
        self._check_offline()
        if self.loss.output is not None:
            every = self.every_teacher
            check_curriculum(self.curriculum, [*map(self.labels_of, every)], [*map(self.keeps_labels, every)])
        if len(self.teachers) > 1 and self.on_policy is not None and self.on_policy.publish is not None:
            raise ValueError(
                "on_policy.publish belongs to one teacher, and there are several: set the section teacher, or publish to null"
            )
        check_packing(self)
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

    def _check_offline(self) -> None:
        """Refuses what a teacher that is not asked cannot do."""
        for teacher in self.every_teacher:
            if not teacher.offline:
                continue
            called = f" of teacher {teacher.called!r}" if self.teachers else ""
            if not self.keeps_labels(teacher):
                raise ValueError(f"teacher.offline=true{called} needs the labels on disk: set cache.labels to true")
            if extra := self.labels_of(teacher).extra_ids:
                raise ValueError(
                    f"labels.extra_ids={extra}: the student names other ids at every step, and labels by them are not kept, but the teacher is "
                    f"not asked (teacher.offline=true{called}): set it to 0, or offline to false"
                )
            if self.on_policy is not None:
                raise ValueError(
                    f"on_policy: only a teacher that is up can answer about what the student writes, and teacher.offline=true{called}: set "
                    "on_policy to null, or offline to false"
                )

    def _check_tags(self) -> None:
        """Refuses tags that decide nothing."""
        sources = (*self.data.train, *self.data.eval)
        has_tags = self.data.tag_field is not None or any(source.tags for source in sources)
        asks_by_tag = any(teacher.tags for teacher in self.teachers)
        if has_tags and not asks_by_tag:
            raise ValueError(
                "data.tag_field and the tags of sources say which teacher is asked about a row, and no teacher has tags: "
                "set teachers[].tags, or leave them out"
            )
        if asks_by_tag and not has_tags:
            raise ValueError("teachers[].tags: no row has tags: set data.tag_field, or data.train[].tags")

    @property
    def context(self) -> ContextConfig | None:
        """What of each row the only teacher alone is told; None for nothing. Several teachers are told each its own (`contexts`)."""
        every = self.every_teacher
        return every[0].context if len(every) == 1 else None

    @property
    def contexts(self) -> dict[str, ContextConfig]:
        """What of each row one of several teachers alone is told, by what the teacher is called."""
        if len(self.teachers) < 2:
            return {}
        return {teacher.called: teacher.context for teacher in self.teachers if teacher.context is not None}

    def labels_of(self, teacher: TeacherConfig) -> LabelConfig:
        """How a teacher's labels travel: as its own section says, else as the run's."""
        own = teacher.labels if isinstance(teacher, OneOfTeachersConfig) else None
        return self.labels if own is None else own

    def keeps_labels(self, teacher: TeacherConfig) -> bool:
        """Whether a teacher's labels are kept on disk and used."""
        own = teacher.cache if isinstance(teacher, OneOfTeachersConfig) else None
        return self.cache.labels if own is None else own

    def when_away(self, teacher: TeacherConfig) -> WhenMissing:
        """What is done while a teacher does not answer."""
        own = teacher.when_missing if isinstance(teacher, OneOfTeachersConfig) else None
        return self.when_missing if own is None else own

    def as_one(self) -> TrainConfig:
        """The same run by the section `teacher`, where `teachers` is a list of one that says nothing which that section cannot."""
        if len(self.teachers) != 1:
            return self
        only = self.teachers[0]
        if only.tags or self.when_away(only) != "wait":
            return self
        plain = {name: getattr(only, name) for name in TeacherConfig.model_fields}
        features = {name: section.model_copy(update={"teacher": None}) for name, section in self.loss.features.items()}
        return self.model_copy(
            update={
                "teacher": TeacherConfig.model_construct(**plain),
                "teachers": (),
                "combine": "loss_sum",
                "labels": self.labels_of(only),
                "cache": self.cache.model_copy(update={"labels": self.keeps_labels(only)}),
                "loss": self.loss.model_copy(update=features),
            }
        )


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
    """A config from plain data; a list of one teacher is the section `teacher` (`TrainConfig.as_one`).

    Raises:
        ConfigError: one line that names `origin` and every wrong key.
    """
    return parse_as(TrainConfig, tree, origin).as_one()


def check_teachers(
    teachers: Sequence[OneOfTeachersConfig], combine: Combine, labels: LabelConfig, loss: LossConfig
) -> None:
    """Refuses what several teachers cannot teach together, and names of teachers that are not there.

    Raises:
        ValueError: naming the setting, and the way out.
    """
    called = [teacher.called for teacher in teachers]
    if len(called) > 1 and "" in called:
        nameless = f"teachers[{called.index('')}]"
        raise ValueError(
            f"{nameless} has no name, and one of several teachers needs one: set {nameless}.name to what its server calls it, or {nameless}.alias"
        )
    if len(set(called)) < len(called):
        raise ValueError(
            f"teachers are called {', '.join(map(repr, called))}: give each another name, or another alias"
        )
    if odd := [name for name in called if not re.fullmatch(r"[\w.-]*", name)]:
        raise ValueError(
            f"a teacher is called {odd[0]!r}, and figures of the log are named after it: letters, digits and _ . - alone; give it an alias"
        )
    for name, section in loss.features.items():
        if section.teacher is not None and section.teacher not in called:
            known = ", ".join(map(repr, called)) or "none"
            raise ValueError(f"loss.{name}.teacher: no teacher is called {section.teacher!r}; there are: {known}")
    if called == [""] and teachers[0].tags:
        raise ValueError("teachers[0].tags: a teacher that is asked about some rows alone needs a name, or an alias")
    if len(teachers) < 2:
        return
    if loss.output is not None and loss.output.divergence == "pg_rkl":
        raise ValueError(
            "loss.output.divergence=pg_rkl learns from one teacher, and there are several: set the section teacher"
        )
    transports = [teacher.labels or labels for teacher in teachers]
    for name, own in zip(called, transports, strict=True):
        if own.extra_ids:
            raise ValueError(
                f"labels.extra_ids={own.extra_ids} of teacher {name!r}: is for runs of one teacher; set it to 0, or labels.transport of "
                "this teacher to hidden or full"
            )
        if combine == "prob_mix" and own.transport not in ("hidden", "full"):
            raise ValueError(
                f"combine=prob_mix mixes whole distributions, and teacher {name!r} has labels.transport={own.transport}: "
                "hidden or full, or combine=loss_sum"
            )
        if combine == "confidence" and own.transport == "given":
            raise ValueError(
                f"combine=confidence reads how sure a teacher is, and labels.transport=given of teacher {name!r} holds no distribution: "
                "hidden, full or top_k"
            )
    untagged = [name for name, teacher in zip(called, teachers, strict=True) if not teacher.tags]
    if combine == "route" and len(untagged) > 1:
        raise ValueError(
            f"combine=route: {' and '.join(untagged)} have no tags, and one teacher alone takes the rows that nobody claims: give the others tags"
        )
    if combine == "route" and (shared := _twice([tag for teacher in teachers for tag in teacher.tags])):
        raise ValueError(
            f"combine=route: two teachers have the tag {shared!r}, and each row is taught by one: leave it to one of them"
        )


def check_packing(config: TrainConfig) -> None:
    """Refuses settings that do not go with rows that several sequences share.

    Raises:
        ValueError: naming both settings.
    """
    if not config.train.packing:
        return
    other = (
        "loss.attention, whose maps are of one sequence a row"
        if config.loss.attention is not None
        else "model.graphs=true, since recorded passes read token ids alone"
        if config.model.graphs is True
        else "model.attention=flash_attention_2, with which it has not been tried"
        if config.model.attention == "flash_attention_2"
        else ""
    )
    if other:
        raise ValueError(f"train.packing=true does not go with {other}: set one of them otherwise")


def _twice(values: Sequence[str]) -> str:
    """The first that is there twice, or ""."""
    return next((value for place, value in enumerate(values) if value in values[:place]), "")


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
