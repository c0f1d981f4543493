"""The section `loss`: what is minimised."""

from __future__ import annotations

from collections.abc import Mapping
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
    """A number that changes with the optimizer step (docs/concepts/method.md 11).

    Attributes:
        kind: shape of the way from `start` to `end`.
        start: value at step 0.
        end: value at the end, which holds from then on.
        steps: optimizer steps from start to end; set this or `share`.
        share: share of the run's steps from start to end; set this or `steps`.
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


# Parameters of `loss.output` that only some divergences have, and what null stands for; the default of alpha differs by divergence.
_PARAMETERS = {
    "beta": ("jsd",),
    "alpha": ("skew_kl", "skew_rkl", "adaptive_kl"),
    "normalization": ("jsd",),
    "clip": ("pg_rkl",),
}
OUTPUT_DEFAULTS: dict[str, Any] = {"beta": 0.5, "normalization": "paper"}


def as_used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run by dotted name, without parameters that its divergence does not have, and with its defaults for null.

    A run.json of a version that did not refuse them holds all of them, whatever the divergence.
    """
    kind = settings.get("loss.output.divergence")
    found = dict(settings)
    for name, of in _PARAMETERS.items():
        key = f"loss.output.{name}"
        if kind not in of:
            found.pop(key, None)
        elif found.get(key) is None and name in OUTPUT_DEFAULTS:
            found[key] = OUTPUT_DEFAULTS[name]
    return found


class OutputLossConfig(Settings):
    """Divergence of the output distributions (docs/concepts/method.md 1), or reverse KL on the student's own samples as a policy gradient (10).

    Attributes:
        weight: weight of this term.
        divergence: divergence of the teacher's and the student's distribution. `pg_rkl` is the policy gradient for the section `on_policy`;
            it needs of the teacher no more than the log-probability of each token (`labels.transport: given`).
        beta: coefficient of `jsd` (0.5 if null); 0 is exactly forward KL, 1 exactly reverse KL.
        alpha: skew of `skew_kl` and `skew_rkl` (0.1 if null), or the mass of the teacher's tail in `adaptive_kl` (0.5 if null).
        normalization: of `jsd`; `paper` (if null) is the definition of the GKD paper; `unit` divides it by beta (1 - beta), so that
            losses are comparable across beta.
        temperature: temperature of the loss, a constant or a schedule. It is not the temperature of sampling.
        tau_squared: whether the loss is multiplied by the temperature squared; null does so under a schedule.
        clip: clip of `pg_rkl`, 0.2 if null: a token stops teaching once its probability has changed by more than this share since it was
            sampled. `.inf` clips nothing.
        tempered_head: with `top_k` labels, a different objective that has a meaning at any temperature (docs/concepts/temperature.md).
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "adaptive_kl", "pg_rkl"] = (
        "forward_kl"
    )
    beta: Fraction | None = None
    alpha: Fraction | None = None
    normalization: Literal["paper", "unit"] | None = None
    temperature: Annotated[float, Field(gt=0)] | ScheduleConfig = 1.0
    tau_squared: bool | None = None
    clip: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = None
    tempered_head: bool = False

    @model_validator(mode="after")
    def _of_this_divergence(self) -> OutputLossConfig:
        for name, of in _PARAMETERS.items():
            if getattr(self, name) is not None and self.divergence not in of:
                raise ValueError(
                    f"{name} belongs to divergence {' or '.join(of)}, not {self.divergence}: leave it out, or null"
                )
        return self


class LossConfig(Settings):
    """The training objective: distillation, hard labels, or both.

    Attributes:
        output: the distillation term; null trains on hard labels alone.
        sft_weight: weight of the cross-entropy with the data's own tokens. 0.5 beside a distillation term if left out, which did better
            than either term alone on rows whose answers are good (docs/results/results.md); set 0 where the answers are the teacher's own
            or poor.
        chunk_mb: largest size of logits held at a time, in MiB.
        hidden: a term on hidden states of chosen layers (docs/train/layers.md); null for none. Needs `output`.
        attention: a term on attention maps of chosen layers; null for none. Needs `output`.
        ffn: a term on FFN activation of chosen layers; null for none. Needs `output`.
        preset: `article` stands for the numbers of the article that the project started from; settings written beside it take precedence.
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
