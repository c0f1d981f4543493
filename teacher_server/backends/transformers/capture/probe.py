"""Which values from inside a pass a loaded model can give: what its body captures is compared with the plain model under eager attention.

In: a body and the way it is run; out: fields of `Wish` that may be granted. What differs is not offered, with a line in the log.
Axes: B sequences, L tokens of one, R rows, H query heads, G key heads, d channels of a head, D width, F ffn width, E experts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from teacher_server.backends.logits import position_limit
from teacher_server.backends.transformers.capture import activation
from teacher_server.backends.transformers.capture.hooks import ffn_of
from teacher_server.backends.transformers.capture.taps import NotCapturableError
from teacher_server.config.backends import TransformersBackend as Config
from teacher_server.signals.captured import AttentionInputs, Captured, Wish, union

log = logging.getLogger(__name__)

_LENGTHS, _SHARED = (96, 84), 72  # of the probe's sequences, and of their common start
# Largest distance of a row by dtype, relative to its size; of an energy, absolute. Rounding through all layers, not more.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
# A head-averaged map's distance is summed over its keys. Eager attention rounds scores to the model's dtype before its softmax, half a
# nat at a score of 128 in bfloat16, which ours does not.
_MAP_FACTOR = 3.0
# Rows that must agree: all, but where experts are chosen a near tie may go either way and take its row and some behind with it.
_AGREEING, _AGREEING_ROUTED = 1.0, 0.8
_OUT_NAMES = ("o_proj", "out_proj", "dense")

Sequences = list[np.ndarray]


class Capturing(Protocol):
    """A `decoder_runners.Body`."""

    def run(self, sequences: Sequences, rows: Sequences, wish: Wish) -> tuple[Tensor, Captured]: ...


def captures(body: Any, way: Capturing, config: Config) -> tuple[str, ...]:
    """The fields of `Wish` that this model grants.

    Args:
        body: transformers' decoder, as it is.
        way: how it is run.
        config: names the model and its dtype.
    """
    blocks = len(getattr(body, "layers", ()))
    every = tuple(range(1, blocks + 1))
    wishes = {"states": Wish(states=(0, *every)), "attention": Wish(attention=every), "ffn": Wish(ffn=every)}
    agreeing = (
        _AGREEING_ROUTED if any(_experts(block) is not None for block in getattr(body, "layers", ())) else _AGREEING
    )
    sequences = _sequences(body.config.vocab_size, position_limit(body.config))
    rows = [np.arange(len(ids)) for ids in sequences]
    given = []
    try:
        shown = [shown_by(body, ids) for ids in sequences]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code, which raises what it likes
        log.info("model %s gives no signals of chosen layers: %s", config.model, _line(error))
        return ()
    together = _whole(way, sequences, rows, union(wishes.values()))
    for name, wish in wishes.items():
        try:
            if not blocks:
                raise NotCapturableError("it is not built of `layers`")
            captured = together or way.run(sequences, rows, wish)[1]
            for number, distance_R in _DISTANCES[name](captured, shown):
                distance = float(
                    distance_R.nan_to_num(torch.inf).sort().values[math.ceil(agreeing * len(distance_R)) - 1]
                )
                if not distance <= _TOLERANCE[config.dtype]:
                    raise NotCapturableError(f"block {number} differs from the plain one by {distance:.2g}")
            given.append(name)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            log.info("model %s does not give %s of chosen layers: %s", config.model, name, _line(error))
    return tuple(given)


def _whole(way: Capturing, sequences: Sequences, rows: Sequences, wish: Wish) -> Captured | None:
    """All of it from one pass; None if that fails, which each wish by itself will say."""
    try:
        return way.run(sequences, rows, wish)[1]
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _sequences(vocab: int, longest: int) -> Sequences:
    generator = np.random.default_rng(1)
    sequences = [generator.integers(0, vocab, min(n, longest), dtype=np.int32) for n in _LENGTHS]
    sequences[1][:_SHARED] = sequences[0][: min(_SHARED, len(sequences[1]))]
    return sequences


def _experts(block: Any) -> Any:
    return getattr(ffn_of(block), "experts", None)


# ------------------------------------------------------- the plain model's own


@dataclass
class Shown:
    """What hooks on the plain model saw of one sequence; by block, as far as the model has such modules.

    Attributes:
        states: [L, D]; 0 is the embedding.
        maps: [H, L, L], the attention's own probabilities.
        contexts: [L, H d], the input of the attention's last product.
        keys: [L, G d], the output of `k_proj`.
        ffn: [L, F], the input of `down_proj`, or the routed sum.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)
    contexts: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    ffn: dict[int, Tensor] = field(default_factory=dict)


def shown_by(body: Any, ids_L: np.ndarray) -> Shown:
    """One sequence through the plain model under eager attention, with hooks."""
    shown, handles = Shown(), list[Any]()
    for number, block in enumerate(getattr(body, "layers", ()), 1):
        handles += _watch(shown, number, block)
    plain = body.config._attn_implementation
    body.config._attn_implementation = "eager"
    try:
        body(input_ids=torch.from_numpy(ids_L)[None].long().to(next(body.parameters()).device), use_cache=False)
    finally:
        body.config._attn_implementation = plain
        for handle in handles:
            handle.remove()
    return shown


def _watch(shown: Shown, number: int, block: Any) -> Iterator[Any]:
    def kept(where: dict[int, Tensor], place: int = number) -> Callable[[Any], None]:
        def keep(found: Any) -> None:
            where[place] = (found[0] if isinstance(found, tuple) else found)[0].clone()

        return keep

    def before(module: nn.Module, keep: Callable[[Any], None]) -> Any:
        enters = lambda _, args, settings: keep(args[0] if args else settings["hidden_states"])  # noqa: E731
        return module.register_forward_pre_hook(enters, with_kwargs=True)

    def behind(module: nn.Module, keep: Callable[[Any], None]) -> Any:
        return module.register_forward_hook(lambda _, args, output: keep(output))

    if number == 1:
        yield before(block, kept(shown.states, 0))
    yield behind(block, kept(shown.states))
    attention, ffn = getattr(block, "self_attn", None), ffn_of(block)
    if attention is not None:
        mapped = kept(shown.maps)
        yield behind(attention, lambda output: mapped(output[1]) if output[1] is not None else None)
        for name in _OUT_NAMES:
            if hasattr(attention, name):
                yield before(getattr(attention, name), kept(shown.contexts))
        if hasattr(attention, "k_proj"):
            yield behind(attention.k_proj, kept(shown.keys))
    if isinstance(getattr(ffn, "down_proj", None), nn.Module):
        yield before(ffn.down_proj, kept(shown.ffn))
    elif activation.has_routed_sum(_experts(block)):
        yield ffn.experts.register_forward_hook(lambda *seen: shown.ffn.update({number: _dense_sum(*seen)}))


def _dense_sum(experts: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The routed sum with every expert asked about every row, and with what it gives compared with the experts' own output."""
    x_RD, expert_RK, weight_RK = args
    weight_RE = weight_RK.float().new_zeros(len(x_RD), experts.num_experts).scatter_add(1, expert_RK, weight_RK.float())
    sum_RF, made_RD = 0.0, torch.zeros_like(output, dtype=torch.float32)
    for number in range(experts.num_experts):
        gate_RF, up_RF = nn.functional.linear(x_RD, experts.gate_up_proj[number]).chunk(2, dim=-1)
        u_RF = (experts.act_fn(gate_RF) * up_RF).float() * weight_RE[:, number, None]
        sum_RF = sum_RF + u_RF
        made_RD += u_RF @ experts.down_proj[number].float().T
    distance = float(_relative(made_RD, output).max())
    if not distance <= 0.1:
        raise NotCapturableError(
            f"its experts' output is not what their routed inputs make of it, off by {distance:.2g}"
        )
    assert isinstance(sum_RF, Tensor)
    return sum_RF


# ---------------------------------------------------------------- comparisons


def _relative(found_RX: Tensor, expected_RX: Tensor) -> Tensor:
    """The distance of each row relative to its size."""
    found, expected = found_RX.double(), expected_RX.double()
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)


Distances = Iterator[tuple[int, Tensor]]  # of each row of some block


def _of_states(captured: Captured, shown: list[Shown]) -> Distances:
    for number, found_RD in captured.states.items():
        yield number, _relative(found_RD, torch.cat([one.states[number] for one in shown]))


def _of_ffn(captured: Captured, shown: list[Shown]) -> Distances:
    for number, found in captured.ffn.items():
        expected_R = torch.cat([activation.energy(one.ffn[number].float()) for one in shown])
        yield number, (found.energy_R - expected_R).abs()


def _of_attention(captured: Captured, shown: list[Shown]) -> Distances:
    for number, inputs in captured.attention.items():
        if any(number not in one.maps or number not in one.contexts for one in shown):
            raise NotCapturableError(
                f"block {number} shows no map under eager attention, or has none of {', '.join(_OUT_NAMES)}"
            )
        yield number, _relative(inputs.plain_key_TGd.flatten(1), torch.cat([one.keys[number] for one in shown]))
        for (start, stop), one in zip(pairwise(captured.cu_tokens_B1.tolist()), shown, strict=True):
            weight_HRL = weights(inputs, slice(start, stop), slice(start, stop), np.arange(stop - start))
            off_RL = weight_HRL.mean(0) - one.maps[number].float().mean(0)
            yield number, off_RL.abs().sum(-1) / _MAP_FACTOR
            value_HLd = _for_heads(inputs.value_TGd[start:stop], len(weight_HRL))
            yield (
                number,
                _relative((weight_HRL @ value_HLd).transpose(0, 1).flatten(1), one.contexts[number]) / _MAP_FACTOR,
            )


_DISTANCES: dict[str, Callable[[Captured, list[Shown]], Distances]] = {
    "states": _of_states,
    "attention": _of_attention,
    "ffn": _of_ffn,
}


def weights(inputs: AttentionInputs, rows: slice, tokens: slice, position_R: np.ndarray) -> Tensor:
    """The probabilities of every head for some rows of one sequence, by the definition; float32 [H, R, L]."""
    query_HRd = inputs.query_RHd[rows].transpose(0, 1).float()
    key_HLd = _for_heads(inputs.key_TGd[tokens], len(query_HRd))
    score_HRL = query_HRd @ key_HLd.transpose(1, 2) * inputs.scale
    if inputs.softcap:
        score_HRL = torch.tanh(score_HRL / inputs.softcap) * inputs.softcap
    back_RL = position_R[:, None] - np.arange(key_HLd.shape[1])[None, :]
    seen_RL = (back_RL >= 0) & (back_RL < (inputs.window or back_RL.shape[1] + 1))
    return score_HRL.masked_fill(torch.from_numpy(~seen_RL).to(score_HRL.device), -torch.inf).softmax(-1)


def _for_heads(x_LGd: Tensor, heads: int) -> Tensor:
    """Key heads, repeated for the query heads that share them; float32 [H, L, d]."""
    return x_LGd.transpose(0, 1).float().repeat_interleave(heads // x_LGd.shape[1], dim=0)
