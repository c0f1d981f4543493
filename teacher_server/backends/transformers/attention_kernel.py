"""Causal attention over packed segments as a Triton kernel: one program for each head of each block of queries.

In: queries, keys and values of 16-bit floats on a CUDA device, as slices of wider rows; out: [T, H, d].
Keys may be rows named one by one, so that segments share a past without copies of it. torch's own kernel
(FlashAttention 2, the oracle) takes a fifth to a half longer on Hopper, and takes over where `usable` says no.
Axes: T packed tokens, H query heads, G key heads, d channels of a head, S segments, P blocks of queries.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernel below is Triton's language, which has no types.
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

QUERIES = 64  # of a block; 128 x 128 with 8 warps is 8 % faster on long sequences and 16 % slower on mixed ones
_KEYS = 64  # at a time
_LOG2_E = 1.4426950408889634


def usable(query_THd: Tensor) -> bool:
    """Whether the kernel runs on these queries."""
    small = query_THd.element_size() == 2 and query_THd.shape[-1] in (32, 64, 128)
    return triton is not None and query_THd.is_cuda and small


def blocks(cu_queries_S1: np.ndarray, cu_keys_S1: np.ndarray) -> np.ndarray:
    """Segment and first query of every block, int32 [P, 2]; those that see the most keys first, so that none comes late."""
    queries_S, keys_S = np.diff(cu_queries_S1), np.diff(cu_keys_S1)
    counts_S = -(-queries_S // QUERIES)
    segment_P = np.repeat(np.arange(len(queries_S)), counts_S)
    place_P = np.arange(len(segment_P)) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S)
    seen_P = (keys_S - queries_S)[segment_P] + np.minimum((place_P + 1) * QUERIES, queries_S[segment_P])
    order_P = np.argsort(-seen_P, kind="stable")
    return np.stack([segment_P, place_P * QUERIES], axis=1)[order_P].astype(np.int32)


def attend(
    query_THd: Tensor,
    key_TGd: Tensor,
    value_TGd: Tensor,
    blocks_P2: Tensor,
    cu_queries_S1: Tensor,
    cu_keys_S1: Tensor,
    key_rows_U: Tensor | None,
    scale: float,
) -> Tensor:
    """Each query sees the keys of its segment up to its own; see `layout.Layout` for the segments."""
    tokens, heads, channels = query_THd.shape
    out_THd = torch.empty(tokens, heads, channels, dtype=query_THd.dtype, device=query_THd.device)
    for x in (query_THd, key_TGd, value_TGd):
        assert x.stride(2) == 1 and x.stride(1) == channels, "heads of a row lie side by side"
    with torch.cuda.device_of(query_THd):
        _attend[(heads, len(blocks_P2))](
            *(query_THd, key_TGd, value_TGd, out_THd, cu_queries_S1 if key_rows_U is None else key_rows_U),
            *(blocks_P2, cu_queries_S1, cu_keys_S1, scale * _LOG2_E),
            *(query_THd.stride(0), key_TGd.stride(0), value_TGd.stride(0), out_THd.stride(0)),
            GROUP=heads // key_TGd.shape[1], CHANNELS=channels, NAMED=key_rows_U is not None,
            QUERIES=QUERIES, KEYS=_KEYS, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out_THd


if triton is not None:

    @triton.jit
    def _see(
        q, acc, top, total, k_ptr, v_ptr, rows_ptr, start, stop, last, row, scale, k_stride, v_stride, channel,
        MASKED: tl.constexpr, NAMED: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """The keys start..stop; `row` is the last key each query may see, `last` the number of keys there are."""
        for at in tl.range(start, stop, KEYS):
            key = at + tl.arange(0, KEYS)
            if NAMED:
                place = tl.load(rows_ptr + key, mask=key < last, other=0).to(tl.int64)
            else:
                place = key.to(tl.int64)
            if MASKED:
                k = tl.load(k_ptr + place[None, :] * k_stride + channel[:, None], mask=key[None, :] < last, other=0.0)
            else:
                k = tl.load(k_ptr + place[None, :] * k_stride + channel[:, None])
            score = tl.dot(q, k) * scale
            if MASKED:
                score = tl.where(key[None, :] <= row[:, None], score, -float("inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None]
            if MASKED:
                v = tl.load(v_ptr + place[:, None] * v_stride + channel[None, :], mask=key[:, None] < last, other=0.0)
            else:
                v = tl.load(v_ptr + place[:, None] * v_stride + channel[None, :])
            acc = tl.dot(weight.to(v.dtype), v, acc)
            top = new_top
        return acc, top, total

    @triton.jit
    def _attend(
        q_ptr, k_ptr, v_ptr, out_ptr, rows_ptr, blocks_ptr, cu_q_ptr, cu_k_ptr, scale,
        q_stride, k_stride, v_stride, out_stride,
        GROUP: tl.constexpr, CHANNELS: tl.constexpr, NAMED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(0)
        segment = tl.load(blocks_ptr + 2 * tl.program_id(1))
        first = tl.load(blocks_ptr + 2 * tl.program_id(1) + 1)
        q_start, k_start = tl.load(cu_q_ptr + segment), tl.load(cu_k_ptr + segment)
        queries, keys = tl.load(cu_q_ptr + segment + 1) - q_start, tl.load(cu_k_ptr + segment + 1) - k_start
        channel = tl.arange(0, CHANNELS)
        query = first + tl.arange(0, QUERIES)
        row = query + keys - queries
        place = (q_start + query).to(tl.int64)
        q = tl.load(
            q_ptr + place[:, None] * q_stride + head * CHANNELS + channel[None, :],
            mask=query[:, None] < queries, other=0.0,
        )  # fmt: skip
        k_ptr += (head // GROUP) * CHANNELS
        v_ptr += (head // GROUP) * CHANNELS
        if NAMED:
            rows_ptr += k_start
        else:
            k_ptr += k_start.to(tl.int64) * k_stride
            v_ptr += k_start.to(tl.int64) * v_stride
        top = tl.full([QUERIES], -float("inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        acc = tl.zeros([QUERIES, CHANNELS], tl.float32)
        whole = (first + keys - queries + 1) // KEYS * KEYS  # keys that every query of the block sees
        stop = tl.minimum(first + QUERIES + keys - queries, keys)
        acc, top, total = _see(
            q, acc, top, total, k_ptr, v_ptr, rows_ptr, 0, whole, keys, row, scale, k_stride, v_stride, channel,
            MASKED=False, NAMED=NAMED, KEYS=KEYS,
        )  # fmt: skip
        acc, top, total = _see(
            q, acc, top, total, k_ptr, v_ptr, rows_ptr, whole, stop, keys, row, scale, k_stride, v_stride, channel,
            MASKED=True, NAMED=NAMED, KEYS=KEYS,
        )  # fmt: skip
        out = acc / total[:, None]
        tl.store(
            out_ptr + place[:, None] * out_stride + head * CHANNELS + channel[None, :],
            out.to(out_ptr.dtype.element_ty), mask=query[:, None] < queries,
        )  # fmt: skip
