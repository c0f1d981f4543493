"""The weights of a model that may hold 4-bit layers: loaded, told of, and as they are multiplied by.

In: settings and models; out: what transformers is told when it loads, or tensors that any tool reads. A model without 4-bit layers is
looked at without bitsandbytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ConfigError, ModelError


def check_quantizable(config: ModelConfig) -> None:
    """Refuses what cannot be quantised here.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if config.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantize={config.quantize.kind}: needs bitsandbytes, which is not installed: pip install 'lyceum-distill[qlora]'"
        )


def check_as_stored(config: ModelConfig, stored: Any) -> None:
    """Refuses a model whose files are quantised otherwise than `model.quantize` says.

    Args:
        stored: `quantization_config` of the model's own config; None if its files hold plain weights.

    Raises:
        ModelError: naming how it is stored, and what to set.
    """
    if not stored:
        return
    found = stored if isinstance(stored, dict) else stored.to_dict()
    method = getattr(found.get("quant_method"), "value", found.get("quant_method")) or "bitsandbytes"
    kind = found.get("bnb_4bit_quant_type")
    what = f"model.path {config.path}: its files are quantised ({method}{f' {kind}' if kind else ''})"
    if method != "bitsandbytes" or not found.get("load_in_4bit"):
        raise ModelError(
            f"{what}, and only 4-bit weights of bitsandbytes can be trained on: name its unquantised model"
        )
    if config.quantize is None:
        raise ModelError(
            f"{what}: set model.quantize={kind}, which trains adapters on it, or name its unquantised model"
        )
    if config.quantize.kind != kind or config.quantize.double != bool(found.get("bnb_4bit_use_double_quant")):
        raise ModelError(
            f"{what} with double={bool(found.get('bnb_4bit_use_double_quant'))}, and model.quantize says kind={config.quantize.kind}, "
            f"double={config.quantize.double}: set the same"
        )


def loading_options(config: ModelConfig) -> dict[str, Any]:
    """What transformers is told beside a model's path and dtype: how to quantise, and where to."""
    if config.quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    # The output head and what is tied to it stay as they are by transformers' own rule; our loss multiplies by the head.
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantize.kind,
        bnb_4bit_use_double_quant=config.quantize.double,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}


def prepare(model: Any, config: ModelConfig) -> tuple[str, ...]:
    """Gives the 4-bit layers of a loaded model our product; returns a sentence for the user.

    Raises:
        ModelError: nothing of it is quantised, or its output head is.
    """
    if config.quantize is None:
        return ()
    from student_trainer.model.quantized import linear

    count = linear.install(model)
    if not count:
        raise ModelError(
            f"model.quantize={config.quantize.kind}: {type(model).__name__} has no linear layers that can be quantised; set it to null"
        )
    head = model.get_output_embeddings()
    if head is not None and _state_of(head) is not None:
        raise ModelError(f"model.path {config.path}: its output head is quantised, and the loss multiplies by it")
    packed = sum(module.weight.nbytes + sum(part.nbytes for part in _scales(module)) for _, module in layers_of(model))
    plain = sum(p.nbytes for p in model.parameters() if getattr(p, "quant_state", None) is None)
    slow = "" if torch.cuda.is_available() else "; without a GPU this saves memory and costs time"
    return (
        f"{count} linear layers are kept in 4 bit ({config.quantize.kind}{', double' if config.quantize.double else ''}): "
        f"{_size(packed)}, and head, embeddings and norms in {config.dtype}: {_size(plain)}{slow}",
    )


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The 4-bit layers by name; none in a model without any."""
    return ((name, module) for name, module in model.named_modules() if _state_of(module) is not None)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has 4-bit layers."""
    return next(layers_of(model), None) is not None


def weight_of(layer: Any) -> Tensor:
    """What a linear layer multiplies by, [O, I]: its weight, of a 4-bit layer dequantised into a tensor of its own."""
    if _state_of(layer) is None:
        return layer.weight
    from student_trainer.model.quantized import linear

    packed, statistics, meta = linear.parts_of(layer)
    return linear.dequantized(packed, statistics, meta)


def weight_dtype(layer: Any) -> torch.dtype:
    """The dtype of `weight_of`, without computing it."""
    state = _state_of(layer)
    return layer.weight.dtype if state is None else state.dtype


def parameter_count(model: nn.Module) -> int:
    """Numbers that a model's parameters stand for; a packed byte is two."""
    return sum(_count(p) for p in model.parameters())


def merged_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters with 4-bit weights dequantised."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.nbytes if state is None else _count(p) * state.dtype.itemsize for p, state in states)


def digest_into(digest: hashlib._Hash, parameter: Tensor) -> None:
    """Adds to a digest what a 4-bit parameter holds beside its packed bytes."""
    for part in _scales_of_state(getattr(parameter, "quant_state", None)):
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def plain_config(config: Any) -> Any:
    """A copy of a model's config that says nothing of quantisation, for its dequantised weights."""
    if not hasattr(config, "quantization_config"):
        return config
    tree = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    return type(config).from_dict(tree)


def _count(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _state_of(layer: Any) -> Any:
    return getattr(layer.__dict__.get("_parameters", {}).get("weight"), "quant_state", None)


def _scales(layer: Any) -> list[Tensor]:
    return _scales_of_state(_state_of(layer))


def _scales_of_state(state: Any) -> list[Tensor]:
    if state is None:
        return []
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, *nested]


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**27 else f"{nbytes / 2**20:,.2f} MiB"
