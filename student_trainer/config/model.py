"""The section `model`: which student, in which precision, with which adapters, and how its passes are computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from student_trainer.config.fields import HomeText, Positive
from student_trainer.config.files import Settings


class LoraSettings(Settings):
    """Low-rank adapters (peft).

    Attributes:
        rank: rank of the adapters, as peft's `r`.
        alpha: scale of the adapters, as peft's `lora_alpha`: their output is multiplied by alpha / rank.
        dropout: dropout before the adapters, as peft's `lora_dropout`.
        target_modules: modules that get adapters, as in peft: `all-linear`, a regular expression, or a list of names.
        fused: whether plain linear layers and their adapters are computed as one function (`model/speed/lora.py`), with peft's parameters
            and files.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    fused: bool = True


class QuantizeSettings(Settings):
    """A base in 4 bit under its adapters (QLoRA, bitsandbytes); `quantize: nf4` stands for `quantize: {kind: nf4}`.

    Attributes:
        kind: 4-bit number format: nf4 has its levels at the quantiles of a normal distribution, fp4 is a small float.
        double: whether the scale of each block of 64 weights is kept in 8 bit too, which takes 4.13 bits per weight instead of 4.5.
    """

    kind: Literal["nf4", "fp4"] = "nf4"
    double: bool = True


class ModelConfig(Settings):
    """The student.

    Attributes:
        path: hub id or local folder of a model, or of an adapter, whose base is then loaded too: with `lora` training goes on with the
            adapter, without it the adapter is merged first.
        revision: revision (branch, tag or commit) of a hub id; null takes its default.
        dtype: dtype of frozen weights, of the passes, and of the result; trained weights are float32 in memory in any case. float16 is
            refused: it would need a loss scaler.
        attention: transformers' attn_implementation; `auto` is sdpa, and eager where the model soft-caps its attention scores (Gemma 2),
            which sdpa would leave out.
        lora: adapters, or null to train every weight.
        quantize: keeps the linear layers of the frozen base in 4 bit (docs/train/qlora.md); passes are computed in `dtype`. Needs `lora`
            and bitsandbytes. The output head, embeddings and norms stay in `dtype`.
        gradient_checkpointing: whether activations inside decoder layers are computed again in the backward pass instead of being kept:
            less memory, about a third more compute.
        compiled: whether decoder layers are compiled while training (`model/speed/compiled.py`); `auto` compiles on a GPU.
        graphs: whether the passes of frequent lengths are recorded as CUDA graphs and replayed with one launch each
            (`model/speed/cuda_graphs.py`). Needs a GPU, compiled layers and no dropout; `auto` records where these are given. Lengths are
            then padded to a few.
        threads: torch threads on a CPU.
    """

    path: HomeText
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    lora: LoraSettings | None = LoraSettings()
    quantize: QuantizeSettings | None = None
    gradient_checkpointing: bool = False
    compiled: bool | Literal["auto"] = "auto"
    graphs: bool | Literal["auto"] = "auto"
    threads: Positive = 1

    @field_validator("quantize", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _adapters_over_quantized(self) -> ModelConfig:
        if self.quantize is not None and self.lora is None:
            raise ValueError(
                f"quantize={self.quantize.kind} keeps the base in 4 bit, which cannot be trained, and lora is null: set lora, or "
                "quantize to null"
            )
        return self
