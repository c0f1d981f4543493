"""The section `train`: how long and how fast, what is measured, kept and reported on the way."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from student_trainer.config.fields import Decay, Fraction, Positive
from student_trainer.config.files import Settings


class OptimizationConfig(Settings):
    """How long and how fast.

    Attributes:
        batch_size: sequences of one micro-batch.
        accumulation: micro-batches of one optimizer step.
        epochs: passes over the data; may be a fraction.
        max_steps: optimizer steps; null takes `epochs`.
        learning_rate: peak learning rate of AdamW.
        weight_decay: AdamW's weight decay.
        betas: AdamW's betas.
        max_grad_norm: norm to which gradients are clipped; 0 clips nothing.
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        schedule: course of the learning rate after the warm-up.
        min_lr_share: share of the peak learning rate at which `linear` and `cosine` end.
        bf16: compute the passes in bfloat16 by autocast, with float32 weights; `model.dtype: bfloat16` has such passes already.
        log_steps: optimizer steps between two log entries.
        eval_steps: optimizer steps between two measurements of held-out rows; 0 measures at the end alone.
        eval_batch_size: rows measured at a time.
        save_steps: optimizer steps between two checkpoints, a multiple of `log_steps`; 0 saves at the end alone.
        keep_checkpoints: number of checkpoints kept, beside the one that the link `best` names.
        best_metric: held-out figure that decides which checkpoint the link `best` names: nll_per_byte, nll_per_token, kl_to_teacher
            (kl_to_NAME for one of several teachers), acc1 or acc3. Of accuracies the highest is best, of the others the lowest.
        packing: whether the student reads several short rows of a micro-batch in one row, none of which attends to another
            (docs/train/packing.md).
        report_to: trackers (docs/train/tracking.md): trackio, tensorboard, wandb, or another that transformers knows. `auto` is trackio
            where it is installed, and nothing where it is not; `none` or an empty list is nothing.
        project: project under which trackers file the run; the run is named after its folder.
        push_to_hub: whether final/ is uploaded to the Hugging Face hub at the end. The token is the hub's own (`hf auth login`, or
            HF_TOKEN), never a setting.
        hub_id: name on the hub, `owner/name`.
        hub_private: whether only its owner can see the uploaded model.
        nonfinite: what happens at a step whose loss or gradient is NaN or infinite: `stop` ends the run before the update, `skip` leaves
            that update out and counts it in the log.
        max_skipped: updates left out in a row before the run ends, whatever `nonfinite` says.
        deterministic: whether torch uses deterministic algorithms, so that a resumed run ends with the same bits.
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
    best_metric: str = "nll_per_byte"
    packing: bool = False
    report_to: tuple[str, ...] = ("auto",)
    project: Annotated[str, Field(min_length=1)] = "lyceum"
    push_to_hub: bool = False
    hub_id: str | None = None
    hub_private: bool = True
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Positive = 10
    deterministic: bool = True

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("report_to")
    @classmethod
    def _nothing_is_nothing_else(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(dict.fromkeys(value))
        if "none" in named and len(named) > 1:
            raise ValueError("none is no tracker at all: leave it out, or the others")
        return () if named == ("none",) else named

    @field_validator("best_metric")
    @classmethod
    def _known_figure(cls, value: str) -> str:
        if value not in ("nll_per_byte", "nll_per_token", "acc1", "acc3") and not re.fullmatch(r"kl_to_[\w.-]+", value):
            raise ValueError("is no held-out figure: nll_per_byte, nll_per_token, kl_to_teacher, acc1 or acc3")
        return value

    @model_validator(mode="after")
    def _hub_has_a_name(self) -> OptimizationConfig:
        if self.push_to_hub and not self.hub_id:
            raise ValueError("push_to_hub=true needs hub_id: owner/name, where the model goes to")
        if self.hub_id and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub_id):
            raise ValueError(f"hub_id={self.hub_id!r} must be owner/name: letters, digits, and - _ . in both")
        if self.hub_id and not self.push_to_hub:
            raise ValueError(f"hub_id={self.hub_id} is used with push_to_hub=true alone: set it, or leave hub_id out")
        return self
