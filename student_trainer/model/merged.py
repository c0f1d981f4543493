"""A student as one model without adapters: what an engine that knows no adapters writes with, and what others load.

In: a student, and values of its trained weights if they are not those that it has now; out: a state dict with the names of its base, or a
folder that any tool reads. The student may be training meanwhile and is never changed: its frozen weights are read.

Axes: B A, the factors of an adapter; V vocabulary rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from student_trainer.errors import ModelError
from student_trainer.model import precision
from student_trainer.model.load import Student
from student_trainer.model.quantized import weights as quantized

_PREFIX = "base_model.model."  # of peft, before the names of the base
_OWN = (".lora_", ".original_module.")  # of an adapter, or what one stands in for
_ONE_FILE = "1000GB"


def check_mergeable(student: Student) -> None:
    """Refuses adapters that cannot be merged into the weights of their layers.

    Raises:
        ModelError: naming the layer.
    """
    for name, layer in _adapted(student.causal_lm).items():
        _check_layer(name, layer)
    head, embedding = student.causal_lm.get_output_embeddings(), student.causal_lm.get_input_embeddings()
    if _weight(head) is _weight(embedding) and any(hasattr(layer, "base_layer") for layer in (head, embedding)):
        raise ModelError(
            "model.lora.target_modules: an adapter of the output head or the embedding alone cannot be merged, since they are one "
            "weight here (tie_word_embeddings)"
        )


@dataclass(frozen=True, eq=False)
class Source:
    """Where a weight of the merged model comes from.

    Attributes:
        shape: of the weight.
        changes: whether training changes it.
        place: equal of tied weights; None of a weight of its own.
        dtype: that it has by itself; None for that of `make`.
        make: gives it, on any device; it may be the student's own tensor.
    """

    shape: torch.Size
    changes: bool
    place: tuple[int, torch.Size] | None
    dtype: torch.dtype | None
    make: Callable[[], Tensor]


def sources(student: Student, trained: Mapping[str, Tensor] | None = None) -> dict[str, Source]:
    """Of every weight of the base by its name; arguments and errors as of `merged_state`."""
    prefix = _PREFIX if hasattr(student.model, "peft_config") else ""
    values = {name.removeprefix(prefix): p for name, p in student.model.named_parameters()}
    changing = {name for name, p in values.items() if p.requires_grad}
    if trained is not None:
        given = {name.removeprefix(prefix): value for name, value in trained.items()}
        if given.keys() != changing:
            odd = sorted(given.keys() ^ changing)
            raise ModelError(f"the trained weights are not those of the student: {len(odd)} differ, {odd[0]} first")
        values |= given
    check_mergeable(student)
    in_4_bit = dict(quantized.layers_of(student.causal_lm))
    live = {
        name: tensor
        for name, tensor in student.causal_lm.state_dict().items()
        if not any(part in name for part in _OWN) and name.rpartition(".weight")[0] not in in_4_bit
    }
    by_place = {_place(live[name]): name for name in values if name in live}  # of tied weights one is named
    found: dict[str, Source] = {}
    for name, tensor in live.items():
        place = _place(tensor)
        named = by_place.get(place)
        value = tensor if named is None else values[named]
        tied = place if tensor.numel() else None
        found[_plain(name)] = Source(value.shape, named in changing, tied, None, partial(_itself, value))
    for name, layer in in_4_bit.items():
        found[_plain(f"{name}.weight")] = Source(_shape(layer), False, None, None, partial(quantized.weight_of, layer))
    for name, layer in _adapted(student.causal_lm).items():
        base = layer.base_layer
        found[_plain(f"{name}.weight")] = Source(
            _shape(base), True, None, quantized.weight_dtype(base), partial(_merged, name, layer, values)
        )
    return found


@torch.no_grad()
def merged_state(
    student: Student, trained: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every weight of the base by its name, adapters merged, copied to the host. Waits for the device.

    Args:
        student: whose frozen weights are read.
        trained: values of the trained parameters, by their names in `student.model`; on any device, and read before this returns. None: as they are now.
        dtype: of the floating-point weights; None: each its own. Sums are made in float32.

    Raises:
        ModelError: the names are not the student's, or adapters that cannot be merged (`check_mergeable`).
    """
    made: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights stay one tensor
    state: dict[str, Tensor] = {}
    for name, source in sources(student, trained).items():
        if source.place is None or source.place not in made:
            state[name] = _on_host(source.make(), dtype or source.dtype)
        else:
            state[name] = made[source.place]
        if source.place is not None:
            made[source.place] = state[name]
    return state


class MergedWriter:
    """Writes states of `merged_state` as folders that other tools read as they read the base.

    Made where nothing else computes, and once: while transformers builds a model, torch's default dtype is the model's in every thread of the process, so that
    whatever a training step made just then would be narrow too.

    Args:
        student: whose base the folders are of.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        config = copy.deepcopy(quantized.plain_config(student.causal_lm.config))  # saving writes into it
        with torch.device("meta"):
            self._outline = AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    def write(
        self, state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, *, vocab_rows: int | None = None
    ) -> None:
        """Writes config.json and model.safetensors, no tokenizer. From any thread, while the student trains.

        Args:
            state, dtype: of `merged_state`.
            folder: where to; made if it is not there.
            vocab_rows: V, cuts embedding and head to the first V ids; None leaves them.

        Raises:
            OSError: the disk does not take it.
        """
        cut = vocab_rows is not None and vocab_rows < self._student.vocab_rows
        if cut:
            state = _cut(state, self._student.causal_lm, vocab_rows)
        folder.mkdir(parents=True, exist_ok=True)
        self._outline.save_pretrained(folder, state_dict=state, max_shard_size=_ONE_FILE)
        if dtype is not None:
            precision.write_dtype(folder, dtype)
        if cut:
            _write_rows(folder, vocab_rows)


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuses weights that nobody can compute with.

    Raises:
        ModelError: naming the first.
    """
    broken = next((name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if broken is not None:
        raise ModelError(f"its weights are not finite, {broken} first")


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


def _check_layer(name: str, layer: Any) -> None:
    (adapter,) = layer.active_adapters
    if (
        layer.lora_variant.get(adapter) is not None
        or getattr(layer, "lora_bias", {}).get(adapter)
        or not isinstance(layer.base_layer, nn.Linear | nn.Embedding)
    ):
        raise ModelError(
            f"model: the adapter of {name} (DoRA, a bias of its own, or of a layer that is neither linear nor an embedding) cannot be merged "
            "into its weights; merge it into its base first"
        )


def _weight(layer: Any) -> Any:
    return getattr(getattr(layer, "base_layer", layer), "weight", None)


def _plain(name: str) -> str:
    """The name of the base, without what peft puts in between."""
    return (
        name.replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", ".")
        .replace(".modules_to_save.default_", ".")
    )


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _shape(layer: Any) -> torch.Size:
    """Of a layer's weight, also where it is packed into 4 bit."""
    is_packed = isinstance(layer, nn.Linear) and layer.weight.shape != (layer.out_features, layer.in_features)
    return torch.Size((layer.out_features, layer.in_features)) if is_packed else torch.Size(layer.weight.shape)


def _itself(value: Tensor) -> Tensor:
    return value


def _on_host(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    return value.detach().to(wanted, copy=True).cpu().contiguous()


def _merged(name: str, layer: Any, values: Mapping[str, Tensor]) -> Tensor:
    """float32, base + scaling * B A, of a layer with an adapter."""
    (adapter,) = layer.active_adapters
    if len(layer.lora_embedding_A):
        a, b = (values[f"{name}.lora_embedding_{letter}.{adapter}"] for letter in "AB")
        delta = (b.float() @ a.float()).T
    else:
        a, b = (values[f"{name}.lora_{letter}.{adapter}.weight"] for letter in "AB")
        delta = b.float() @ a.float()
        delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
    return quantized.weight_of(layer.base_layer).detach().to(delta.device).float() + delta * float(
        layer.scaling[adapter]
    )


def _cut(state: Mapping[str, Tensor], causal: Any, vocab_rows: int | None) -> dict[str, Tensor]:
    """With the first rows of embedding and head alone; tied ones stay one tensor."""
    layers = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    names = [name for name, module in causal.named_modules() if any(module is layer for layer in layers)]
    found, whole = dict(state), dict[int, Tensor]()
    for name in (f"{_plain(name)}.{part}" for name in names for part in ("weight", "bias")):
        if name in state:
            found[name] = whole.setdefault(id(state[name]), state[name][:vocab_rows].clone())
    return found


def _write_rows(folder: Path, vocab_rows: int | None) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "vocab_size" in part:
            part["vocab_size"] = vocab_rows
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
