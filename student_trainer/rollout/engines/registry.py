"""Engines that write rollouts, by the name that `on_policy.engine` gives them.

In: a run's config and its student; out: a `Sampler`, tried before step 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from student_trainer.config.on_policy import OnPolicyConfig
from student_trainer.config.run import TrainConfig
from student_trainer.errors import ConfigError
from student_trainer.model.load import Student
from student_trainer.rollout.engines.hf_sampler import USUAL_BATCH, HfSampler, Sampling
from student_trainer.rollout.engines.vllm_engine import VllmSampler
from student_trainer.rollout.engines.vllm_room import device_of, usual_batch
from student_trainer.rollout.sample import Sampler


@dataclass(frozen=True)
class Writing:
    """What an engine is made of.

    Attributes:
        config: of the run.
        student: who writes.
        sampling: how tokens are drawn.
        vocab_rows: V, ids that may be drawn.
        longest: tokens of a sequence that the student can write; None if it knows no limit.
        is_batch_free: `sampling.batch` may be another.
    """

    config: TrainConfig
    student: Student
    sampling: Sampling
    vocab_rows: int
    longest: int | None
    is_batch_free: bool


def _hf(writing: Writing) -> Sampler:
    narrowed = torch.bfloat16 if writing.config.train.bf16 else None
    return HfSampler(
        writing.student, writing.sampling, writing.vocab_rows, positions=writing.longest, narrowed=narrowed
    )


def _vllm(writing: Writing) -> Sampler:
    config = writing.config
    longest = config.data.max_tokens + writing.sampling.max_new_tokens  # no prompt is longer than a row
    longest = longest if writing.longest is None else min(longest, writing.longest)
    narrowed = torch.bfloat16 if config.train.bf16 else None
    sampling = writing.sampling
    assert config.on_policy is not None
    device = device_of(writing.student, config.on_policy.device)
    if writing.is_batch_free:
        fits = usual_batch(writing.student, narrowed, longest, device)
        sampling = replace(sampling, batch=min(fits, config.train.batch_size * config.train.accumulation))
    return VllmSampler(
        writing.student,
        sampling,
        writing.vocab_rows,
        longest=longest,
        narrowed=narrowed,
        device=device,
        threads=config.model.threads,
    )


# name of `on_policy.engine` -> what makes it. A new engine is one line here.
ENGINES: dict[str, Callable[[Writing], Sampler]] = {"hf": _hf, "vllm": _vllm}


def build_sampler(
    config: TrainConfig,
    settings: OnPolicyConfig,
    student: Student,
    *,
    vocab_rows: int,
    stop_ids: frozenset[int],
) -> Sampler:
    """The engine of a run.

    Raises:
        ConfigError: this version has no such engine.
        RolloutError: the student cannot write by it.
    """
    if settings.engine not in ENGINES:
        raise ConfigError(f"on_policy.engine={settings.engine}: is not there; there are {', '.join(ENGINES)}")
    sampling = Sampling(
        config.run.seed,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        stop_ids,
        config.labels.extra_ids,
        USUAL_BATCH if settings.batch == "auto" else settings.batch,
    )
    return ENGINES[settings.engine](
        Writing(config, student, sampling, vocab_rows, student.outline.positions, settings.batch == "auto")
    )
