"""Ways to run a model's body: fused and packed, transformers' own layers packed, or padded; and which of them it can take.

In: sequences of token ids and the rows wanted of each; out: their states after the final norm [N, D]. A faster way is
taken only where a probe at loading finds the states of the plain one; otherwise the next is tried, with a line in the log.
Axes: B sequences, L padded length, T packed tokens, N wanted rows, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from teacher_server.backends.logits import body_of
from teacher_server.backends.transformers import attention
from teacher_server.backends.transformers.attention import NotPackableError, Packing
from teacher_server.backends.transformers.capture import hooks
from teacher_server.backends.transformers.capture.taps import Taps
from teacher_server.backends.transformers.fused import FusedBody, unsuited
from teacher_server.backends.transformers.packing import pack
from teacher_server.config.backends import TransformersBackend as Config
from teacher_server.signals.captured import Captured, Wish, joined
from teacher_server.signals.transfer import to_device

log = logging.getLogger(__name__)

Sequences = Sequence[np.ndarray]


class Run(Protocol):
    """The layers over packed tokens."""

    def __call__(self, ids_T: Tensor, positions_T: Tensor, packing: Packing, taps: Taps | None = None) -> Tensor:
        """States after the final norm [T, D]; `taps` are shown what they wish of the blocks."""


_PROBE_LENGTHS = (5, 48, 2, 31)
_PROBE_SHARED = 24  # tokens that two of the probe's sequences have in common
# Largest relative distance of a row of states from the plain way's, by dtype: rounding through all layers, not more.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
# Rotary embeddings that depend on the longest sequence of a pass: company would change a sequence's labels.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class Body(Protocol):
    """A way to compute states.

    Attributes:
        name: for the log.
        computed_tokens: tokens that went through the layers since loading, padding not counted.
    """

    name: str
    computed_tokens: int

    def states(self, sequences: Sequences, rows: Sequences) -> Tensor:
        """[N, D]: the states of `rows[b]` of each sequence b, in that order."""

    def run(self, sequences: Sequences, rows: Sequences, wish: Wish) -> tuple[Tensor, Captured]:
        """The same states, and what is wished of the pass that makes them (nothing is done for an empty wish).

        Raises:
            NotCapturableError: this model does not show what is wished; see `capture.probe`.
        """


def choose(model: Any, config: Config) -> Body:
    """The fastest way whose states agree with the plain one's."""
    body = body_of(model)
    device = next(model.parameters()).device
    limit = 65_536 if device.type == "cuda" else 16_384
    rope = (getattr(body.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _LENGTH_DEPENDENT:
        limit = 1  # each sequence by itself
    padded = PaddedBody(body, device, limit)
    if config.packing == "off":
        return padded
    sequences = _probe_sequences(body.config.vocab_size)
    plain = [padded.states([ids], [np.arange(len(ids))]) for ids in sequences]
    padded.computed_tokens = 0
    for name, build in _packed_ways(body, config, device):
        try:
            run = build()
            found = PackedBody(name, run, device, limit, 0)
            distance = _distance(found, sequences, plain)
            if distance > _TOLERANCE[config.dtype]:
                raise NotPackableError(f"its states differ from the plain ones by {distance:.2g} of their size")
            shares = config.prefix_min_tokens
            shared = PackedBody(name, run, device, limit, min(shares, _PROBE_SHARED))
            if shares and _distance(shared, sequences, plain) > _TOLERANCE[config.dtype]:
                log.info("model %s: prefixes are not shared, the states would differ", config.model)
                shares = 0
            return PackedBody(name, run, device, limit, shares)
        except (NotPackableError, TypeError, RuntimeError, NotImplementedError) as error:
            log.info("model %s is not run %s: %s", config.model, name, " ".join(str(error).split())[:300])
    return padded


def _packed_ways(body: Any, config: Config, device: torch.device) -> Iterator[tuple[str, Callable[[], Run]]]:
    wanted = config.layers == "fused" or (config.layers == "auto" and device.type == "cuda")
    reason = unsuited(body) if wanted else ""
    if wanted and not reason:
        yield "fused", lambda: FusedBody(body)
    elif wanted:
        log.info("model %s is not run fused: %s", config.model, reason)
    yield "packed", lambda: _transformers_packed(body)


def _transformers_packed(body: Any) -> Run:
    """transformers' own layers around our attention."""
    kinds = set(getattr(body.config, "layer_types", None) or ())
    if kinds - {"full_attention"} or getattr(body.config, "attention_chunk_size", None):
        raise NotPackableError(f"it has layers of type {', '.join(sorted(kinds)) or 'chunked attention'}")
    attention.register()
    plain = body.config._attn_implementation

    def run(ids_T: Tensor, positions_T: Tensor, packing: Packing, taps: Taps | None = None) -> Tensor:
        body.config._attn_implementation = attention.NAME
        try:
            with hooks.listening(body, taps):
                found = body(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, packing=packing)
        finally:
            body.config._attn_implementation = plain
        state_TD: Tensor = found.last_hidden_state[0]
        return state_TD

    return run


def _probe_sequences(vocab: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, vocab, n, dtype=np.int32) for n in _PROBE_LENGTHS]
    sequences[3][:_PROBE_SHARED] = sequences[1][:_PROBE_SHARED]
    return sequences


def _distance(body: Body, sequences: list[np.ndarray], plain: list[Tensor]) -> float:
    """The largest relative distance of a row."""
    rows = [np.arange(len(ids)) for ids in sequences]
    found, expected = body.states(sequences, rows).double(), torch.cat(plain).double()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).max().nan_to_num(torch.inf))


class PackedBody:
    """Sequences one behind the other, shared prefixes once; see `Body`.

    Args:
        name: for the log.
        run: the layers.
        device: of the model.
        max_tokens: of one pass; a longer sequence has one of its own.
        prefix_min_tokens: see `layout.pack`.
    """

    def __init__(self, name: str, run: Run, device: torch.device, max_tokens: int, prefix_min_tokens: int) -> None:
        self.name = name
        self.computed_tokens = 0
        self._run = run
        self._device = device
        self._max_tokens = max_tokens
        self._prefix_min_tokens = prefix_min_tokens

    @property
    def fused(self) -> FusedBody | None:
        """The layers, if they are ours."""
        return self._run if isinstance(self._run, FusedBody) else None

    def states(self, sequences: Sequences, rows: Sequences) -> Tensor:
        return self.run(sequences, rows, Wish())[0]

    def run(self, sequences: Sequences, rows: Sequences, wish: Wish) -> tuple[Tensor, Captured]:
        parts = [self._pass(sequences[cut], rows[cut], wish) for cut in _cuts(sequences, self._max_tokens)]
        states = [state_ND for state_ND, _ in parts]
        captured = [part for _, part in parts if part is not None]
        return (
            torch.cat(states) if len(states) > 1 else states[0],
            joined(captured, range(len(sequences)), wish) if captured else Captured(),
        )

    def _pass(self, sequences: Sequences, rows: Sequences, wish: Wish) -> tuple[Tensor, Captured | None]:
        layout = pack(sequences, self._prefix_min_tokens)
        self.computed_tokens += layout.tokens
        ids_T, positions_T = (to_device(array, self._device) for array in (layout.ids_T, layout.positions_T))
        taps = Taps(wish, layout.rows_of, rows, self._device) if wish else None
        state_TD = self._run(ids_T, positions_T, Packing.of(layout, self._device), taps)
        wanted_N = np.concatenate([of[row] for of, row in zip(layout.rows_of, rows, strict=True)])
        state_ND = state_TD.index_select(0, to_device(wanted_N, self._device))
        return state_ND, None if taps is None else taps.captured()


def _cuts(sequences: Sequences, max_tokens: int) -> Iterator[slice]:
    """Neighbours that fit one pass together."""
    start, tokens = 0, 0
    for end, ids in enumerate(sequences):
        if end > start and tokens + len(ids) > max_tokens:
            yield slice(start, end)
            start, tokens = end, 0
        tokens += len(ids)
    yield slice(start, len(sequences))


class PaddedBody:
    """transformers' body as it is, for any architecture: sequences of similar length padded to the longest; see `Body`."""

    def __init__(self, body: Any, device: torch.device, max_tokens: int) -> None:
        self.name = "padded"
        self.computed_tokens = 0
        self._body = body
        self._device = device
        self._max_tokens = max_tokens

    def states(self, sequences: Sequences, rows: Sequences) -> Tensor:
        return self.run(sequences, rows, Wish())[0]

    def run(self, sequences: Sequences, rows: Sequences, wish: Wish) -> tuple[Tensor, Captured]:
        lengths_B = np.array([len(ids) for ids in sequences])
        self.computed_tokens += int(lengths_B.sum())
        found: dict[int, Tensor] = {}
        captured: list[Captured] = []
        numbers: list[int] = []  # of the sequences, as the passes have them
        for group in _groups(lengths_B, self._max_tokens):
            padded = int(lengths_B[group].max())
            ids_bL = np.zeros((len(group), padded), np.int32)
            for place, index in enumerate(group):
                ids_bL[place, : lengths_B[index]] = sequences[index]
            mask_bL = np.arange(padded)[None, :] < lengths_B[group][:, None]
            slots_of = [np.arange(lengths_B[index]) + place * padded for place, index in enumerate(group)]
            taps = Taps(wish, slots_of, [rows[index] for index in group], self._device) if wish else None
            with hooks.listening(self._body, taps):
                state_bLD = self._body(
                    input_ids=to_device(ids_bL, self._device).long(),
                    attention_mask=to_device(mask_bL, self._device).long(),
                    use_cache=False,
                ).last_hidden_state
            if taps is not None:
                captured.append(taps.captured())
                numbers += group.tolist()
            for place, index in enumerate(group):
                wanted = np.asarray(rows[index], np.int64)
                found[int(index)] = state_bLD[place].index_select(0, to_device(wanted, self._device))
        states_ND = torch.cat([found[b] for b in range(len(sequences))])
        return states_ND, joined(captured, numbers, wish) if captured else Captured()


def _groups(lengths: np.ndarray, max_padded_tokens: int) -> Iterator[np.ndarray]:
    """Indices of sequences to run together: neighbours in length, at most 25 % padding, under the budget.

    A pure function of the lengths, so that the same request is always cut the same way.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order):
            longest = lengths[order[start]]
            fits = longest * (end - start + 1) <= max_padded_tokens
            if fits and lengths[order[end]] >= 0.75 * longest:
                continue
        yield order[start:end]
        start = end
