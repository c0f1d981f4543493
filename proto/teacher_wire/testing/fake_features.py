"""Signals of chosen blocks as the fake teacher makes them: numpy functions of the tokens before and the seed, and of nothing else.

The blocks mix their channels and look back by one head of attention each, so that neighbouring blocks resemble each other and later ones less,
as those of a model do.

Axes: T packed tokens, N wanted rows, D width, F width of keys, L tokens of a sequence, R components, K blocks of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from teacher_wire.artifacts.kinds.layer_basis import MASSIVE_CHANNELS, LayerBasis, OneLayer
from teacher_wire.core.axes import BLOCK_POSITIONS
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.tensor import Tensor, float32
from teacher_wire.score.signals import Attention, Ffn, LayerStates, Relation
from teacher_wire.score.signals.attention import SINK_POSITIONS
from teacher_wire.score.signals.ffn import QUANTILES
from teacher_wire.score.signals.hidden import BLOCK_CHANNELS, outliers_of

_SMALLEST_SCALE, _LARGEST = 2.0**-24, 65504.0  # of float16


class FakeBlocks:
    """The weights of the blocks.

    Args:
        layers: how many.
        width, kv_width: D, F.
        seed: of the weights.
    """

    def __init__(self, layers: int, width: int, kv_width: int, seed: int) -> None:
        rng = np.random.default_rng([seed, 15])

        def weights(*shape: int) -> list[np.ndarray]:
            return [(rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for _ in range(layers)]

        self.layers, self.width, inner = layers, width, QUANTILES * max(1, width // 4)
        self.query, self.key, self.value = (weights(width, kv_width) for _ in range(3))
        self.up, self.down = weights(width, inner), weights(inner, width)
        self.back = weights(kv_width, width)

    def basis(self, rank: int) -> LayerBasis:
        """A basis of that rank, at most the width, for every block, of no sample but of the seed."""
        if not 1 <= rank <= self.width:
            raise ValueError(f"a basis of {self.width} channels has a rank of 1..{self.width}, not {rank}")
        found = {}
        for layer in range(self.layers + 1):
            rng = np.random.default_rng([layer, self.width, rank])
            basis_DR = np.linalg.qr(rng.standard_normal((self.width, rank)))[0].astype(np.float16)
            mean_D = (0.1 * rng.standard_normal(self.width)).astype(np.float32)
            massive = np.sort(rng.permutation(self.width)[: min(MASSIVE_CHANNELS, self.width // 8)]).astype(np.int32)
            found[layer] = OneLayer(float32(mean_D), Tensor("float16", basis_DR), Tensor("int32", massive))
        return LayerBasis(found)

    def run(self, states_TD: np.ndarray, batch: TokenBatch) -> FakePass:
        """A pass over a batch whose embeddings are `states_TD`."""
        return FakePass(self, states_TD, batch)


class FakePass:
    """What the blocks make of a batch."""

    def __init__(self, blocks: FakeBlocks, embedding_TD: np.ndarray, batch: TokenBatch) -> None:
        self.batch = batch
        self._blocks = blocks
        self._embedding_TD = embedding_TD

    @cached_property
    def _each(self) -> list[tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]]:
        """Of each block: its output, a map of attention for each sequence, keys, values and u."""
        found, blocks, batch = [], self._blocks, self.batch
        state_TD = self._embedding_TD
        for number in range(blocks.layers):
            query_TF, key_TF, value_TF = (
                _product(state_TD, weights[number], batch) for weights in (blocks.query, blocks.key, blocks.value)
            )
            maps, seen_TF = [], np.empty_like(value_TF)
            for start, stop in _bounds(batch):
                map_LL = _causal(query_TF[start:stop], key_TF[start:stop])
                maps.append(map_LL)
                seen_TF[start:stop] = map_LL @ value_TF[start:stop]
            state_TD = state_TD + _product(seen_TF, blocks.back[number], batch)
            u_TU = np.maximum(_product(state_TD, blocks.up[number], batch), 0.0)
            state_TD = state_TD + 0.5 * _product(u_TU, blocks.down[number], batch)
            found.append((state_TD, maps, key_TF, value_TF, u_TU))
        return found

    def state(self, layer: int) -> np.ndarray:
        """float32 [N, D], of the wanted rows."""
        state_TD = self._each[layer - 1][0] if layer else self._embedding_TD
        return state_TD[self.batch.rows_of()]

    def maps(self, layer: int) -> list[np.ndarray]:
        """float32 [L, L] for each sequence."""
        return self._each[layer - 1][1]

    def keys_and_values(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [T, F] both, of all tokens."""
        return self._each[layer - 1][2], self._each[layer - 1][3]

    def u(self, layer: int) -> np.ndarray:
        """float32 [N, U], of the wanted rows."""
        return self._each[layer - 1][4][self.batch.rows_of()]


def _layers(signal: LayerStates, blocks: FakePass, basis: LayerBasis | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for layer in signal.layers:
        state_ND = blocks.state(layer)
        if signal.reduction == "none":
            found[f"layer{layer}_state_ND"] = float32(state_ND)
        elif signal.reduction == "int8":
            packed, _ = pack_state(state_ND)
            found |= {f"layer{layer}_{name.removeprefix('state_')}": tensor for name, tensor in packed.items()}
        else:
            assert basis is not None, "checked with the request"
            one = basis.layers[layer]
            plain_ND = state_ND.copy()
            plain_ND[:, one.massive_M.array] = 0.0
            normed_ND = plain_ND / np.sqrt((plain_ND**2).mean(-1, keepdims=True) + 1e-6)
            basis_DR = one.basis_DR.array[:, : signal.rank].astype(np.float32)
            parts_NR = np.einsum("nd,dr->nr", normed_ND - one.mean_D.array, basis_DR)
            found[f"layer{layer}_int8_NR"], found[f"layer{layer}_scale_N"] = _int8(parts_NR)
    return found


def _attention(signal: Attention, blocks: FakePass, basis: LayerBasis | None) -> dict[str, Tensor]:
    wanted = np.split(blocks.batch.wanted_T, blocks.batch.cu_lengths_B1[1:-1])
    found = {}
    for layer in signal.layers:
        pooled = []
        for map_LL, wanted_L in zip(blocks.maps(layer), wanted, strict=True):
            for t in np.flatnonzero(wanted_L):
                seen_L = np.where(np.arange(t + 1) < SINK_POSITIONS, 0.0, map_LL[t, : t + 1]).astype(np.float32)
                pooled.append(np.add.reduceat(seen_L, np.arange(0, t + 1, BLOCK_POSITIONS)))
        found[f"attention{layer}_K"] = Tensor("float16", np.concatenate(pooled).astype(np.float16))
    return found


def _relation(signal: Relation, blocks: FakePass, basis: LayerBasis | None) -> dict[str, Tensor]:
    sent_T = tokens_sent(blocks.batch)
    found: dict[str, Tensor] = {}
    for layer in signal.layers:
        for name, all_TF in zip(("keys", "values"), blocks.keys_and_values(layer), strict=True):
            if signal.reduction == "none":
                found[f"{name}{layer}_TF"] = float32(all_TF[sent_T])
            else:
                found[f"{name}{layer}_int8_TF"], found[f"{name}{layer}_scale_T"] = _int8(all_TF[sent_T])
    return found


def _ffn(signal: Ffn, blocks: FakePass, basis: LayerBasis | None) -> dict[str, Tensor]:
    found = {}
    for layer in signal.layers:
        u_NU = blocks.u(layer)
        energy_N = np.log(np.sqrt((u_NU**2).mean(-1)) + 1e-6)
        found[f"ffn{layer}_energy_N"] = Tensor("float16", energy_N.astype(np.float16))
        if signal.reduction == "quantiles":
            sorted_NU = -np.sort(-np.abs(u_NU), axis=-1)
            parts_NQ = sorted_NU.reshape(len(u_NU), QUANTILES, -1).sum(-1)
            shares_NQ = parts_NQ / np.maximum(parts_NQ.sum(-1, keepdims=True), 1e-30)
            found[f"ffn{layer}_quantiles_NQ"] = Tensor("float16", shares_NQ.astype(np.float16))
    return found


# How the fake makes each kind of signal of chosen blocks.
FAKE_FEATURES: dict[str, Callable[[Any, FakePass, LayerBasis | None], dict[str, Tensor]]] = {
    LayerStates.kind: _layers,
    Attention.kind: _attention,
    Relation.kind: _relation,
    Ffn.kind: _ffn,
}


def pack_state(state_ND: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
    """States compressed (proto: Compression), and what a student makes of them again."""
    rows, width = state_ND.shape
    ids_NO = np.sort(np.argsort(-np.abs(state_ND), axis=-1)[:, : outliers_of(width)], axis=-1)
    bits_NO = (np.take_along_axis(state_ND, ids_NO, -1).view(np.uint32) >> 16).astype(np.uint16)
    values_NO = Tensor("bfloat16", bits_NO)
    bulk_ND = state_ND.copy()
    np.put_along_axis(bulk_ND, ids_NO, 0, -1)
    bulk_NGS = np.pad(bulk_ND, ((0, 0), (0, -width % BLOCK_CHANNELS))).reshape(rows, -1, BLOCK_CHANNELS)
    scales_NG = np.maximum(np.abs(bulk_NGS).max(-1) / 127, 2.0**-24).astype(np.float16)
    steps_NGS = np.clip(np.rint(bulk_NGS / scales_NG.astype(np.float32)[..., None]), -127, 127).astype(np.int8)
    seen_ND = (steps_NGS * scales_NG.astype(np.float32)[..., None]).reshape(rows, -1)[:, :width]
    np.put_along_axis(seen_ND, ids_NO, values_NO.as_float32(), -1)
    tensors = {
        "state_int8_ND": Tensor("int8", np.ascontiguousarray(steps_NGS.reshape(rows, -1)[:, :width])),
        "state_scales_NG": Tensor("float16", scales_NG),
        "outlier_ids_NO": Tensor("uint16", ids_NO.astype(np.uint16)),
        "outlier_values_NO": values_NO,
    }
    return tensors, seen_ND


def tokens_sent(batch: TokenBatch) -> np.ndarray:
    """bool [T]: tokens that the axis TOKEN counts."""
    sent_T = np.zeros(batch.tokens, np.bool_)
    rows = np.split(batch.rows_of(), np.searchsorted(batch.rows_of(), batch.cu_lengths_B1[1:-1]))
    for (start, _), rows_n in zip(_bounds(batch), rows, strict=True):
        if rows_n.size:
            sent_T[start : rows_n[-1] + 1] = True
    return sent_T


def _bounds(batch: TokenBatch) -> list[tuple[int, int]]:
    cu = batch.cu_lengths_B1.tolist()
    return list(pairwise(cu))


def _product(state_TX: np.ndarray, weight_XY: np.ndarray, batch: TokenBatch) -> np.ndarray:
    """Each sequence by itself, and by a sum that does not depend on how many rows there are."""
    return np.concatenate([np.einsum("tx,xy->ty", state_TX[a:b], weight_XY) for a, b in _bounds(batch)])


def _causal(query_LF: np.ndarray, key_LF: np.ndarray) -> np.ndarray:
    scores_LL = np.einsum("if,jf->ij", query_LF, key_LF) / np.float32(np.sqrt(query_LF.shape[1]))
    scores_LL = np.where(np.tri(len(scores_LL), dtype=np.bool_), scores_LL, -np.inf)
    weights_LL = np.exp(scores_LL - scores_LL.max(-1, keepdims=True))
    found: np.ndarray = weights_LL / weights_LL.sum(-1, keepdims=True)
    return found


def _int8(values_NX: np.ndarray) -> tuple[Tensor, Tensor]:
    """int8 and float16 scales of each row."""
    scales_N = np.clip(np.abs(values_NX).max(-1) / 127, _SMALLEST_SCALE, _LARGEST).astype(np.float16)
    steps_NX = np.clip(np.rint(values_NX / scales_N.astype(np.float32)[:, None]), -127, 127).astype(np.int8)
    return Tensor("int8", steps_NX), Tensor("float16", scales_N)
