"""The section `loss`: what is minimised."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from student_trainer.config.features import (
    AttentionLossConfig,
    FeatureConfig,
    FfnLossConfig,
    HiddenLossConfig,
    with_preset,
)
from student_trainer.config.fields import Fraction, Positive
from student_trainer.config.files import Settings


class ScheduleConfig(Settings):
    """A number that changes with the optimizer step (algorithms.md 11).

    Attributes:
        kind: how it goes from `start` to `end`.
        start, end: its values.
        steps: optimizer steps from start to end; or
        share: of the run's steps.
    """

    kind: Literal["constant", "linear", "cosine", "exponential"] = "linear"
    start: Annotated[float, Field(gt=0)]
    end: Annotated[float, Field(gt=0)]
    steps: Positive | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> ScheduleConfig:
        if (self.steps is None) == (self.share is None):
            raise ValueError("a schedule needs steps or share: set exactly one of them")
        return self


class OutputLossConfig(Settings):
    """Divergence of the output distributions (algorithms.md 1), or reverse KL on the student's own samples as a policy gradient (10).

    Attributes:
        weight: of this term.
        divergence: which; `pg_rkl` is the policy gradient, for the section `on_policy`, and needs of the teacher no more than the
            log-probability of each token (`labels.transport: given`).
        beta: of `jsd`; 0 is forward KL, 1 reverse KL, exactly.
        alpha: of `skew_kl`, `skew_rkl` (0.1 if null) and `adaptive_kl` (0.5 if null).
        normalization: `paper`, or `unit` = D / (beta (1 - beta)), comparable across beta.
        temperature: of the loss, constant or a schedule. Not the temperature of sampling.
        tau_squared: multiply by temperature squared; null means: under a schedule.
        clip: of `pg_rkl`, 0.2 if null: a token stops to teach once its probability has changed by more than this share since it was
            sampled. `.inf` clips nothing.
        tempered_head: with `top_k`, the other objective of algorithms.md 2.4 that has a meaning at any temperature.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "adaptive_kl", "pg_rkl"] = (
        "forward_kl"
    )
    beta: Fraction = 0.5
    alpha: Fraction | None = None
    normalization: Literal["paper", "unit"] = "paper"
    temperature: Annotated[float, Field(gt=0)] | ScheduleConfig = 1.0
    tau_squared: bool | None = None
    clip: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = None
    tempered_head: bool = False

    @model_validator(mode="after")
    def _clipped(self) -> OutputLossConfig:
        if self.clip is not None and self.divergence != "pg_rkl":
            raise ValueError(f"clip belongs to divergence pg_rkl, not {self.divergence}")
        return self


class LossConfig(Settings):
    """The training objective: distillation, hard labels, or both.

    Attributes:
        output: the distillation term, or null.
        sft_weight: of the cross-entropy with the data's own tokens. 0.5 beside a distillation term if left out, which did better than either
            term alone on rows whose answers are good (docs/results/results.md); set 0 where the answers are the teacher's own or poor.
        chunk_mb: bound on logits held at a time.
        hidden, attention, ffn: terms on what happens inside the layers, or null (docs/train/layers.md). They need `output`.
        preset: `article` stands for the numbers of the article that the project started from; what is written beside it wins.
    """

    output: OutputLossConfig | None = OutputLossConfig()
    sft_weight: Annotated[float, Field(ge=0)] = 0.5
    chunk_mb: Positive = 1024
    hidden: HiddenLossConfig | None = None
    attention: AttentionLossConfig | None = None
    ffn: FfnLossConfig | None = None
    preset: Literal["article"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _distil_or_say(cls, value: Any) -> Any:
        """Without a distillation term the weight must be said: half a loss is nobody's default."""
        if isinstance(value, dict):
            value = with_preset(value)
        if isinstance(value, dict) and "output" in value and value["output"] is None:
            return {"sft_weight": 0.0, **value}
        return value

    @model_validator(mode="after")
    def _something(self) -> LossConfig:
        if self.output is None and self.sft_weight == 0:
            raise ValueError("nothing to learn: set output, or sft_weight above 0")
        for name in self.features:
            if self.output is None:
                raise ValueError(
                    f"{name} needs output, in whose requests its labels come: set output, whose weight may be small, or {name} to null"
                )
        return self

    @property
    def features(self) -> dict[str, FeatureConfig]:
        """The sections on layers that are on, by name."""
        sections: dict[str, FeatureConfig | None] = {
            "hidden": self.hidden, "attention": self.attention, "ffn": self.ffn,
        }  # fmt: skip
        return {name: section for name, section in sections.items() if section is not None and section.weight}
