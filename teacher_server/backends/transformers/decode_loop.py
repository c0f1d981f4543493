"""Writing with any causal model that keeps keys and values: running, left-padded batches, a token of each row a step.

In: sequences that join and leave; out: those that end. Each draws from a stream of its own, so that what it writes depends on
its prompt, seed and number alone, up to the rounding of a batched product. Sequences of one `bucket` (lengths within 2x) share a
batch and its cache, so that padding at most doubles what `sequence_queue.Layout` counts; each bucket costs a forward pass a step.
Axes: b rows of a batch, L slots of its cache, V ids that may be written, D width, n tokens of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor as Torch
from torch.nn.functional import pad
from transformers import DynamicCache

from teacher_server.backends.grammar import Follower, Grammars, unpack
from teacher_server.decoding.sequence_queue import Sequence
from teacher_wire.core.errors import CapabilityError, RequestError, TeacherWireError
from teacher_wire.generate.messages import Sample, SamplingSpec


@dataclass(eq=False)
class _Row:
    """A sequence that runs."""

    sequence: Sequence
    stop_ids: frozenset[int]
    follower: Follower | None
    uniform: np.random.Generator
    token_ids: list[int] = field(default_factory=list)
    token_logp: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache: all but the newest."""
        return len(self.sequence.prompt_ids) + max(0, len(self.token_ids) - 1)


@dataclass(eq=False)
class _Batch:
    """The rows of one bucket and their cache, [rows, heads, L, channels] in every layer."""

    rows: list[_Row] = field(default_factory=list)
    cache: DynamicCache = field(default_factory=DynamicCache)

    @property
    def slots(self) -> int:
        return int(self.cache.get_seq_length()) if self.rows else 0

    def join(self, group: list[_Row], joined: DynamicCache) -> None:
        """Puts rows and their cache under the running ones, both padded on the left to the longer."""
        if not self.rows:
            self.rows, self.cache = list(group), joined
            return
        slots = max(self.slots, int(joined.get_seq_length()))
        for mine, theirs in zip(self.cache.layers, joined.layers, strict=True):
            for name in ("keys", "values"):
                parts = [getattr(layer, name) for layer in (mine, theirs)]
                parts = [pad(part, (0, 0, slots - part.shape[-2], 0)) for part in parts]
                setattr(mine, name, torch.cat(parts))
        self.rows += group

    def keep(self, kept: list[int]) -> None:
        """Lets all other rows go, and the slots that only they needed."""
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self.cache = DynamicCache()
            return
        needed = max(row.length for row in self.rows)
        for layer in self.cache.layers:
            index_b = torch.tensor(kept, device=layer.keys.device)
            layer.keys, layer.values = (part[index_b, :, -needed:] for part in (layer.keys, layer.values))


class ModelStepper:
    """See `generation.Stepper`; calls of `step` and `reset` come from one thread.

    Args:
        body: the decoder, ids to states after the final norm.
        head: states [b, D] to logits [b, V] in the model's dtype.
        device: of both.
        vocab_rows: V.
        end_ids: the model's own ends of text.
        grammars: for JSON schemas; None if there are none.
        prefill_tokens: padded tokens of one forward pass over prompts.
        logit_bytes: bound on float32 logits held at a time while drawing.
    """

    def __init__(
        self,
        body: Any,
        head: Callable[[Torch], Torch],
        device: torch.device,
        *,
        vocab_rows: int,
        end_ids: frozenset[int],
        grammars: Grammars | None,
        prefill_tokens: int = 16_384,
        logit_bytes: int = 64 << 20,
    ) -> None:
        self._body = body
        self._head = head
        self._device = device
        self._vocab_rows = vocab_rows
        self._end_ids = end_ids
        self._grammars = grammars
        self._prefill_tokens = prefill_tokens
        self._chunk_rows = max(1, logit_bytes // (16 * vocab_rows))
        self._batches: dict[int, _Batch] = {}  # by bucket

    @property
    def rows(self) -> int:
        """Sequences that are held."""
        return sum(len(batch.rows) for batch in self._batches.values())

    @property
    def slots(self) -> int:
        """Tokens of KV cache that are allocated, padding included."""
        return sum(len(batch.rows) * batch.slots for batch in self._batches.values())

    def prepare(self, spec: SamplingSpec) -> None:
        if spec.json_schema:
            if self._grammars is None:
                raise CapabilityError("no JSON schemas without xgrammar", field="json_schema")
            self._grammars.compile(spec.json_schema)

    def logp(self, state_bD: Torch) -> Torch:
        """float32 [b, V], at temperature 1."""
        return self._head(state_bD).float().log_softmax(-1)

    @property
    def tolerance(self) -> float:
        """Nats by which two computations of a log-probability may differ in the model's dtype."""
        return 1e-3 if next(self._body.parameters()).dtype == torch.float32 else 0.3

    def reset(self) -> None:
        self._batches = {}

    @torch.inference_mode()
    def step(self, joining: list[Sequence], leaving: list[int]) -> list[tuple[int, Sample | TeacherWireError]]:
        gone = set(leaving)
        for batch in self._batches.values():
            batch.keep([i for i, row in enumerate(batch.rows) if row.sequence.number not in gone])
        outcomes: list[tuple[int, Sample | TeacherWireError]] = []
        begun: dict[int, list[_Row]] = {}
        for sequence in joining:
            if sequence.number in gone:
                continue
            try:
                begun.setdefault(sequence.bucket, []).append(self._begin(sequence))
            except TeacherWireError as error:
                outcomes.append((sequence.number, error))
        for bucket in {**self._batches, **begun}:
            batch = self._batches.setdefault(bucket, _Batch())
            outcomes += self._step_batch(batch, begun.get(bucket, []))
        self._batches = {bucket: batch for bucket, batch in self._batches.items() if batch.rows}
        return outcomes

    def _step_batch(self, batch: _Batch, begun: list[_Row]) -> list[tuple[int, Sample | TeacherWireError]]:
        states = [self._decode(batch)] if batch.rows else []
        states += self._prefill(batch, begun)
        if not batch.rows:
            return []
        ended = self._draw(batch.rows, torch.cat(states))
        outcomes = [(batch.rows[i].sequence.number, outcome) for i, outcome in ended.items()]
        batch.keep([i for i in range(len(batch.rows)) if i not in ended])
        return outcomes

    def _begin(self, sequence: Sequence) -> _Row:
        spec = sequence.spec
        stop_ids = frozenset(spec.stop_ids) | (frozenset() if spec.ignore_eos else self._end_ids)
        follower = self._grammars.follow(spec.json_schema, stop_ids) if spec.json_schema and self._grammars else None
        return _Row(sequence, stop_ids, follower, _stream(spec.seed, sequence.index, sequence.prompt_ids))

    # ---------------------------------------------------------------- forward

    def _decode(self, batch: _Batch) -> Torch:
        """States [b, D] behind the newest token of each row."""
        lengths_b = torch.tensor([row.length for row in batch.rows])
        slots = batch.slots + 1
        ids_b1 = torch.tensor([[row.token_ids[-1]] for row in batch.rows])
        mask_bL = torch.arange(slots)[None, :] >= slots - 1 - lengths_b[:, None]
        return self._forward(ids_b1, mask_bL, lengths_b[:, None], batch.cache)[:, -1]

    def _prefill(self, batch: _Batch, begun: list[_Row]) -> list[Torch]:
        """States [b, D] behind each prompt, whose rows and caches are added to the batch; equal prompts run once."""
        states = []
        begun = sorted(begun, key=lambda row: (len(row.sequence.prompt_ids), row.sequence.prompt_ids.tobytes()))
        while begun:
            group: list[_Row] = []
            unique: dict[bytes, int] = {}
            for row in begun:
                key = row.sequence.prompt_ids.tobytes()
                if key not in unique and unique and (len(unique) + 1) * len(key) // 4 > self._prefill_tokens:
                    break
                unique.setdefault(key, len(unique))
                group.append(row)
            begun = begun[len(group) :]
            states.append(self._prefill_group(batch, group, unique))
        return states

    def _prefill_group(self, batch: _Batch, group: list[_Row], unique: dict[bytes, int]) -> Torch:
        prompts = [torch.from_numpy(np.frombuffer(key, np.int32).astype(np.int64)) for key in unique]
        longest = max(map(len, prompts))
        ids_uL = torch.stack([pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
        mask_uL = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts])
        places_uL = (mask_uL.long().cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache()
        state_uD = self._forward(ids_uL, mask_uL, places_uL, cache)[:, -1]
        order_b = torch.tensor([unique[row.sequence.prompt_ids.tobytes()] for row in group], device=self._device)
        cache.batch_select_indices(order_b)
        batch.join(group, cache)
        return state_uD[order_b]

    def _forward(self, ids_bL: Torch, mask_bL: Torch, places_bL: Torch, cache: DynamicCache) -> Torch:
        """States [b, L, D]."""
        return self._body(
            input_ids=ids_bL.to(self._device),
            attention_mask=mask_bL.long().to(self._device),
            position_ids=places_bL.to(self._device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    # ---------------------------------------------------------------- drawing

    def _draw(self, all_rows: list[_Row], state_bD: Torch) -> dict[int, Sample | TeacherWireError]:
        """One token of every row; the rows that end with it, by place in the batch."""
        ended: dict[int, Sample | TeacherWireError] = {}
        for start in range(0, len(all_rows), self._chunk_rows):
            rows = all_rows[start : start + self._chunk_rows]
            logits_cV = self._head(state_bD[start : start + self._chunk_rows]).float()
            logp_cV = logits_cV.log_softmax(-1)
            allowed_cV = self._allowed(rows)
            if allowed_cV is not None:
                logits_cV = logits_cV.masked_fill(~allowed_cV, -torch.inf)
            ids_c = choose(logits_cV, [row.sequence.spec for row in rows], [row.uniform.random() for row in rows])
            logp_c = logp_cV.gather(-1, ids_c[:, None])[:, 0].tolist()
            stuck_c = (logits_cV.amax(-1) == -torch.inf).tolist()
            for i, (row, token_id) in enumerate(zip(rows, ids_c.tolist(), strict=True)):
                if stuck_c[i]:
                    ended[start + i] = RequestError(
                        "no token of this teacher's vocabulary goes on under the schema", field="json_schema"
                    )
                    continue
                outcome = _go_on(row, token_id, logp_c[i])
                if outcome is not None:
                    ended[start + i] = outcome
        return ended

    def _allowed(self, rows: list[_Row]) -> Torch | None:
        if all(row.follower is None for row in rows):
            return None
        assert self._grammars is not None
        bits_cW = torch.full((len(rows), -(-self._vocab_rows // 32)), -1, dtype=torch.int32)
        for i, row in enumerate(rows):
            if row.follower is not None:
                row.follower.fill(bits_cW, i)
        free_c1 = torch.tensor([[row.follower is None] for row in rows])
        clean_cV = (free_c1 | self._grammars.clean_V).to(self._device)
        return unpack(bits_cW.to(self._device), self._vocab_rows) & clean_cV


def _go_on(row: _Row, token_id: int, logp: float) -> Sample | None:
    """Adds a token to a row; the sample if it ends with it."""
    row.token_ids.append(token_id)
    row.token_logp.append(min(logp, 0.0))
    complete = row.follower.accept(token_id) if row.follower is not None else False
    stopped = complete or token_id in row.stop_ids
    if not stopped and len(row.token_ids) < row.sequence.spec.max_new_tokens:
        return None
    ids_n, logp_n = np.array(row.token_ids, np.int32), np.array(row.token_logp, np.float32)
    return Sample(row.sequence.prompt, row.sequence.index, ids_n, logp_n, "stop" if stopped else "length")


def _stream(seed: int, index: int, prompt_ids: np.ndarray) -> np.random.Generator:
    """The random stream of one sample: counter-based, a function of these three alone."""
    digest = hashlib.sha256(b"%d,%d," % (seed, index) + prompt_ids.astype("<i4").tobytes()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def choose(logits_bV: Torch, specs: list[SamplingSpec], uniform_b: list[float]) -> Torch:
    """int64 [b]: the id each row draws with its number from [0, 1), by inverse distribution function.

    Args:
        logits_bV: float32, -inf where nothing may be drawn.
        specs: temperature and top_p of each row.
        uniform_b: one number a row.
    """
    temperature_b = torch.tensor([spec.temperature or 1.0 for spec in specs], device=logits_bV.device)
    p_bV = (logits_bV / temperature_b[:, None]).softmax(-1).double()
    found_b = logits_bV.argmax(-1)
    u_b1 = torch.tensor(uniform_b, dtype=torch.float64, device=logits_bV.device)[:, None]
    plain = [i for i, spec in enumerate(specs) if spec.temperature and spec.top_p == 1]
    cut = [i for i, spec in enumerate(specs) if spec.temperature and spec.top_p < 1]
    if plain:
        found_b[plain] = _inverse(p_bV[plain], u_b1[plain])
    if cut:
        sorted_cV, order_cV = p_bV[cut].sort(stable=True, dim=-1, descending=True)
        top_p_c1 = torch.tensor([specs[i].top_p for i in cut], dtype=torch.float64, device=logits_bV.device)[:, None]
        kept_cV = sorted_cV * (sorted_cV.cumsum(-1) - sorted_cV < top_p_c1)
        found_b[cut] = order_cV.gather(-1, _inverse(kept_cV, u_b1[cut])[:, None])[:, 0]
    return found_b


def _inverse(p_bV: Torch, u_b1: Torch) -> Torch:
    """The first id whose cumulative weight is above u times the whole; always one of weight above 0."""
    cumulative_bV = p_bV.cumsum(-1)
    index_b1 = torch.searchsorted(cumulative_bV, u_b1 * cumulative_bV[:, -1:], right=True)
    last_b1 = p_bV.shape[-1] - 1 - (p_bV > 0).long().flip(-1).argmax(-1, keepdim=True)
    return torch.minimum(index_b1, last_b1)[:, 0]
