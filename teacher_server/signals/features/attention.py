"""`attention`: maps of chosen blocks, computed again of queries and keys and pooled before more than a tile of them exists.

A tile is some rows of neighbouring sequences beside all positions that they see, padded to the longest of both, or a part of the rows of one
long sequence; its scores are held in float32, up to a bound. Axes: R rows, T tokens, n pieces of a tile, c rows of a piece, k positions,
H query heads, G key heads, d channels of a head, K entries of the axis BLOCK.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from teacher_server.signals.base import Reduction, masked
from teacher_server.signals.captured import AttentionInputs, Captured, Wish
from teacher_server.signals.features import pooling_kernel
from teacher_server.signals.transfer import to_device
from teacher_wire.core.axes import BLOCK_POSITIONS
from teacher_wire.score.signals.attention import SINK_POSITIONS, Attention

_SCORE_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}  # of a tile; about three times as much is held
_WASTE = 2.0  # of a tile's scores, as many as that for each that is not padding


class AttentionReduction(Reduction[Attention]):
    """Needs no logits."""

    needs_logits: ClassVar[bool] = False
    captures: ClassVar[str] = "attention"

    @classmethod
    def wish(cls, signal: Attention) -> Wish:
        return Wish(attention=signal.layers)

    def rest(self) -> dict[str, Tensor]:
        captured = self.rows.captured
        assert captured is not None, "wished"
        made = {}
        for layer in self.signal.layers:
            part_K = pooled(captured, captured.attention[layer])
            if self.rows.kept_R is not None:
                part_K = masked(part_K, np.repeat(self.rows.kept_R, captured.position_R // BLOCK_POSITIONS + 1))
            made[f"attention{layer}_K"] = part_K
        return made


def pooled(captured: Captured, inputs: AttentionInputs, score_bytes: int = 0) -> Tensor:
    """float16 [K]: of each row at hand, what its heads on average give to each block of positions, without the first four positions.

    Args:
        captured: places of the rows.
        inputs: of the block.
        score_bytes: of a tile; by the device if not given, where kernels that hold no scores take over if they can.
    """
    if not score_bytes and pooling_kernel.usable(inputs.query_RHd):
        return pooling_kernel.pooled(captured, inputs)
    heads, device = inputs.query_RHd.shape[1], inputs.query_RHd.device
    budget = (score_bytes or _SCORE_BYTES.get(device.type, _SCORE_BYTES["cpu"])) // (4 * heads)
    parts = [_tile(captured, inputs, tile) for tile in _tiles(captured, max(1, budget))]
    return torch.cat(parts) if parts else inputs.query_RHd.new_zeros(0, dtype=torch.float16)


@dataclass(frozen=True)
class _Piece:
    """Rows of one sequence: [first, first + rows) of R, which see `keys` positions from token `token` on."""

    first: int
    rows: int
    token: int
    keys: int


def _pieces(captured: Captured, budget: int) -> Iterator[_Piece]:
    """The rows in their order, no piece of more than `budget` scores a head unless one row has."""
    bounds_B1 = np.searchsorted(captured.sequence_R, np.arange(len(captured.cu_tokens_B1))).tolist()
    for b, (start, stop) in enumerate(pairwise(bounds_B1)):
        if start == stop:
            continue
        step = max(1, budget // (int(captured.position_R[stop - 1]) + 1))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield _Piece(first, last - first, int(captured.cu_tokens_B1[b]), int(captured.position_R[last - 1]) + 1)


def _tiles(captured: Captured, budget: int) -> Iterator[list[_Piece]]:
    """Neighbouring pieces that fit one tile without much padding."""
    tile: list[_Piece] = []
    rows = keys = area = 0
    for piece in _pieces(captured, budget):
        wider, longer, more = max(rows, piece.rows), max(keys, piece.keys), area + piece.rows * piece.keys
        padded = (len(tile) + 1) * wider * longer
        if tile and (padded > budget or padded > _WASTE * more):
            yield tile
            tile, wider, longer, more = [], piece.rows, piece.keys, piece.rows * piece.keys
        tile.append(piece)
        rows, keys, area = wider, longer, more
    if tile:
        yield tile


def _tile(captured: Captured, inputs: AttentionInputs, tile: list[_Piece]) -> Tensor:
    device = inputs.query_RHd.device
    rows, keys = max(piece.rows for piece in tile), max(piece.keys for piece in tile)
    first_n, rows_n, token_n = (np.array([getattr(p, name) for p in tile]) for name in ("first", "rows", "token"))
    row_nc = first_n[:, None] + np.minimum(np.arange(rows), rows_n[:, None] - 1)  # padding repeats the last row
    position_nc = captured.position_R[row_nc]
    token_nk = np.minimum(token_n[:, None] + np.arange(keys), len(inputs.key_TGd) - 1)  # beyond what a row sees: masked
    query_ncHd = inputs.query_RHd[to_device(row_nc, device)].float()
    key_nkGd = inputs.key_TGd[to_device(token_nk, device)].float()
    count, groups, channels = len(tile), key_nkGd.shape[2], key_nkGd.shape[3]
    query_bqd = query_ncHd.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).reshape(count * groups, -1, channels)
    key_bdk = key_nkGd.permute(0, 2, 3, 1).reshape(count * groups, channels, keys)
    score_nHck = torch.bmm(query_bqd, key_bdk).mul_(inputs.scale).view(count, -1, rows, keys)
    if inputs.softcap:
        score_nHck = score_nHck.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    score_nHck.masked_fill_(~_seen(to_device(position_nc, device), keys, inputs.window)[:, None], -math.inf)
    map_nck = score_nHck.softmax(-1).mean(1)
    map_nck[..., :SINK_POSITIONS] = 0.0
    blocks = -(-keys // BLOCK_POSITIONS)
    map_nck = torch.nn.functional.pad(map_nck, (0, blocks * BLOCK_POSITIONS - keys))
    pooled_S = map_nck.unflatten(-1, (blocks, BLOCK_POSITIONS)).sum(-1).half().flatten()
    return pooled_S.index_select(0, to_device(_entries(position_nc, rows_n, blocks), device))


def _seen(position_nc: Tensor, keys: int, window: int | None) -> Tensor:
    """bool [n, c, k]: positions that a row sees."""
    key_k = torch.arange(keys, device=position_nc.device)
    seen_nck = key_k <= position_nc[..., None]
    return seen_nck if window is None else seen_nck & (key_k > position_nc[..., None] - window)


def _entries(position_nc: np.ndarray, rows_n: np.ndarray, blocks: int) -> np.ndarray:
    """int64 [K]: where the entries of the rows that are no padding lie among all of a tile."""
    real_nc = np.arange(position_nc.shape[1]) < rows_n[:, None]
    starts_R = np.flatnonzero(real_nc) * blocks
    counts_R = position_nc[real_nc] // BLOCK_POSITIONS + 1
    before_R = np.cumsum(counts_R) - counts_R
    return np.repeat(starts_R - before_R, counts_R) + np.arange(int(counts_R.sum()))
