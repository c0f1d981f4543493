"""Low-rank adapters merged into a teacher's weights at loading: W + s B A, by hand, since peft is not of this house.

In: a loaded model and the folder of an adapter; out: the same model, other weights. What an adapter may hold beside plain
factors (DoRA, trained biases, whole layers) is refused by name.
Axes: R rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from teacher_server.backends.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from teacher_server.errors import ServerConfigError

_KEY = re.compile(
    r"^base_model\.model\.(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)$"
)
_WHOLE = re.compile(r"^base_model\.model\.(?P<layer>.+?)(\.base_layer)?\.weight$")
# Settings under which an adapter is more than W + s B A, or its scale another.
_UNUSUAL = (
    "use_dora",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "use_qalora",
    "layer_replication",
)


@torch.no_grad()
def merge(model: Any, folder: Path) -> None:
    """Adds the adapter in `folder` to the weights of its layers.

    A layer whose weight is tied to another's (an output head to the embedding) gets one of its own, as peft computes it.

    Raises:
        ServerConfigError: an adapter that is more than low-rank factors, or of another model.
    """
    settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    unusual = [name for name in _UNUSUAL if settings.get(name)]
    if settings.get("bias", "none") != "none":
        unusual.append("bias")
    if unusual:
        raise ServerConfigError(
            f"adapter {folder}: {', '.join(f'{name}={settings[name]!r}' for name in unusual)} is not merged here; merge it with peft "
            "(merge_and_unload) and serve the result"
        )
    try:
        tensors = load_file(str(folder / ADAPTER_WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise ServerConfigError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {error}") from error
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found, whole = _KEY.match(name), _WHOLE.match(name)
        if found is None and whole is not None and _replace(model, whole["layer"], tensor):
            continue
        if found is None:
            raise ServerConfigError(
                f"adapter {folder}: {name} is no low-rank factor; merge it with peft and serve the result"
            )
        pairs.setdefault(found["layer"], {})[found["part"].removesuffix(".weight")] = tensor
    for name, parts in pairs.items():
        _merge_layer(model, name, parts, settings, folder)


def _replace(model: Any, name: str, weight_OI: torch.Tensor) -> bool:
    """Takes over the whole weight that peft saves beside factors of an embedding or output head; False if there is no such layer."""
    named = dict(model.named_modules()).get(name)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if named is not None and layer is named and named.weight.shape == weight_OI.shape:
            named.weight = nn.Parameter(weight_OI.to(named.weight), requires_grad=False)
            return True
    return False


def _merge_layer(model: Any, name: str, parts: dict[str, torch.Tensor], settings: dict[str, Any], folder: Path) -> None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or not isinstance(getattr(layer, "weight", None), nn.Parameter):
        raise ServerConfigError(
            f"adapter {folder}: its base {settings['base_model_name_or_path']!r} has no layer {name}"
        )
    if len(parts) != 2:
        raise ServerConfigError(f"adapter {folder}: layer {name} has {', '.join(parts)} and not both factors")
    (_, a_RI), (_, b_OR) = sorted(parts.items())
    rank = a_RI.shape[0]
    scale = float(settings["lora_alpha"]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    delta = scale * (b_OR.float() @ a_RI.float()) if b_OR.shape[-1] == rank else None
    if delta is not None and ("lora_embedding_A" in parts or not isinstance(layer, nn.Linear | nn.Embedding)):
        delta = delta.T  # embeddings, and GPT-2's Conv1D, are held the other way round
    if delta is None or delta.shape != layer.weight.shape:
        raise ServerConfigError(
            f"adapter {folder}: its factors of {name} {list(b_OR.shape)} x {list(a_RI.shape)} do not fit the weight "
            f"{list(layer.weight.shape)} of its base {settings['base_model_name_or_path']!r}"
        )
    whole = layer.weight.float() + delta.to(layer.weight.device)
    layer.weight = nn.Parameter(whole.to(layer.weight.dtype), requires_grad=False)
