"""A student as one model without adapters, as it is at this moment: for those who load it elsewhere.

In: a student; out: a copy of its weights on the host, adapters merged, and files as transformers writes them. The student itself is not
touched: what it trains with goes on as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from student_trainer.errors import ModelError
from student_trainer.model import precision
from student_trainer.model.load import Student

_OWN = (".lora_", ".original_module.")  # of an adapter, or what one stands in for


def check_whole(student: Student) -> None:
    """Refuses adapters that cannot be merged into the weights of their layers.

    Raises:
        ModelError: naming the layer.
    """
    model = student.causal_lm
    for name, layer in _adapted(model).items():
        (adapter,) = layer.active_adapters
        if layer.lora_variant.get(adapter) is not None or not isinstance(layer.base_layer, nn.Linear | nn.Embedding):
            raise ModelError(
                f"model: the adapter of {name} cannot be merged into its weights, so it cannot be published"
            )
    if _is_tied(model) and any(
        hasattr(layer, "base_layer") for layer in (model.get_output_embeddings(), model.get_input_embeddings())
    ):
        raise ModelError(
            "model.lora.target_modules: an adapter of the output head or the embedding alone cannot be published, since they are one "
            "weight here (tie_word_embeddings)"
        )


@torch.no_grad()
def whole_weights(student: Student) -> dict[str, Tensor]:
    """The weights by their names without adapters, copied to the host, in the dtype of a finished run. Waits for the device."""
    model = student.causal_lm
    layers = _adapted(model)
    copies: dict[int, Tensor] = {}  # tied weights stay one
    found = {}
    for name, tensor in model.state_dict().items():
        if any(part in name for part in _OWN):
            continue
        layer_name, _, rest = name.partition(".base_layer.")
        plain = f"{layer_name}.{rest}" if rest else name
        for part in (".modules_to_save.default.", ".modules_to_save.default_"):
            plain = plain.replace(part, ".")
        if tensor.data_ptr() not in copies or not tensor.numel():
            merged = tensor
            if rest == "weight":
                layer = layers[layer_name]
                merged = tensor.float() + layer.get_delta_weight(layer.active_adapters[0]).float()
                merged = merged.to(tensor.dtype)
            if student.exported is not None and merged.is_floating_point():
                merged = merged.to(student.exported)
            copies[tensor.data_ptr()] = merged.detach().to("cpu", copy=merged is tensor).contiguous()
        found[plain] = copies[tensor.data_ptr()]
    return found


def save_whole(student: Student, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes weights of `whole_weights` and their config as transformers does; from any thread, while the student trains.

    Raises:
        ModelError: they are not finite.
        OSError: the disk does not take it.
    """
    broken = next((name for name, t in weights.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if broken is not None:
        raise ModelError(f"its weights are not finite, {broken} first")
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(student.causal_lm.config, trust_remote_code=False)
    outline.save_pretrained(folder, state_dict=weights)
    if student.exported is not None:
        precision.write_dtype(folder, student.exported)


def trains_head(student: Student) -> bool:
    """Whether the output head changes while it trains: by itself, by an adapter, or as the embedding that it is tied to."""
    head = student.causal_lm.get_output_embeddings()
    return hasattr(head, "base_layer") or any(p.requires_grad for p in head.parameters())


def _adapted(model: Any) -> dict[str, Any]:
    """Layers with low-rank adapters, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (getattr(layer, "base_layer", layer) for layer in (head, embedding))
    return getattr(head, "weight", None) is getattr(embedding, "weight", 0)
