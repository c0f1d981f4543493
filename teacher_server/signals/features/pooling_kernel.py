"""Head-averaged attention maps, pooled over blocks of keys, as Triton kernels: no score leaves the registers.

In: queries [R, H, d] and keys [T, G, d] of 16-bit floats on a CUDA device; out: float16 [K], the entries of `attention.pooled`. The first pass
finds the log-sum-exp of every row and head, the second one takes a block of keys and adds up exp(score - lse) over its keys and all heads: the
products are made twice (0.24 TFLOP per layer of 7B at 8 x 2,048 tokens, 0.1 % of the forward), and nothing of [H, T, T] is written or read.
Must never be the only way: `attention.pooled` is the oracle, and what runs wherever `usable` says no.

Axes: R rows, T tokens, H query heads, G key heads, d channels of a head, P tiles of rows of one sequence, K entries of the axis BLOCK.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels below are Triton's language, which has no types.
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from teacher_server.signals.captured import AttentionInputs, Captured
from teacher_server.signals.transfer import to_device
from teacher_wire.core.axes import BLOCK_POSITIONS
from teacher_wire.score.signals.attention import SINK_POSITIONS

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

ROWS = 64  # of a tile
MOST_CHANNELS = 256  # of a head: a tile of queries is held in registers or shared memory
_LOG2_E = 1.4426950408889634


def usable(query_RHd: Tensor) -> bool:
    """Whether the kernels run on these queries."""
    small = query_RHd.element_size() == 2 and query_RHd.shape[-1] <= MOST_CHANNELS
    return triton is not None and query_RHd.is_cuda and small


def tiles(captured: Captured) -> np.ndarray:
    """int32 [P, 4]: first row, end of the rows, first token and number of visible keys of each tile; those with most keys first.

    Positions rise within a sequence, so the last row of a tile sees the most keys.
    """
    bounds_B1 = np.searchsorted(captured.sequence_R, np.arange(len(captured.cu_tokens_B1)))
    counts_B = -(-np.diff(bounds_B1) // ROWS)
    sequence_P = np.repeat(np.arange(len(counts_B)), counts_B)
    place_P = np.arange(len(sequence_P)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    first_P = bounds_B1[sequence_P] + place_P * ROWS
    end_P = np.minimum(first_P + ROWS, bounds_B1[sequence_P + 1])
    keys_P = captured.position_R[end_P - 1] + 1
    tiles_P4 = np.stack([first_P, end_P, captured.cu_tokens_B1[sequence_P], keys_P], axis=1)
    return tiles_P4[np.argsort(-keys_P, kind="stable")].astype(np.int32)


def pooled(captured: Captured, inputs: AttentionInputs) -> Tensor:
    """See `attention.pooled`; a row's entries do not depend on the rows and sequences beside it."""
    query_RHd, key_TGd = inputs.query_RHd, inputs.key_TGd
    rows, heads, channels = query_RHd.shape
    counts_R = captured.position_R // BLOCK_POSITIONS + 1
    made_K = torch.empty(int(counts_R.sum()), dtype=torch.float16, device=query_RHd.device)
    if not rows:
        return made_K
    assert query_RHd.stride(2) == key_TGd.stride(2) == 1, "channels lie side by side"
    tiles_P4 = tiles(captured)
    places = [
        to_device(array, query_RHd.device)
        for array in (tiles_P4, captured.position_R.astype(np.int32), np.cumsum(counts_R) - counts_R)
    ]
    lse_HR = torch.empty(heads, rows, dtype=torch.float32, device=query_RHd.device)
    strides = (*query_RHd.stride()[:2], *key_TGd.stride()[:2])
    # The scores are in powers of two; a cap is applied before that.
    factors = (inputs.scale * (1.0 if inputs.softcap else _LOG2_E), inputs.softcap, inputs.window or 0)
    settings = {
        "GROUP": heads // key_TGd.shape[1], "CHANNELS": channels, "PADDED": max(16, triton.next_power_of_2(channels)),
        "CAPPED": bool(inputs.softcap), "WINDOWED": inputs.window is not None, "ROWS": ROWS, "KEYS": BLOCK_POSITIONS,
    }  # fmt: skip
    stages = 2 if settings["PADDED"] <= 128 else 1  # 64 KiB of shared memory, which every card since Ampere has
    blocks = -(-int(tiles_P4[0, 3]) // BLOCK_POSITIONS)
    with torch.cuda.device_of(query_RHd):
        _log_sums[(heads, len(tiles_P4))](
            query_RHd,
            key_TGd,
            lse_HR,
            *places[:2],
            rows,
            *strides,
            *factors,
            **settings,
            num_warps=4,
            num_stages=stages,
        )
        _block_masses[(blocks, len(tiles_P4))](  # programs of one tile run side by side: its queries are in the L2 cache
           
            query_RHd, key_TGd, lse_HR, made_K, *places, rows, *strides, *factors, **settings,
            HEADS=heads, SINKS=SINK_POSITIONS, num_warps=4, num_stages=stages,
        )  # fmt: skip
    return made_K


if triton is not None:

    @triton.jit
    def _scores(
        q, k_ptr, key, keys, k_stride, channel, position, scale, cap, window,
        CHANNELS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    ):  # fmt: skip
        """log2 of the weights before they are normalised, float32 [rows, keys]; -inf where a row does not see a key."""
        k = tl.load(
            k_ptr + key.to(tl.int64)[None, :] * k_stride + channel[:, None],
            mask=(key < keys)[None, :] & (channel < CHANNELS)[:, None], other=0.0,
        )  # fmt: skip
        score = tl.dot(q, k) * scale
        if CAPPED:
            score = cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp(2.0 * score / cap) + 1.0))
        seen = key[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        return tl.where(seen, score, -float("inf"))

    @triton.jit
    def _log_sums(
        q_ptr, k_ptr, lse_ptr, tiles_ptr, positions_ptr, rows, q_stride, q_head, k_stride, k_head, scale, cap, window,
        GROUP: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
        ROWS: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """log2 of the sum of the weights, of one tile of rows and one head."""
        head, tile = tl.program_id(0), tl.program_id(1)
        first, end = tl.load(tiles_ptr + 4 * tile), tl.load(tiles_ptr + 4 * tile + 1)
        token, keys = tl.load(tiles_ptr + 4 * tile + 2), tl.load(tiles_ptr + 4 * tile + 3)
        row = first + tl.arange(0, ROWS)
        channel = tl.arange(0, PADDED)
        position = tl.load(positions_ptr + row, mask=row < end, other=0)
        q = tl.load(
            q_ptr + row.to(tl.int64)[:, None] * q_stride + head * q_head + channel[None, :],
            mask=(row < end)[:, None] & (channel < CHANNELS)[None, :], other=0.0,
        )  # fmt: skip
        k_ptr += token.to(tl.int64) * k_stride + (head // GROUP) * k_head
        start = 0
        if WINDOWED:  # positions rise, so the first row's window begins first
            start = tl.maximum(tl.load(positions_ptr + first) - window + 1, 0) // KEYS * KEYS
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for at in range(start, keys, KEYS):
            key = at + tl.arange(0, KEYS)
            score = _scores(
                q, k_ptr, key, keys, k_stride, channel, position, scale, cap, window,
                CHANNELS=CHANNELS, CAPPED=CAPPED, WINDOWED=WINDOWED,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(score, 1))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)  # of a row whose window begins later
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(score - base[:, None]), 1)
            top = new_top
        tl.store(lse_ptr + head.to(tl.int64) * rows + row, top + tl.log2(total), mask=row < end)

    @triton.jit
    def _block_masses(
        q_ptr, k_ptr, lse_ptr, made_ptr, tiles_ptr, positions_ptr, entries_ptr, rows,
        q_stride, q_head, k_stride, k_head, scale, cap, window,
        GROUP: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
        ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, SINKS: tl.constexpr,
    ):  # fmt: skip
        """The mean over heads of what a tile of rows gives to one block of keys."""
        block, tile = tl.program_id(0), tl.program_id(1)
        keys = tl.load(tiles_ptr + 4 * tile + 3)
        if block * KEYS >= keys:
            return
        first, end, token = (
            tl.load(tiles_ptr + 4 * tile), tl.load(tiles_ptr + 4 * tile + 1), tl.load(tiles_ptr + 4 * tile + 2),
        )  # fmt: skip
        row = first + tl.arange(0, ROWS)
        channel = tl.arange(0, PADDED)
        there = row < end
        position = tl.load(positions_ptr + row, mask=there, other=-1)
        key = block * KEYS + tl.arange(0, KEYS)
        k_ptr += token.to(tl.int64) * k_stride
        mass = tl.zeros([ROWS], tl.float32)
        for head in range(HEADS):
            q = tl.load(
                q_ptr + row.to(tl.int64)[:, None] * q_stride + head * q_head + channel[None, :],
                mask=there[:, None] & (channel < CHANNELS)[None, :], other=0.0,
            )  # fmt: skip
            lse = tl.load(lse_ptr + row, mask=there, other=0.0)
            lse_ptr += rows  # of the next head
            score = _scores(
                q, k_ptr + (head // GROUP) * k_head, key, keys, k_stride, channel, position, scale, cap, window,
                CHANNELS=CHANNELS, CAPPED=CAPPED, WINDOWED=WINDOWED,
            )  # fmt: skip
            weight = tl.exp2(score - lse[:, None])
            mass += tl.sum(tl.where((key >= SINKS)[None, :], weight, 0.0), 1)
        entry = tl.load(entries_ptr + row, mask=there, other=0) + block
        tl.store(made_ptr + entry, (mass / HEADS).to(tl.float16), mask=there & (block <= position // KEYS))
