"""Causal attention over packed segments of different lengths, also as an attention function of transformers.

In: queries, keys and values [T, heads, channels] of a `Layout`; out: the same shape as the queries. No padding, no mask.
It refuses what it does not compute (sliding windows, soft caps, sinks, masks), so that such a model is run another way.
Axes: T packed tokens, H query heads, G key heads, d channels of a head, S segments, U keys of all segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from teacher_server.backends.transformers import attention_kernel
from teacher_server.backends.transformers.packing import Layout
from teacher_server.signals.transfer import to_device

NAME = "lyceum_packed"
# Arguments of an attention function that change nothing here; any other that is set is refused.
HARMLESS = {"dropout", "position_ids", "cache_position", "use_cache", "position_embeddings", "past_key_values"}
# torch 2.13 wants to be told of fewer key heads than query heads; torch 2.11 takes them unasked.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class NotPackableError(Exception):
    """This model's attention is not plain causal attention."""


@dataclass(frozen=True)
class Packing:
    """A `Layout` on the device, as attention needs it; see there for the fields, and `attention_kernel` for the blocks."""

    cu_queries_S1: Tensor
    cu_keys_S1: Tensor
    key_rows_U: Tensor | None
    max_queries: int
    max_keys: int
    blocks_P2: Tensor | None
    bounds: tuple[
        tuple[tuple[int, int], tuple[int, int]], ...
    ]  # of queries and keys, for devices without such a kernel

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Packing:
        """Copies what is needed to `device`."""
        queries, keys = layout.cu_queries_S1, layout.cu_keys_S1
        return cls(
            cu_queries_S1=to_device(queries, device),
            cu_keys_S1=to_device(keys, device),
            key_rows_U=None if layout.key_rows_U is None else to_device(layout.key_rows_U, device),
            max_queries=layout.max_queries,
            max_keys=layout.max_keys,
            blocks_P2=to_device(attention_kernel.blocks(queries, keys), device) if device.type == "cuda" else None,
            bounds=tuple(zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True)),
        )


def attend(query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, packing: Packing, scale: float) -> Tensor:
    """Each query sees the keys of its segment up to its own; [T, H, d]."""
    if packing.blocks_P2 is not None and attention_kernel.usable(query_THd):
        return attention_kernel.attend(
            query_THd, key_TGd, value_TGd, packing.blocks_P2, packing.cu_queries_S1, packing.cu_keys_S1, packing.key_rows_U, scale
        )  # fmt: skip
    key_UGd, value_UGd = key_TGd, value_TGd
    if packing.key_rows_U is not None:
        key_UGd = key_TGd.index_select(0, packing.key_rows_U)
        value_UGd = value_TGd.index_select(0, packing.key_rows_U)
    if not query_THd.is_cuda or query_THd.dtype == torch.float32:
        return _attend_by_segment(query_THd, key_UGd, value_UGd, packing, scale)
    found = varlen_attn(
        query_THd, key_UGd, value_UGd, packing.cu_queries_S1, packing.cu_keys_S1, packing.max_queries, packing.max_keys,
        scale=scale, window_size=(-1, 0), **_GROUPED,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    return found


def _attend_by_segment(query_THd: Tensor, key_UGd: Tensor, value_UGd: Tensor, packing: Packing, scale: float) -> Tensor:
    """The same, a segment at a time: for the CPU and for float32, where there is no kernel for segments."""
    out_THd = torch.empty_like(query_THd)
    attention = nn.functional.scaled_dot_product_attention
    for (first, last), (start, stop) in packing.bounds:
        query, key, value = (
            x.transpose(0, 1)[None] for x in (query_THd[first:last], key_UGd[start:stop], value_UGd[start:stop])
        )
        whole = last - first == stop - start
        mask = None if whole else causal_lower_right(last - first, stop - start)
        found = attention(query, key, value, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True)
        out_THd[first:last] = found[0].transpose(0, 1)
    return out_THd


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, packing: Packing | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: [1, heads, T, d] in, [1, T, H, d] out.

    Raises:
        NotPackableError: something else than plain causal attention is asked for.
    """
    asked = sorted(name for name, value in settings.items() if value is not None and name not in HARMLESS)
    if packing is None or attention_mask is not None or asked or not getattr(module, "is_causal", True):
        raise NotPackableError(f"its attention takes {', '.join(asked) or 'a mask'}")
    if query.shape[-1] != value.shape[-1]:
        raise NotPackableError(f"its keys have {query.shape[-1]} channels and its values {value.shape[-1]}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_THd, key_TGd, value_TGd = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return attend(query_THd, key_TGd, value_TGd, packing, scale)[None], None


def register() -> None:
    """Makes transformers know the function; a second time changes nothing."""
    function: Callable[..., Any] = packed_attention
    AttentionInterface.register(NAME, function)
