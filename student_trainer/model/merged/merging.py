"""A student whose adapters are part of its weights: what an engine that knows no adapters writes with, and what others load.

In: a student, and the values of its trained weights; out: a state dict with the names of its base, or a folder that any tool reads.
Must never change the student, which may be training meanwhile: its frozen weights are read, its trained ones come from the caller.

Axes: B A, the factors of an adapter; V vocabulary rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_trainer.errors import ModelError
from student_trainer.model import precision
from student_trainer.model.load import Student

_PREFIX = "base_model.model."  # of peft, before the names of the base


@torch.no_grad()
def merged_state(student: Student, trained: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight of the base by its name, adapters merged, on the host.

    Args:
        student: whose frozen weights are read.
        trained: values of the trained parameters, by their names in `student.model`; on any device, and read before this returns.
        dtype: of the floating-point weights; sums are made in float32.

    Raises:
        ModelError: the names are not the student's, or adapters that have no place in the base's weights.
    """
    model = student.model
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    if trained.keys() != expected:
        odd = sorted(trained.keys() ^ expected)
        raise ModelError(f"the trained weights are not those of the student: {len(odd)} differ, {odd[0]} first")
    prefix = _PREFIX if hasattr(model, "peft_config") else ""
    values = {name.removeprefix(prefix): value for name, value in trained.items()}
    live = {name: tensor for name, tensor in student.causal_lm.state_dict().items() if ".lora_" not in name}
    given = {
        _place(live[name]): value for name, value in values.items() if name in live
    }  # of tied weights one alone is named
    made: dict[tuple[int, torch.Size], Tensor] = {}  # and they stay one tensor
    state: dict[str, Tensor] = {}
    for name, tensor in live.items():
        place = _place(tensor)
        if place not in made:
            made[place] = _on_host(given.get(place, tensor), dtype)
        state[name.replace(".base_layer.", ".")] = made[place]
    for name, layer in student.causal_lm.named_modules():
        if getattr(layer, "lora_A", None) or getattr(layer, "lora_embedding_A", None):
            _merge(state, f"{name}.weight", layer, name, values, dtype)
    return state


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _on_host(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True).cpu().contiguous()


def _merge(
    state: dict[str, Tensor], weight: str, layer: Any, name: str, values: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Puts base + scaling * B A in the place of a layer's weight."""
    (adapter,) = layer.active_adapters
    if getattr(layer, "use_dora", {}).get(adapter) or getattr(layer, "lora_bias", {}).get(adapter):
        raise ModelError(
            f"{name}: an adapter with DoRA or a bias of its own cannot be merged; merge it into its base first"
        )
    sharers = [other for other, tensor in state.items() if tensor is state[weight]]
    if len(sharers) > 1:
        raise ModelError(
            f"{name}: its adapter changes {' and '.join(sharers)} apart, which are one weight here (tie_word_embeddings), and cannot be merged"
        )
    if getattr(layer, "lora_embedding_A", None):
        a, b = (values[f"{name}.lora_embedding_{letter}.{adapter}"] for letter in "AB")
        delta = (b.float() @ a.float()).T
    else:
        a, b = (values[f"{name}.lora_{letter}.{adapter}.weight"] for letter in "AB")
        delta = b.float() @ a.float()
        delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
    base = layer.base_layer.weight.detach().to(delta.device).float()
    state[weight] = _on_host(base + float(layer.scaling[adapter]) * delta, dtype)


def save_merged(
    student: Student, trained: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, *, vocab_rows: int | None = None
) -> None:
    """Writes the merged student as config.json and model.safetensors; other tools read it as they read its base. No tokenizer.

    Args:
        student, trained, dtype: as in `merged_state`.
        folder: where to; made if it is not there.
        vocab_rows: V, cuts embedding and head to the first V ids; None leaves them.

    Raises:
        ModelError: as `merged_state`.
        OSError: the disk does not take it.
    """
    state = merged_state(student, trained, dtype)
    causal = student.causal_lm
    cut = vocab_rows is not None and vocab_rows < student.vocab_rows
    if cut:
        _cut(state, causal, vocab_rows)
    folder.mkdir(parents=True, exist_ok=True)
    causal.save_pretrained(folder, state_dict=state, max_shard_size="1000GB")
    precision.write_dtype(folder, dtype)
    if cut:
        _write_rows(folder, vocab_rows)


def _cut(state: dict[str, Tensor], causal: Any, vocab_rows: int | None) -> None:
    """Leaves the first rows of embedding and head; tied ones stay one tensor."""
    layers = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    names = [name for name, module in causal.named_modules() if any(module is layer for layer in layers)]
    whole: dict[int, Tensor] = {}
    for name in (f"{name}.{part}" for name in names for part in ("weight", "bias") if f"{name}.{part}" in state):
        tensor = state[name]
        state[name] = whole.setdefault(id(tensor), tensor[:vocab_rows].clone())


def _write_rows(folder: Path, vocab_rows: int | None) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "vocab_size" in part:
            part["vocab_size"] = vocab_rows
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
