"""A student's layers held against the teacher's before a byte is copied, on models without weights.

In: the two configs and the kept layers; out: what the layers are called in files of weights. Some architectures derive from a layer's
number what it computes (every fourth without rotary positions, every second a mixture of experts); a layer that would compute otherwise
at its new place is refused by name, never copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from student_trainer.errors import ModelError
from student_trainer.model import internlm

_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx", "idx", "training")
# What depends on a layer's number by values of tensors, which no outline shows.
_BY_NUMBER_TYPES = ("minimax",)
_BY_NUMBER_SETTINGS = ("scale_attn_by_inverse_layer_idx",)


@dataclass(frozen=True)
class LayerNames:
    """How files of weights name the layers.

    Attributes:
        prefixes: each of them stands before a layer's number, with the dot.
        count: layers of the teacher.
    """

    prefixes: tuple[str, ...]
    count: int

    def renamer(self, kept: Sequence[int]) -> Callable[[str], str | None]:
        """From a tensor's name to its name in a student with the kept layers; None for what the student has not."""
        new = {old: number for number, old in enumerate(kept)}
        pattern = re.compile(rf"({'|'.join(map(re.escape, self.prefixes))})(\d+)(\..*)")

        def rename(name: str) -> str | None:
            found = pattern.fullmatch(name)
            if found is None:
                return name
            prefix, number, rest = found.groups()
            return f"{prefix}{new[int(number)]}{rest}" if int(number) in new else None

        return rename

    def beyond(self, names: Iterable[str]) -> list[str]:
        """Tensors of layers behind the last."""
        pattern = re.compile(rf"(?:{'|'.join(map(re.escape, self.prefixes))})(\d+)\..*")
        return [name for name in names if (found := pattern.fullmatch(name)) and int(found[1]) >= self.count]


def read_config(folder: Path, name: str) -> Any:
    """transformers' config of a folder.

    Raises:
        ModelError: an unknown family, one that needs code of its own, or a model of more than text.
    """
    internlm.register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise ModelError(
            f"--from {name}: its config cannot be read, or its family is not known: {str(error)[:300]}"
        ) from error
    if config.get_text_config() is not config:
        raise ModelError(
            f"--from {name}: {config.model_type} reads more than text; students are made of text models alone"
        )
    return config


def depth_field(config: Any) -> str:
    """What this family's config.json calls the number of layers."""
    return str(type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers"))


def outline_of(config: Any, name: str) -> Any:
    """A model of a config without weights.

    Raises:
        ModelError: the family has no causal language model, or the config is none of it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise ModelError(f"{name}: no model can be made of its config: {str(error)[:300]}") from error


def layer_names(model: Any, name: str) -> LayerNames:
    """What the layers of a model are called.

    Raises:
        ModelError: it has no one list of layers, or layers that share weights.
    """
    place, blocks = _blocks(model, name)
    shared: dict[int, str] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        first = shared.setdefault(id(parameter), parameter_name)
        if first != parameter_name and (first.startswith(f"{place}.") or parameter_name.startswith(f"{place}.")):
            raise ModelError(
                f"--from {name}: its layers share weights ({first}, {parameter_name}), so none can be taken out"
            )
    base = f"{model.base_model_prefix}."
    return LayerNames((f"{place}.", *([f"{place.removeprefix(base)}."] if place.startswith(base) else [])), len(blocks))


def check_layers(teacher: Any, student: Any, kept: Sequence[int], name: str) -> None:
    """Refuses a student of whose layers one would not be what the teacher's layer is.

    Args:
        teacher, student: outlines (`outline_of`).
        kept: for each of the student's layers the teacher's.

    Raises:
        ModelError: naming the layer, and what would differ.
    """
    config = teacher.config
    numbered = [setting for setting in _BY_NUMBER_SETTINGS if getattr(config, setting, False)]
    if config.model_type in _BY_NUMBER_TYPES or numbered:
        why = f"{numbered[0]}=true" if numbered else f"the family {config.model_type}"
        raise ModelError(f"--from {name}: {why} scales each layer by its number, so layers cannot be moved")
    theirs = getattr(config, "layer_types", None)
    if theirs is not None and list(student.config.layer_types) != [theirs[i] for i in kept]:
        raise ModelError(
            f"--from {name}: the kinds of its layers (layer_types) cannot be written into a config of {len(kept)} layers"
        )
    _, teacher_blocks = _blocks(teacher, name)
    _, student_blocks = _blocks(student, name)
    for new, old in enumerate(kept):
        was, would_be = _facts(teacher_blocks[old]), _facts(student_blocks[new])
        for fact in sorted(was.keys() | would_be.keys()):
            if was.get(fact) != would_be.get(fact):
                raise ModelError(
                    f"--from {name}: layer {old} cannot be layer {new} of {len(kept)}: its {fact} is {was.get(fact)} and would be "
                    f"{would_be.get(fact)}, since {config.model_type} derives it from the layer's number; keep other layers, or all of a period"
                )


def _blocks(model: Any, name: str) -> tuple[str, nn.ModuleList]:
    count = model.config.num_hidden_layers
    found = [(place, m) for place, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [(place, m) for place, m in found if not any(place.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        raise ModelError(
            f"--from {name}: {type(model).__name__} has {len(outer)} lists of {count} layers where one was expected"
        )
    return outer[0]


def _facts(block: nn.Module) -> Mapping[str, Any]:
    """What a layer is made of: its modules with their plain settings, and the shapes of its weights."""
    facts: dict[str, Any] = {}
    for place, module in block.named_modules():
        dotted = f"{place}." if place else ""
        facts[f"{dotted}class"] = type(module).__name__
        for setting, value in vars(module).items():
            if (
                not setting.startswith("_")
                and setting not in _NUMBERS
                and isinstance(value, int | float | str | tuple | None)
            ):
                facts[dotted + setting] = value
    for place, parameter in block.named_parameters():
        facts[f"{place} shape"] = tuple(parameter.shape)
    return facts
