"""The section `train`: how long and how fast, what is measured, kept and reported on the way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from student_trainer.config.fields import Decay, Fraction, Positive
from student_trainer.config.files import Settings


class OptimizationConfig(Settings):
    """How long and how fast.

    Attributes:
        batch_size: sequences of one micro-batch.
        accumulation: micro-batches of one optimizer step.
        max_steps: optimizer steps; null means `epochs` over the data.
        warmup_steps, schedule, min_lr_share: of the learning rate.
        log_steps, eval_steps, save_steps: in optimizer steps; 0 is never (the end always counts).
        keep_checkpoints: how many to keep.
        report_to: trackers of transformers, such as tensorboard or wandb.
        nonfinite: what a step does whose loss or gradient is NaN or infinite: `stop` ends the run before the update, `skip`
            leaves that update out and counts it in the log.
        max_skipped: updates left out one after another, at most; then the run ends, whatever `nonfinite` says.
    """

    batch_size: Positive = 2
    accumulation: Positive = 8
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    min_lr_share: Fraction = 0.0
    bf16: bool = False
    log_steps: Positive = 10
    eval_steps: Annotated[int, Field(ge=0)] = 0
    eval_batch_size: Positive = 8
    save_steps: Annotated[int, Field(ge=0)] = 0
    keep_checkpoints: Positive = 2
    report_to: tuple[str, ...] = ()
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Positive = 10
    deterministic: bool = True

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
