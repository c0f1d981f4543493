"""What a teacher's answer says of its layers, as the losses on features read it: names on the wire become tensors of float32.

In: the named tensors of an answer, on the student's device; out: states, pooled maps, keys and values, energies.

Axes: N wanted rows, R channels of a state as it travelled, P blocks of keys, T tokens up to the last wanted row of each sequence, F kv width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.features.states import rms_normed
from teacher_wire.score.signals.hidden import BLOCK_CHANNELS


def layer_states(named: Mapping[str, Tensor], layer: int) -> Tensor:
    """[N, R]: coordinates in the teacher's basis, or else the whole state divided by its root mean square."""
    if f"layer{layer}_int8_NR" in named:
        return named[f"layer{layer}_int8_NR"].float() * named[f"layer{layer}_scale_N"].float()[:, None]
    if f"layer{layer}_state_ND" in named:
        return rms_normed(named[f"layer{layer}_state_ND"])
    state_ND = named[f"layer{layer}_int8_ND"].float()
    scales_NG = named[f"layer{layer}_scales_NG"].float()
    state_ND = state_ND * scales_NG.repeat_interleave(BLOCK_CHANNELS, dim=1)[:, : state_ND.shape[1]]
    values_NO = named[f"layer{layer}_outlier_values_NO"].float()
    return rms_normed(state_ND.scatter(1, named[f"layer{layer}_outlier_ids_NO"].long(), values_NO))


def pooled_maps(named: Mapping[str, Tensor], layer: int, position_N: np.ndarray, block: int) -> Tensor:
    """[N, P], mass per block of keys, 0 behind the row's own block; a row at position t came with t // block + 1 of them."""
    entries_N = position_N // block + 1
    most = int(entries_N.max())
    row_K = np.repeat(np.arange(len(position_N)), entries_N)
    within_K = np.arange(len(row_K)) - np.repeat(np.cumsum(entries_N) - entries_N, entries_N)
    given_K = named[f"attention{layer}_K"].float()
    place_K = torch.from_numpy(row_K * most + within_K).to(given_K.device, non_blocking=True)
    return given_K.new_zeros(len(position_N) * most).index_copy(0, place_K, given_K).view(-1, most)


def keys_and_values(named: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """[T, F] each: keys before rotation, and values."""
    return _of_tokens(named, f"keys{layer}"), _of_tokens(named, f"values{layer}")


def _of_tokens(named: Mapping[str, Tensor], name: str) -> Tensor:
    if f"{name}_TF" in named:
        return named[f"{name}_TF"].float()
    return named[f"{name}_int8_TF"].float() * named[f"{name}_scale_T"].float()[:, None]


def energies(named: Mapping[str, Tensor], layer: int) -> Tensor:
    """[N], log of the size of the FFN's activation."""
    return named[f"ffn{layer}_energy_N"].float()


def profiles(named: Mapping[str, Tensor], layer: int) -> Tensor:
    """[N, Q], the FFN's quantiles from the largest."""
    return named[f"ffn{layer}_quantiles_NQ"].float()
