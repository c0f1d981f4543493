"""The section `on_policy`: which sequences the student writes itself (GKD, Agarwal et al. 2023; docs/concepts/method.md 10)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from student_trainer.config.fields import Fraction, Positive
from student_trainer.config.files import Settings


class ShareConfig(Settings):
    """The share of sequences that are rollouts: `start` for a `warmup` share of the run's steps, then in a straight line over a `ramp` share to `end`.

    Attributes:
        start: share of the sequences of a window at the start of the run.
        end: share of the sequences of a window from the end of the ramp on.
        warmup: share of the run's steps with `start`.
        ramp: share of the run's steps over which the share goes from `start` to `end`.
    """

    start: Fraction = 0.0
    end: Fraction = 0.7
    warmup: Fraction = 0.2
    ramp: Fraction = 0.3

    @model_validator(mode="after")
    def _ends_within_the_run(self) -> ShareConfig:
        if self.warmup + self.ramp > 1:
            raise ValueError(
                f"warmup={self.warmup:g} and ramp={self.ramp:g} are more than the run: their sum is at most 1"
            )
        return self


class PublishConfig(Settings):
    """Pushes the student's weights to its server as a new revision of a teacher, while training goes on (docs/operate/publishing.md).

    Attributes:
        every: optimizer steps between two revisions.
        teacher: name of the teacher on the server of the section `teacher`. If the run learns from that teacher, its labels move along.
        on_failure: what happens when a revision does not go live: `skip` reports it, counts it and goes on with the previous one; `stop`
            ends the run.
    """

    every: Positive
    teacher: str
    on_failure: Literal["skip", "stop"] = "skip"


class OnPolicyConfig(Settings):
    """On-policy distillation: the student's own completions, scored by the teacher.

    Attributes:
        share: share of the sequences of each window that are rollouts: a number, or a schedule. Whether a sequence is one is a function of
            (seed, step, place in the window).
        max_new_tokens: longest completion, at least 2 tokens; one that is cut off there is kept, its last token with weight 0.
        temperature: temperature of sampling.
        top_p: nucleus of sampling: the smallest set of tokens with this mass.
        samples_per_prompt: completions of each prompt that is drawn; consecutive on-policy places of a window share it.
        engine: `hf` samples in this process; `vllm` in a process of its own, which is given the weights every `sync_steps`.
        sync_steps: optimizer steps between two loads of the weights into the engine; above 1 only where max_staleness allows it.
        max_staleness: optimizer steps by which the weights of a rollout may be behind. 0 samples and trains in turn, reproducible to the
            bit with `engine: hf` and a `deterministic` teacher.
        batch: sequences sampled at a time; `auto` is 32, and with `engine: vllm` on a GPU what a sixteenth of its memory holds keys and values
            of, from 32 to 256; never more than a step has.
        device: number of the GPU that `engine: vllm` writes on, as this process counts them; null for the student's own, where writing and training
            take turns.
        on_failure: what happens to a prompt that gets no completion: `skip` learns from the row instead and counts it, `stop` ends the run
            with its name.
        publish: publishes the student as a revision of a teacher of its server; null for not at all.
    """

    share: Fraction | ShareConfig = ShareConfig()
    max_new_tokens: Annotated[int, Field(ge=2, lt=1 << 20)] = 512
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    samples_per_prompt: Positive = 1
    engine: Literal["hf", "vllm"] = "hf"
    sync_steps: Positive = 1
    max_staleness: Annotated[int, Field(ge=0)] = 1
    batch: Positive | Literal["auto"] = "auto"
    device: Annotated[int, Field(ge=0)] | None = None
    on_failure: Literal["skip", "stop"] = "skip"
    publish: PublishConfig | None = None

    @model_validator(mode="after")
    def _fresh_enough(self) -> OnPolicyConfig:
        if self.sync_steps > max(1, self.max_staleness):
            raise ValueError(
                f"sync_steps={self.sync_steps} makes rollouts older than max_staleness={self.max_staleness}: lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _told_by_the_engine(self) -> OnPolicyConfig:
        if self.device is not None and self.engine != "vllm":
            raise ValueError(
                f"device={self.device} is for engine=vllm; engine={self.engine} writes where the student is"
            )
        if self.engine == "vllm" and self.temperature != 1 and self.top_p != 1:
            raise ValueError(
                f"temperature={self.temperature:g} and top_p={self.top_p:g} with engine=vllm: vLLM tells log-probabilities either before the "
                "temperature or after top_p; leave one of them at 1, or set engine to hf"
            )
        return self
