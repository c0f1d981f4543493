"""The section `model`: which student, in which precision, with which adapters, and how its passes are computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from student_trainer.config.fields import HomeText, Positive
from student_trainer.config.files import Settings


class LoraSettings(Settings):
    """Low-rank adapters (peft).

    Attributes:
        rank, alpha, dropout, target_modules: as in peft.
        fused: compute plain layers as one function each (`model/speed/lora.py`), with peft's parameters and files.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    fused: bool = True


class ModelConfig(Settings):
    """The student.

    Attributes:
        path: hub id or local folder of a model, or of an adapter (its base is then loaded too): with `lora` training goes on with
            the adapter, without it is merged first.
        dtype: of frozen weights, of the passes, and of the result; what is trained is float32 in memory in any case. float16 is
            refused: it would need a loss scaler.
        attention: transformers' attn_implementation; `auto` is sdpa, and eager where the model caps its attention scores softly (Gemma 2), which
            sdpa would leave out.
        lora: adapters, or null to train every weight.
        compiled: compute decoder layers as compiled functions while training (`model/speed/compiled.py`); `auto`: on a GPU.
        graphs: record the passes of each length that comes often and replay them with one launch each (`model/speed/cuda_graphs.py`); needs a GPU,
            compiled layers and no dropout; `auto`: where these are given. Lengths are then padded to a few.
        threads: torch threads on CPU.
    """

    path: HomeText
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    lora: LoraSettings | None = LoraSettings()
    gradient_checkpointing: bool = False
    compiled: bool | Literal["auto"] = "auto"
    graphs: bool | Literal["auto"] = "auto"
    threads: Positive = 1
