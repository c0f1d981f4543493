"""Values from inside a pass that signals of chosen layers are made of: what is wanted, and what a backend hands over.

In: a wish, the union over the signals of a batch; out: tensors on the model's device, of the very pass that gives the final states, so
that features cost no second forward. Blocks are counted from 1; 0 is the embedding, the input of block 1.

Axes: R rows at hand, T tokens of all sequences one behind the other, B sequences, H query heads, G key heads, d channels of a head, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

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
        energy_R: float32, log(norm(u) / sqrt(width) + 1e-6) (algorithms.md 6).
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
