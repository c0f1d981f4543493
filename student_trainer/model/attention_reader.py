"""Queries, keys and values of a block made again, with gradients, from what the block reads.

In: the output of the block before; out: `AttentionStates`. It stands outside of the pass, so that compiled layers, recorded passes and
gradient checkpointing stay as they are, and attention never has to give its maps (`output_attentions` forces a slow kernel, or gives none
under sdpa without a word). Whether a block is understood is tried, not believed: see `AttentionReader.check`.

Axes: B sequences, L padded length, D width, H query heads, G key heads, d channels of a head.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.errors import ModelError
from student_trainer.losses.features.attention import AttentionStates
from student_trainer.model.forward import blocks_of, run_body

_PROBE_TOKENS = 96
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # of the norm; half-precision passes round by percents
_HALF_TOLERANCE = 5e-2


class AttentionReader:
    """See module.

    Args:
        body: the part of a causal model that makes states.
        computing: what its passes are computed under.
    """

    def __init__(self, body: Any, computing: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._body = body
        self._blocks = blocks_of(body)
        self._computing = computing

    def __call__(self, block: int, state_BLD: Tensor) -> AttentionStates:
        """Of block `block`, counted from 1, that reads `state_BLD`.

        Raises:
            ModelError: its attention is not made of separate projections.
        """
        layer = self._blocks[block - 1]
        attention = _part(layer, "self_attn")
        with self._computing(), _without_dropout(attention):
            norm = getattr(layer, "input_layernorm", None)
            read_BLD = state_BLD if norm is None else norm(state_BLD)
            return self._states(attention, read_BLD)

    def _states(self, attention: nn.Module, read_BLD: Tensor) -> AttentionStates:
        channels = int(_part(attention, "head_dim"))
        query, key, value = (
            _part(attention, name)(read_BLD).unflatten(-1, (-1, channels)) for name in ("q_proj", "k_proj", "v_proj")
        )
        rotated_query, rotated_key = self._rotated(
            attention, _normed(attention, "q_norm", query), _normed(attention, "k_norm", key), read_BLD
        )
        config = self._body.config.get_text_config()
        window = getattr(
            attention,
            "sliding_window",
            None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None),
        )
        # transformers' sdpa leaves the cap out (integrations/sdpa_attention.py): maps are of what the passes compute
        capped = getattr(config, "_attn_implementation", "") != "sdpa"
        return AttentionStates(
            rotated_query, rotated_key, key, value,
            scale=float(_part(attention, "scaling")),
            softcap=float((capped and getattr(attention, "attn_logit_softcapping", None)) or 0.0),
            window=window,
        )  # fmt: skip

    def _rotated(self, attention: nn.Module, query: Tensor, key: Tensor, read_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """By the model's own function and frequencies."""
        rotary = _part(self._body, "rotary_emb")
        positions = torch.arange(query.shape[1], device=query.device)[None]
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        with torch.no_grad():
            angles = rotary(read_BLD, positions, *((_part(attention, "layer_type"),) if by_type else ()))
        apply = _part(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")
        query, key = apply(query.transpose(1, 2), key.transpose(1, 2), *angles)
        return query.transpose(1, 2), key.transpose(1, 2)

    @torch.no_grad()
    def check(self, block: int) -> None:
        """Holds what attention makes of these queries, keys and values against what the block's attention gives, on random tokens.

        Raises:
            ModelError: they differ: the architecture does something here that is not known.
        """
        attention = _part(self._blocks[block - 1], "self_attn")
        config = self._body.config.get_text_config()
        tokens = min(_PROBE_TOKENS, int(getattr(config, "max_position_embeddings", None) or _PROBE_TOKENS))
        generator = torch.Generator().manual_seed(0)
        weight = next(self._body.parameters())
        ids_BL = torch.randint(0, config.vocab_size, (2, tokens), generator=generator).to(weight.device)
        seen: list[Tensor] = []
        handle = attention.register_forward_hook(lambda *given: seen.append(given[-1][0]))
        training = self._body.training
        self._body.eval()
        try:
            with self._computing():
                outputs = run_body(self._body, ids_BL, (block - 1,))
            with self._computing():
                found = _part(attention, "o_proj")(_attended(self(block, outputs.taps[block - 1])))
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ) as error:  # parts of other shapes, such as a rotation of some channels
            said = " ".join(str(error).split())[:200]
            raise ModelError(
                f"block {block} of {type(self._body).__name__}: its attention cannot be made again ({said}), so loss.attention is not possible "
                "with this student; set it to null"
            ) from error
        finally:
            handle.remove()
            self._body.train(training)
        off = float((found.float() - seen[0].float()).norm() / seen[0].float().norm().clamp_min(1e-12))
        if not off <= _TOLERANCE.get(seen[0].dtype, _HALF_TOLERANCE):
            raise ModelError(
                f"block {block} of {type(self._body).__name__} attends otherwise than its queries and keys say (off by {off:.2g} of its "
                "norm): loss.attention is not possible with this student; set it to null"
            )


def _attended(states: AttentionStates) -> Tensor:
    """[B, L, H d], what attention gives to the output projection."""
    tokens = states.query_BLHd.shape[1]
    position_L = torch.arange(tokens, device=states.query_BLHd.device)
    hidden_LL = ~states.visible(position_L, tokens)
    map_BGhLT = states.scores(states.query_BLHd, states.key_BLGd).masked_fill(hidden_LL, -torch.inf).softmax(-1)
    found_BLH = torch.einsum("bghrt,btgd->brghd", map_BGhLT, states.value_BLGd.to(map_BGhLT.dtype)).flatten(2)
    return found_BLH.to(states.value_BLGd.dtype)


def _normed(attention: nn.Module, name: str, heads_BLHd: Tensor) -> Tensor:
    """With the norm of that name, if there is one: of each head, or of all side by side."""
    norm = getattr(attention, name, None)
    if norm is None:
        return heads_BLHd
    if getattr(norm, "weight", heads_BLHd).shape[-1] == heads_BLHd.shape[-1]:
        return norm(heads_BLHd)
    return norm(heads_BLHd.flatten(-2)).view_as(heads_BLHd)


def _part(owner: Any, name: str) -> Any:
    found = getattr(owner, name, None)
    if found is None:
        raise ModelError(
            f"{getattr(owner, '__name__', type(owner).__name__)} has no {name}: its attention cannot be made again, so loss.attention is "
            "not possible with this student; set it to null"
        )
    return found


@contextlib.contextmanager
def _without_dropout(attention: nn.Module) -> Iterator[None]:
    """Adapters may drop at random: a map is of what the weights are, and draws no number that others would have drawn."""
    drawing = [module for module in attention.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in drawing:
        module.training = False
    try:
        yield
    finally:
        for module in drawing:
            module.training = True
