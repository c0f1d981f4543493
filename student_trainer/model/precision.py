"""Which numbers a student is trained in: float32 weights that compute in bfloat16, and what is not done.

In: ModelConfig and the machine; out: the dtype of the passes, sentences for the user, or a refusal.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ModelError

_BYTES_A_WEIGHT = 16  # float32: the weight, its gradient, and AdamW's two averages


def check_trained_in(config: ModelConfig) -> None:
    """Refuses dtypes in which gradients are lost.

    Raises:
        ModelError: float16, whose smallest gradients would need a loss scaler.
    """
    if config.dtype == "float16":
        raise ModelError(
            "model.dtype=float16: is not trained in, since its gradients vanish below 6e-8 and overflow above 65,504 without a loss "
            "scaler; set bfloat16, which has the range of float32 (weights trained whole are float32 in any case), or float32"
        )


def narrowed(config: ModelConfig, on_gpu: bool) -> torch.dtype | None:
    """What a student of float32 weights computes in; None for its weights' own dtype.

    A device that only emulates bfloat16 gains nothing from it, and computes in float32.
    """
    if config.lora is not None or config.dtype == "float32" or not multiplies_bfloat16(on_gpu):
        return None
    return torch.bfloat16


def multiplies_bfloat16(on_gpu: bool) -> bool:
    """Whether the device has instructions for products of bfloat16."""
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() not in ("x86_64", "AMD64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def notes(config: ModelConfig, model: Any) -> list[str]:
    """What a user should know of numbers and memory, a sentence each."""
    if config.dtype == "float32":
        return []
    on_gpu = torch.cuda.is_available()
    device, is_fast = "GPU" if on_gpu else "CPU", multiplies_bfloat16(on_gpu)
    if config.lora is not None:
        return (
            []
            if is_fast
            else [f"this {device} emulates {config.dtype}, which is slow: model.dtype=float32 is faster here"]
        )
    gib = _BYTES_A_WEIGHT * sum(p.numel() for p in model.parameters()) / 2**30
    computed = (
        f"computed in {config.dtype}"
        if is_fast
        else f"computed in float32, since this {device} only emulates {config.dtype}"
    )
    return [
        f"every weight is trained, in float32 ({computed}; final/ will hold {config.dtype}): weights, gradients and AdamW's averages "
        f"take {gib:,.1f} GiB"
    ]


def narrow(state_dict: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The float32 weights in `dtype`; those that are one tensor (tied) stay one."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    narrowed = {}
    for name, tensor in state_dict.items():
        if tensor.dtype != torch.float32:
            narrowed[name] = tensor
            continue
        place = tensor.data_ptr(), tensor.shape
        if place not in made:
            made[place] = tensor.to(dtype)
        narrowed[name] = made[place]
    return narrowed


def write_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Corrects the dtype in a saved model's config.json, where transformers writes that of the weights in memory."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part or part is config:
            part["dtype"] = name
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
