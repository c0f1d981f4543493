"""The kinds of signals, one class per kind; the visible dict is the registry."""

from __future__ import annotations

from typing import Any

from teacher_wire.core.signals import Check, Signal, SignalSpec
from teacher_wire.score.signals.attention import Attention
from teacher_wire.score.signals.ffn import Ffn
from teacher_wire.score.signals.full import Full
from teacher_wire.score.signals.given import Given
from teacher_wire.score.signals.hidden import Hidden
from teacher_wire.score.signals.layer_states import LayerStates
from teacher_wire.score.signals.relation import Relation
from teacher_wire.score.signals.top_k import TopK

SIGNALS: dict[str, type[Signal]] = {
    "top_k": TopK,
    "hidden": Hidden,
    "full": Full,
    "layers": LayerStates,
    "attention": Attention,
    "relation": Relation,
    "ffn": Ffn,
    "given": Given,
}


def spec_of(kind: str, vocab_rows: int, check: Check = "all", **settings: Any) -> SignalSpec:
    """A request for one signal.

    Args:
        kind: one of SIGNALS.
        vocab_rows: V.
        check: of which rows lse and logp(label) are sent.
        settings: the fields of that kind's class.
    """
    return SignalSpec(vocab_rows, (SIGNALS[kind](**settings),), check)


__all__ = ["SIGNALS", "Attention", "Ffn", "Full", "Given", "Hidden", "LayerStates", "Relation", "TopK", "spec_of"]
