"""What transformers' own layers show to `Taps`: hooks that are there during one pass, and an attention function around the plain one.

In: a body and taps; out: nothing but what the taps are handed. The layers compute what they compute without: the same functions of the same
tensors. Axes: X computed slots, L tokens of a row, D width, F ffn width, H query heads, G key heads, d channels of a head.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from teacher_server.backends.transformers.attention import HARMLESS
from teacher_server.backends.transformers.capture import activation
from teacher_server.backends.transformers.capture.taps import NotCapturableError, Taps

_NAME = "lyceum_listening"
_FFN_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "mlp_block")
# Settings of an attention function that its map depends on and `AttentionInputs` holds, or that say how the plain one runs.
_KNOWN = HARMLESS | {"scaling", "softcap", "sliding_window", "packing", "is_causal", "output_attentions"}


@contextmanager
def listening(body: Any, taps: Taps | None) -> Iterator[None]:
    """While it is open, the body's layers show the taps what they wish; None changes nothing.

    Raises:
        NotCapturableError: the layers are not built of what is known here.
    """
    if taps is None:
        yield
        return
    with ExitStack() as held:
        blocks = getattr(body, "layers", None)
        if blocks is None:
            raise NotCapturableError("it is not built of `layers`")
        for number in taps.wish.states:
            held.callback(_on_state(blocks, number, taps).remove)
        for number in taps.wish.attention:
            held.enter_context(_on_attention(body, blocks, number, taps))
        for number in taps.wish.ffn:
            held.callback(_on_ffn(blocks[number - 1], number, taps).remove)
        yield


def _flat(x_bLD: Tensor) -> Tensor:
    return x_bLD.flatten(0, -2)


def _on_state(blocks: Any, number: int, taps: Taps) -> Any:
    if number == 0:

        def enters(module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
            taps.state(0, _flat(args[0] if args else settings["hidden_states"]))

        return blocks[0].register_forward_pre_hook(enters, with_kwargs=True)

    def leaves(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        taps.state(number, _flat(output[0] if isinstance(output, tuple) else output))

    return blocks[number - 1].register_forward_hook(leaves)


# ------------------------------------------------------------------ attention


@dataclass(frozen=True)
class _Listener:
    """Who hears of one module's attention, and how it would run without."""

    number: int
    taps: Taps
    plain: str
    window: int | None  # that its mask has


_listeners: dict[nn.Module, _Listener] = {}  # of the modules of open passes


@contextmanager
def _on_attention(body: Any, blocks: Any, number: int, taps: Taps) -> Iterator[None]:
    """The module gets a configuration of its own, that names the function below; masks are made by the body's."""
    module = getattr(blocks[number - 1], "self_attn", None)
    projection = getattr(module, "k_proj", None)
    if module is None or projection is None or not hasattr(module, "config"):
        raise NotCapturableError(f"block {number} has no self_attn with a k_proj")
    config = module.config
    AttentionInterface.register(_NAME, _attention_heard)
    _listeners[module] = _Listener(number, taps, config._attn_implementation, _window(body.config, number))
    hook = projection.register_forward_hook(lambda _, args, output: taps.plain_key(number, _flat(output)))
    module.config = copy.copy(config)
    module.config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        module.config = config
        hook.remove()
        del _listeners[module]


def _window(config: Any, number: int) -> int | None:
    """How many positions a row of a block sees, by the model's configuration.

    Raises:
        NotCapturableError: its layers look in another way.
    """
    kinds = getattr(config, "layer_types", None)
    kind = kinds[number - 1] if kinds else ("sliding_attention" if getattr(config, "sliding_window", None) else "")
    if kind not in ("", "full_attention", "sliding_attention") or getattr(config, "attention_chunk_size", None):
        raise NotCapturableError(f"block {number} is of type {kind or 'chunked attention'}")
    return config.sliding_window if kind == "sliding_attention" else None


def _attention_heard(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> Any:
    """What transformers calls, [b, heads, L, d] each: shows the tensors and does what the plain function does."""
    listener = _listeners[module]
    asked = sorted(name for name, given in settings.items() if given is not None and name not in _KNOWN)
    if asked or settings.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotCapturableError(f"its attention takes {', '.join(asked) or 'tokens that come later'}")
    window = settings.get("sliding_window")
    if window != listener.window and not (window is None and "sliding_window" not in settings):
        raise NotCapturableError(f"block {listener.number} has a window of {window}, its mask one of {listener.window}")
    scaling = settings.get("scaling")
    query_XHd, key_XGd, value_XGd = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    listener.taps.attention(
        listener.number, query_XHd, key_XGd, value_XGd,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=float(settings.get("softcap") or 0.0),
        window=listener.window,
    )  # fmt: skip
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    plain = ALL_ATTENTION_FUNCTIONS.get_interface(listener.plain, eager)
    return plain(module, query, key, value, attention_mask, **settings)


# ------------------------------------------------------------------------ ffn


def ffn_of(block: Any) -> Any:
    """The feed-forward part of a decoder layer; None if it has none by a known name."""
    return next((getattr(block, name) for name in _FFN_NAMES if hasattr(block, name)), None)


def _on_ffn(block: Any, number: int, taps: Taps) -> Any:
    ffn = ffn_of(block)
    if isinstance(getattr(ffn, "down_proj", None), nn.Module):
        return ffn.down_proj.register_forward_pre_hook(lambda _, args: taps.ffn(number, _flat(args[0])))
    experts = getattr(ffn, "experts", None)
    if experts is None or not activation.has_routed_sum(experts):
        raise NotCapturableError(f"block {number} has neither a down_proj nor experts of the common shape")

    def routed(module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        x_XD, expert_XK, weight_XK = (*args, *settings.values())
        taps.routed_ffn(number, experts, _flat(x_XD), expert_XK, weight_XK)

    return experts.register_forward_pre_hook(routed, with_kwargs=True)


def kv_width(body: Any) -> int:
    """Channels of the keys of a block, and of its values; 0 where not all blocks have as many of both."""
    modules = [getattr(block, "self_attn", None) for block in getattr(body, "layers", ())]
    projections = [getattr(module, name, None) for module in modules for name in ("k_proj", "v_proj")]
    widths = {getattr(projection, "out_features", 0) for projection in projections}
    return int(widths.pop()) if len(widths) == 1 else 0
