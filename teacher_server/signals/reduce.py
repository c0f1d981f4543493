"""States to signals, in chunks of rows: the head once, and what each signal of a spec makes of its logits.

In: states after the final norm [R, D] and the tokens they describe; out: tensors on the same device by name.
The logits of one chunk are all of [rows, vocabulary] that ever exists; where no signal needs them, only those of the rows to be checked are
made. Axes: R rows, N rows kept of them, C rows of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from teacher_server.signals import output
from teacher_server.signals.base import Chunk, Reduction, Rows, masked
from teacher_server.signals.captured import Wish, union
from teacher_server.signals.features.attention import AttentionReduction
from teacher_server.signals.features.ffn import FfnReduction
from teacher_server.signals.features.layer_states import LayerStatesReduction
from teacher_server.signals.features.relation import RelationReduction
from teacher_server.signals.full import FullReduction
from teacher_server.signals.given import GivenReduction
from teacher_server.signals.hidden import HiddenReduction
from teacher_server.signals.top_k import TopKReduction
from teacher_server.signals.transfer import HostRows
from teacher_wire.core.axes import Axis, axis_of
from teacher_wire.core.signals import SignalSpec
from teacher_wire.score.signals import SIGNALS

# One class per kind of signal.
REDUCTIONS: dict[str, type[Reduction[Any]]] = {
    "top_k": TopKReduction,
    "hidden": HiddenReduction,
    "full": FullReduction,
    "layers": LayerStatesReduction,
    "attention": AttentionReduction,
    "relation": RelationReduction,
    "ffn": FfnReduction,
    "given": GivenReduction,
}


def offered(*, serves_head: bool, captures: Collection[str] = ()) -> tuple[str, ...]:
    """The kinds that a backend gives whose states come through here; `captures` names the fields of `Wish` that it grants."""
    given = {"", *captures}
    return tuple(
        kind
        for kind, reduction in REDUCTIONS.items()
        if reduction.captures in given and (serves_head or not SIGNALS[kind].needs_head)
    )


def wish_of(spec: SignalSpec) -> Wish:
    """What the signals of a spec need from inside the pass."""
    return union(REDUCTIONS[signal.kind].wish(signal) for signal in spec.signals)


# Students ask for 151,665 of Qwen2.5's 152,064 ids; rows of so many would be multiplied by kernels of an older generation, at a fifth of the speed on an H200.
ALIGNED = 64


@dataclass(frozen=True)
class OutputHead:
    """The output projection with what an architecture does to logits afterwards (docs/concepts/method.md 3.1)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    logit_scale: float
    final_softcap: float

    def logits(self, hidden_CD: Tensor, vocab_rows: int) -> Tensor:
        """[C, V] in the model's dtype; some more are multiplied where V is not aligned, so that its rows may begin apart."""
        rows = min(-(-vocab_rows // ALIGNED) * ALIGNED, len(self.weight_VD))
        bias = None if self.bias_V is None else self.bias_V[:rows]
        logits_CV = nn.functional.linear(hidden_CD, self.weight_VD[:rows], bias)
        if self.logit_scale != 1.0:
            logits_CV = logits_CV * self.logit_scale
        if self.final_softcap:
            logits_CV = torch.tanh(logits_CV / self.final_softcap) * self.final_softcap
        return logits_CV[:, :vocab_rows]


def reduce(
    head: OutputHead, rows: Rows, spec: SignalSpec, chunk_bytes: int, into: HostRows | None = None
) -> dict[str, Tensor]:
    """The signals of rows: gathered on the device, or handed to `into` chunk by chunk (then nothing is returned).

    Args:
        head: of the model.
        rows: states, and what is asked about them.
        spec: what is asked.
        chunk_bytes: bound on the logits held at a time.
        into: takes the rows of `full` and `top_k` answers to the host while further chunks are computed, so that no more
            of them is held than it says.
    """
    reductions = [REDUCTIONS[signal.kind](signal, rows) for signal in spec.signals]
    states_RD = rows.hidden_RD
    for reduction in reductions:
        states_RD = reduction.seen(states_RD)
    rows = replace(rows, hidden_RD=states_RD)
    of_logits = [reduction for reduction in reductions if reduction.needs_logits]
    gathered = _Gathered(rows)
    for chunk in _chunks(head, rows, spec, chunk_bytes, checked_only=not of_logits):
        parts = {name: part for reduction in of_logits for name, part in reduction.chunk(chunk).items()}
        parts = {name: rows.kept(part, chunk.rows) for name, part in parts.items()}
        (into or gathered).add(parts | _evidence(chunk, rows, spec, has_others=bool(of_logits)))
    whole = {name: part for reduction in reductions for name, part in reduction.rest().items()}
    if into is not None:
        into.add(whole)
        return {}
    return gathered.tensors | whole


def _chunks(head: OutputHead, rows: Rows, spec: SignalSpec, chunk_bytes: int, *, checked_only: bool) -> Iterator[Chunk]:
    """The logits that are needed; `checked_only` if no signal needs any, so that they serve the check alone."""
    needed_R = rows.kept_R
    if checked_only and spec.check == "sampled":
        needed_R = rows.checked_R
        if rows.kept_R is None:  # no row's bits need to be those that it has among all others
            rows, needed_R = rows.checked_alone(), None
    row_bytes = spec.vocab_rows * rows.hidden_RD.element_size()
    for part in _slices(rows.count, row_bytes, chunk_bytes):
        if needed_R is not None and not needed_R[part].any():
            continue
        extra_CM = None if rows.extra_RM is None else rows.extra_RM[part]
        yield Chunk(part, head.logits(rows.hidden_RD[part], spec.vocab_rows), rows.labels_R[part], extra_CM)


def _evidence(chunk: Chunk, rows: Rows, spec: SignalSpec, *, has_others: bool) -> dict[str, Tensor]:
    """lse and logp(label) of the chunk's rows that are to be checked."""
    lse_C = chunk.lse_C
    label_C = output.label_logp(chunk.logits_CV, lse_C, chunk.labels_C)
    if spec.check == "all":
        return {"lse_N": rows.kept(lse_C, chunk.rows), "label_logp_N": rows.kept(label_C, chunk.rows)}
    assert rows.checked_R is not None, "which rows are checked is the request's to say"
    if rows.kept_R is not None or has_others:
        checked_C = rows.checked_R[chunk.rows]
        lse_C, label_C = masked(lse_C, checked_C), masked(label_C, checked_C)
    return {"lse_C": lse_C, "label_logp_C": label_C}


class _Gathered:
    """Entries of chunks in their places among all, on the device."""

    def __init__(self, rows: Rows) -> None:
        kept = rows.count if rows.kept_R is None else int(rows.kept_R.sum())
        checked = kept if rows.checked_R is None else int(rows.checked_R.sum())
        self._totals = {Axis.ROW: kept, Axis.CHECKED: checked}
        self._filled: Counter[str] = Counter()
        self.tensors: dict[str, Tensor] = {}

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            if name not in self.tensors:
                self.tensors[name] = part.new_empty((self._totals[axis_of(name)], *part.shape[1:]))
            start = self._filled[name]
            self._filled[name] += len(part)
            self.tensors[name][start : start + len(part)] = part


def _slices(rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of rows under the bound; large ones of whole thousands, as matrix units like them."""
    step = max(1, chunk_bytes // row_bytes)
    step = step // 1024 * 1024 if step >= 1024 else step
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
