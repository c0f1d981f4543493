"""Which layers of a teacher a student keeps, and the config that says so.

In: numbers of layers, a teacher's config; out: the kept layers, and the student's config as plain data. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from student_trainer.errors import ConfigError

# One entry per layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "hybrid_override_pattern")
# Numbers of layers.
_LISTED = ("moe_layers", "mlp_only_layers", "attn_layer_indices", "full_attn_idxs")
# "The first so many layers are otherwise."
_FIRST = ("first_k_dense_replace", "max_window_layers")
# Repeated along the layers.
_CYCLES = ("block_types",)
# Layers beyond the last, which predict further tokens and are no part of the model that is trained.
_BEYOND = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def check_count(layers: int, of: int) -> None:
    """Refuses a number of layers that no student of this teacher can have.

    Raises:
        ConfigError: naming the number and the teacher's.
    """
    if layers < 1:
        raise ConfigError(f"--layers {layers}: a student has at least 1 layer")
    if layers > of:
        raise ConfigError(f"--layers {layers}: the teacher has {of}; at most {of - 1} make a smaller student")
    if layers == of:
        raise ConfigError(
            f"--layers {layers}: the teacher has {of} too, so the student would be the teacher itself; take fewer"
        )


def even_layers(layers: int, of: int) -> tuple[int, ...]:
    """`layers` numbers from 0 to `of` - 1, evenly spaced, the first and the last among them (of one: the first alone).

    Halves are rounded up, without floating point, so that every machine keeps the same.
    """
    if layers == 1:
        return (0,)
    gaps = layers - 1
    return tuple((2 * j * (of - 1) + gaps) // (2 * gaps) for j in range(layers))


def most_influential(influence_L: Sequence[float], layers: int) -> tuple[int, ...]:
    """The numbers of the layers that change their input most, in their order; of equals the lower number goes first."""
    ranked = sorted(range(len(influence_L)), key=lambda i: (-influence_L[i], i))
    return tuple(sorted(ranked[:layers]))


def student_config(
    config: Mapping[str, Any], kept: Sequence[int], depth_field: str, layer_types: Sequence[str] | None
) -> dict[str, Any]:
    """The teacher's config with these layers alone; whatever does not count layers stays as it was written.

    Args:
        config: the teacher's config.json.
        kept: numbers of the kept layers, ascending.
        depth_field: what the config calls the number of layers.
        layer_types: of the teacher's layers, where its architecture has several; written out, since rules such as "every sixth" no
            longer hold.
    """
    made = {name: value for name, value in config.items() if name != "_name_or_path"}
    made[depth_field] = len(kept)
    for name in _PER_LAYER:
        value = made.get(name)
        if isinstance(value, list) and len(value) > kept[-1]:
            made[name] = [value[i] for i in kept]
        elif isinstance(value, str) and len(value) > kept[-1]:
            made[name] = "".join(value[i] for i in kept)
    if layer_types is not None:
        made["layer_types"] = list(layer_types)
    for name in _CYCLES:
        if isinstance(cycle := made.get(name), list) and cycle:
            made[name] = [cycle[i % len(cycle)] for i in kept]
    if isinstance(step := made.get("decoder_sparse_step"), int) and step > 1:
        of_experts = [i for i in kept if (i + 1) % step == 0 and i not in (made.get("mlp_only_layers") or ())]
        made["decoder_sparse_step"] = 1
        made["mlp_only_layers"] = [i for i in kept if i not in of_experts]
    for name in _LISTED:
        if isinstance(numbers := made.get(name), list):
            made[name] = [j for j, i in enumerate(kept) if i in numbers]
    for name in _FIRST:
        if isinstance(first := made.get(name), int):
            made[name] = sum(i < first for i in kept)
    for name in _BEYOND:
        if made.get(name):
            made[name] = 0
    return made
