"""One pass's captured values: the body names a block and hands over what it has; only what is wished and wanted is kept.

In: tensors over the slots that the pass computes (packed tokens, or padded places); out: `Captured`, over wanted rows and whole sequences.
Rows are copied at once, so that a layer's tensors may be freed or overwritten behind the tap.
Axes: X computed slots, R wanted rows, T tokens of whole sequences, H query heads, G key heads, d channels, D width, F ffn width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_server.backends.transformers.capture import activation
from teacher_server.signals.captured import AttentionInputs, Captured, FfnActivation, Wish
from teacher_server.signals.transfer import to_device


class NotCapturableError(Exception):
    """This model does not show what is wished."""


def captured_numbers(text: Any, wish: Wish) -> int:
    """How many numbers are kept per token that is wanted, by a model's text configuration; figures of activations are not counted."""
    numbers = len(wish.states) * int(text.hidden_size)
    if wish.attention:
        channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        numbers += len(wish.attention) * int(channels * (text.num_attention_heads + 3 * key_heads))  # keys twice
    return numbers


class Taps:
    """What one pass hands over.

    Args:
        wish: what is kept.
        slots_of: for each sequence, the slot of each of its tokens.
        rows: the wanted positions of each sequence, rising.
        device: of the model.
    """

    def __init__(
        self, wish: Wish, slots_of: Sequence[np.ndarray], rows: Sequence[np.ndarray], device: torch.device
    ) -> None:
        self.wish = wish
        self._lengths_B = np.array([len(slots) for slots in slots_of], np.int64)
        self._rows = [np.asarray(row, np.int64) for row in rows]
        row_slots = [slots[row] for slots, row in zip(slots_of, self._rows, strict=True)]
        self._rows_R = to_device(np.concatenate(row_slots).astype(np.int64), device)
        self._tokens_T = to_device(np.concatenate(slots_of).astype(np.int64), device) if wish.attention else None
        self._states: dict[int, Tensor] = {}
        self._plain_keys: dict[int, Tensor] = {}
        self._attention: dict[int, AttentionInputs] = {}
        self._ffn: dict[int, FfnActivation] = {}

    def state(self, block: int, x_XD: Tensor) -> None:
        """The output of a block; of block 0, the embedding."""
        if block in self.wish.states:
            self._states[block] = self._of_rows(x_XD)

    def plain_key(self, block: int, key_XF: Tensor) -> None:
        """Keys as they are projected; comes before `attention`."""
        if block in self.wish.attention:
            self._plain_keys[block] = self._of_tokens(key_XF.flatten(1))

    def attention(
        self, block: int, query_XHd: Tensor, key_XGd: Tensor, value_XGd: Tensor, *, scale: float, softcap: float = 0.0,
        window: int | None = None,
    ) -> None:  # fmt: skip
        """What attention multiplies."""
        if block not in self.wish.attention:
            return
        key_TGd, plain_TF = self._of_tokens(key_XGd), self._plain_keys.pop(block, None)
        if plain_TF is None or plain_TF.shape[1] != key_TGd[0].numel():
            raise NotCapturableError(f"block {block} does not show its keys before rotation")
        self._attention[block] = AttentionInputs(
            query_RHd=self._of_rows(query_XHd),
            key_TGd=key_TGd,
            plain_key_TGd=plain_TF.view_as(key_TGd),
            value_TGd=self._of_tokens(value_XGd),
            scale=scale,
            softcap=softcap,
            window=window,
        )

    def ffn(self, block: int, u_XF: Tensor, scale_X1: Tensor | None = None) -> None:
        """The input of a block's `down_proj`; rows of float8 come with their scales."""
        if block not in self.wish.ffn:
            return
        quantiles_RQ = activation.sorted_means(self._of_rows(u_XF)) if self.wish.quantiles else None
        self._ffn[block] = FfnActivation(self._of_rows(activation.energy(u_XF, scale_X1)), quantiles_RQ)

    def routed_ffn(self, block: int, experts: Any, x_XD: Tensor, expert_XK: Tensor, weight_XK: Tensor) -> None:
        """What experts are given: their rows, and each row's experts and weights."""
        if block not in self.wish.ffn:
            return
        inputs = (self._of_rows(part) for part in (x_XD, expert_XK, weight_XK))
        u_RF = activation.routed_sum(experts, *inputs)
        quantiles_RQ = activation.sorted_means(u_RF) if self.wish.quantiles else None
        self._ffn[block] = FfnActivation(activation.energy(u_RF), quantiles_RQ)

    def _of_rows(self, x_X: Tensor) -> Tensor:
        if x_X.element_size() == 1:  # float8, which torch selects no rows of
            return x_X.view(torch.uint8).index_select(0, self._rows_R).view(x_X.dtype)
        return x_X.index_select(0, self._rows_R)

    def _of_tokens(self, x_X: Tensor) -> Tensor:
        assert self._tokens_T is not None
        return x_X.index_select(0, self._tokens_T)

    def captured(self) -> Captured:
        """All that was wished.

        Raises:
            NotCapturableError: a block has not been there.
        """
        got: dict[str, Mapping[int, Any]] = {"states": self._states, "attention": self._attention, "ffn": self._ffn}
        for name, found in got.items():
            missing = sorted(set(getattr(self.wish, name)) - set(found))
            if missing:
                raise NotCapturableError(f"block {missing[0]} did not show its {name}")
        return Captured(
            states=self._states,
            attention=self._attention,
            ffn=self._ffn,
            cu_tokens_B1=np.concatenate([np.zeros(1, np.int64), np.cumsum(self._lengths_B)]),
            position_R=np.concatenate(self._rows),
            sequence_R=np.repeat(np.arange(len(self._rows)), [len(row) for row in self._rows]),
        )
