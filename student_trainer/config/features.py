"""The sections `loss.hidden`, `loss.attention` and `loss.ffn`: what is learned from inside the teacher's layers (docs/concepts/method.md 4, 5, 6)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from student_trainer.config.fields import Positive
from student_trainer.config.files import Settings


def _as_layers(given: Any) -> Any:
    """One block is a list of one; text is `uniform(n)`, or a block as it was written."""
    if isinstance(given, str) and given.strip().isdigit():
        return (int(given),)
    if isinstance(given, int) and not isinstance(given, bool):
        return (given,)
    if isinstance(given, str):
        text = given.replace(" ", "")
        if not (text.startswith("uniform(") and text.endswith(")") and text[8:-1].isdigit()):
            raise ValueError(
                f"{given!r} is neither uniform(n), a list of the student's blocks, nor a list of pairs [student, teacher]"
            )
        return text
    return given


Block = Annotated[int, Field(ge=0)]
Layers = Annotated[str | tuple[Block | tuple[Block, Block], ...], BeforeValidator(_as_layers)]
Weight = Annotated[float, Field(ge=0)]


class AnnealConfig(Settings):
    """A weight that falls to 0 as half a cosine: features are scaffolding.

    Attributes:
        share: share of the run's steps after which the weight is 0.
        steps: optimizer steps after which the weight is 0.
    """

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    steps: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> AnnealConfig:
        if (self.share is None) == (self.steps is None):
            raise ValueError("set exactly one of share and steps")
        return self


class HiddenLossConfig(Settings):
    """Hidden states of chosen blocks (docs/concepts/method.md 4).

    Attributes:
        weight: weight of this term; 0 switches it off. `auto` is what was measured best (docs/results/results.md): 12, constant, where the
            student has the teacher's width, as a student cut from it has; otherwise 1, annealed over half of the run unless `anneal` is
            set. `auto` is known for `proj_cos` alone.
        layers: `uniform(n)`; blocks of the student, each paired with the teacher's block at the same share of its depth; or pairs [student,
            teacher]. Blocks are counted by their outputs from 1; 0 is the embedding, and the last one is read before the final norm.
        objective: what is compared: `proj_cos` and `proj_sl1` go through a learned projector; `gram`, `cka` and `rkd` compare how rows lie
            relative to one another, without a projector.
        reduction: how the teacher's states travel: `pca` as principal components in int8, `int8` whole in int8, `none` as they are.
        rank: number of principal components; null takes all of the teacher's basis.
        anneal: how the weight falls to 0; null keeps it constant.
        teacher: with several teachers, whose layers are learned from; null takes the first one that has the student's tokenizer.
    """

    weight: Weight | Literal["auto"] = "auto"
    layers: Layers = "uniform(3)"
    objective: Literal["proj_cos", "proj_sl1", "gram", "cka", "rkd"] = "proj_cos"
    reduction: Literal["pca", "int8", "none"] = "pca"
    rank: Positive | None = None
    anneal: AnnealConfig | None = None
    teacher: str | None = None

    @model_validator(mode="after")
    def _rank_of_pca(self) -> HiddenLossConfig:
        if self.rank is not None and self.reduction != "pca":
            raise ValueError(f"rank belongs to reduction pca, not {self.reduction}")
        if self.weight == "auto" and self.objective != "proj_cos":
            raise ValueError(f"weight=auto is known for objective proj_cos alone, not {self.objective}: write a number")
        return self


class AttentionLossConfig(Settings):
    """Where chosen blocks look (docs/concepts/method.md 5).

    Attributes:
        weight: weight of this term; 0 switches it off.
        layers: blocks, as in `loss.hidden.layers`, from 1.
        objective: `pooled_kl` compares head-averaged maps in blocks of 64 keys; `relation` compares relations of keys and of values, which
            takes more bytes and keeps more detail.
        anneal: how the weight falls to 0; null keeps it constant.
        teacher: with several teachers, whose layers are learned from; null takes the first one that has the student's tokenizer.
    """

    weight: Weight
    layers: Layers = "uniform(1)"
    objective: Literal["pooled_kl", "relation"] = "pooled_kl"
    anneal: AnnealConfig | None = None
    teacher: str | None = None


class FfnLossConfig(Settings):
    """How much the FFN of chosen blocks works at each token (docs/concepts/method.md 6); experimental.

    Attributes:
        weight: weight of this term; 0 switches it off.
        layers: blocks, as in `loss.hidden.layers`, from 1.
        objective: `energy` correlates the size of the activation over each sequence; `quantiles` compares its profile at each token.
        anneal: how the weight falls to 0; null keeps it constant.
        teacher: with several teachers, whose layers are learned from; null takes the first one that has the student's tokenizer.
    """

    weight: Weight
    layers: Layers = "uniform(1)"
    objective: Literal["energy", "quantiles"] = "energy"
    anneal: AnnealConfig | None = None
    teacher: str | None = None


FeatureConfig = HiddenLossConfig | AttentionLossConfig | FfnLossConfig

# `loss.preset` -> what it stands for; what is written beside it wins.
PRESETS: dict[str, dict[str, Any]] = {
    # The origin article's numbers. Nothing published supports them, and on the real pair they did worse than anything else (docs/results/results.md).
    "article": {
        "output": {"weight": 0.2, "temperature": {"kind": "linear", "start": 8.0, "end": 1.2, "share": 1.0}},
        "hidden": {"weight": 0.5, "layers": [1, 5, 12]},
        "attention": {"weight": 0.3, "layers": [1, 5, 12]},
        "sft_weight": 0.0,
    }
}


def with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """The section `loss` with what its preset stands for.

    Raises:
        ValueError: there is no such preset.
    """
    name = given.get("preset")
    if name is None:
        return given
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return _under(PRESETS[name], given)


def _under(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above`, with what it leaves out from `below`, in sections too; a schedule is taken or left as a whole."""
    merged = below | above
    for key, value in above.items():
        if key in ("output", "hidden", "attention") and isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = below[key] | value
    return merged
