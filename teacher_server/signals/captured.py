"""Values from inside a pass that signals of chosen layers are made of: what is wanted, and what a backend hands over.

In: a wish, the union over the signals of a batch; out: tensors on the model's device, of the very pass that gives the final states, so
that features cost no second forward. Blocks are counted from 1; 0 is the embedding, the input of block 1.

Axes: R rows at hand, T tokens of all sequences one behind the other, B sequences, H query heads, G key heads, d channels of a head, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from teacher_server.signals.transfer import to_device

QUANTILES = 16  # of |u| / sum |u|, sorted from the largest


@dataclass(frozen=True)
class Wish:
    """Numbers of blocks, rising, by what is wanted of them."""

    states: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()
    quantiles: bool = False  # of the ffn, beside its energy

    def __bool__(self) -> bool:
        return bool(self.states or self.attention or self.ffn)


def union(wishes: Iterable[Wish]) -> Wish:
    """What grants all of them."""
    each = tuple(wishes)

    def blocks(name: str) -> tuple[int, ...]:
        return tuple(sorted({block for wish in each for block in getattr(wish, name)}))

    return Wish(blocks("states"), blocks("attention"), blocks("ffn"), any(wish.quantiles for wish in each))


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What one block's attention is computed of.

    Attributes:
        query_RHd: of the rows at hand, normed and rotated as they are multiplied.
        key_TGd: of all tokens, likewise.
        plain_key_TGd: before rotation (and before k-norm, where there is one).
        value_TGd: of all tokens.
        scale: of the products.
        softcap: of the scaled products, c tanh(x / c); 0 for none.
        window: how many positions a row sees, itself included; None for all.
    """

    query_RHd: Tensor
    key_TGd: Tensor
    plain_key_TGd: Tensor
    value_TGd: Tensor
    scale: float
    softcap: float = 0.0
    window: int | None = None


@dataclass(frozen=True, eq=False)
class FfnActivation:
    """Of the input u of one block's `down_proj` (with experts: of the routed sum), for the rows at hand.

    Attributes:
        energy_R: float32, log(norm(u) / sqrt(width) + 1e-6) (docs/concepts/method.md 6).
        quantiles_RQ: float32, means of the sixteen equal parts of |u| / sum |u| sorted from the largest; None if not wanted.
    """

    energy_R: Tensor
    quantiles_RQ: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Captured:
    """What was wished, for rows at hand of sequences at hand.

    Attributes:
        states: by block, [R, D], the output of the block before any norm, in the model's dtype.
        attention, ffn: by block.
        cu_tokens_B1: int64 on the host, bounds of each sequence among the T tokens.
        position_R: int64 on the host, of each row in its sequence.
        sequence_R: int64 on the host, the number 0..B-1 of each row's sequence, rising.
    """

    states: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, AttentionInputs] = field(default_factory=dict)
    ffn: Mapping[int, FfnActivation] = field(default_factory=dict)
    cu_tokens_B1: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    position_R: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sequence_R: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def part(self, sequences: slice, wish: Wish) -> Captured:
        """What `wish` asks of neighbouring sequences; the tensors are views."""
        first, last, _ = sequences.indices(len(self.cu_tokens_B1) - 1)
        bounds_B1 = self.cu_tokens_B1[first : last + 1]
        start, stop = (int(at) for at in np.searchsorted(self.sequence_R, [first, last]))
        rows, tokens = slice(start, stop), slice(int(bounds_B1[0]), int(bounds_B1[-1]))
        return replace(
            _merged([self], wish, lambda each: each[0][rows], lambda each: each[0][tokens]),
            cu_tokens_B1=bounds_B1 - bounds_B1[0],
            position_R=self.position_R[rows],
            sequence_R=self.sequence_R[rows] - first,
        )


def joined(parts: Sequence[Captured], numbers: Sequence[int], wish: Wish) -> Captured:
    """What several passes captured, in the order of the request.

    Args:
        parts: of the passes.
        numbers: which sequence of the request each sequence of the parts is; a permutation.
        wish: what they captured.
    """
    order_B = np.argsort(numbers, kind="stable")
    if len(parts) == 1 and np.array_equal(order_B, np.arange(len(order_B))):
        return parts[0]
    tokens_B = np.concatenate([np.diff(part.cu_tokens_B1) for part in parts])
    rows_B = np.concatenate([np.bincount(part.sequence_R, minlength=len(part.cu_tokens_B1) - 1) for part in parts])
    rows_R, tokens_T = _entries(rows_B, order_B), _entries(tokens_B, order_B)
    return replace(
        _merged(parts, wish, lambda each: _gathered(each, rows_R), lambda each: _gathered(each, tokens_T)),
        cu_tokens_B1=np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens_B[order_B])]),
        position_R=np.concatenate([part.position_R for part in parts])[rows_R],
        sequence_R=np.repeat(np.arange(len(order_B)), rows_B[order_B]),
    )


def _entries(counts_B: np.ndarray, order_B: np.ndarray) -> np.ndarray:
    """Where the entries of each sequence lie, for the sequences in another order."""
    starts_B = np.cumsum(counts_B) - counts_B
    return np.concatenate([np.arange(starts_B[b], starts_B[b] + counts_B[b]) for b in order_B])


def _gathered(each: list[Tensor], entries: np.ndarray) -> Tensor:
    whole = torch.cat(each) if len(each) > 1 else each[0]
    if np.array_equal(entries, np.arange(len(whole))):
        return whole
    return whole.index_select(0, to_device(entries, whole.device))


OfBlock = TypeVar("OfBlock", AttentionInputs, FfnActivation)
Merge = Callable[[list[Tensor]], Tensor]


def _merged(parts: Sequence[Captured], wish: Wish, rows: Merge, tokens: Merge) -> Captured:
    """The wished blocks with tensors made of those of the parts; their places are the caller's to set."""

    def block(each: list[OfBlock]) -> OfBlock:
        made: dict[str, Any] = {}
        for name in (known.name for known in fields(each[0])):
            values = [getattr(one, name) for one in each]
            if name.startswith("quantiles") and not wish.quantiles:
                made[name] = None
            elif isinstance(values[0], Tensor):
                made[name] = (tokens if "_T" in name else rows)(values)
        return replace(each[0], **made)

    return Captured(
        states={number: rows([part.states[number] for part in parts]) for number in wish.states},
        attention={number: block([part.attention[number] for part in parts]) for number in wish.attention},
        ffn={number: block([part.ffn[number] for part in parts]) for number in wish.ffn},
    )
