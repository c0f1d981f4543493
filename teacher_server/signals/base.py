"""What a reduction is: how one kind of signal is made of states and logits on the model's device.

In: the rows of a batch and, chunk by chunk, their logits, which are computed once for all signals; out: tensors by the names that the
signal's class declares (teacher_wire/score/signals). A kind is one class, entered in `reduce.REDUCTIONS`.

Axes: R rows at hand, C rows of a chunk, M named ids, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Generic, TypeVar

import numpy as np
from torch import Tensor

from teacher_server.signals import output
from teacher_server.signals.captured import Captured, Wish
from teacher_server.signals.features.basis import Projection
from teacher_server.signals.transfer import to_device
from teacher_wire.core.signals import Signal


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows whose states are at hand.

    Attributes:
        hidden_RD: states after the final norm.
        labels_R: int64 on the device, the token that each row describes.
        extra_RM: int64 on the device, ids whose logits are wanted beside the likeliest, or None.
        sequence_R: on the host, the number of each row's sequence, rising; None if all are of one.
        kept_R: bool on the host, rows to answer; None keeps all. The others are there so that a row's bits do not depend on which
            others are wanted: they are computed where they share a chunk with one of these.
        checked_R: bool on the host, rows to answer whose lse and logp(label) are sent; None sends those of every row.
        captured: what the spec's signals wished from inside the pass, for these rows; None if they wished nothing.
        projections: by block, those that the model's states are projected on; empty if none were calibrated.
    """

    hidden_RD: Tensor
    labels_R: Tensor
    extra_RM: Tensor | None = None
    sequence_R: np.ndarray | None = None
    kept_R: np.ndarray | None = None
    checked_R: np.ndarray | None = None
    captured: Captured | None = None
    projections: Mapping[int, Projection] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """R."""
        return self.hidden_RD.shape[0]

    def kept(self, part_C: Tensor, rows: slice = slice(None)) -> Tensor:
        """Of a tensor with an entry for each of these rows, those to answer."""
        return part_C if self.kept_R is None else masked(part_C, self.kept_R[rows])

    def checked_alone(self) -> Rows:
        """The checked rows, as if there were no others."""
        assert self.checked_R is not None
        index_C = to_device(np.flatnonzero(self.checked_R), self.hidden_RD.device)
        hidden_CD, labels_C = self.hidden_RD.index_select(0, index_C), self.labels_R.index_select(0, index_C)
        return replace(
            self, hidden_RD=hidden_CD, labels_R=labels_C, extra_RM=None, sequence_R=None, checked_R=None, captured=None
        )


@dataclass(eq=False)
class Chunk:
    """Logits [C, V] of some rows, in the model's dtype, and what is asked about them. `rows` says which of the R."""

    rows: slice
    logits_CV: Tensor
    labels_C: Tensor
    extra_CM: Tensor | None

    @cached_property
    def lse_C(self) -> Tensor:
        """float32 [C]; whoever finds it on its way to something else may set it."""
        return output.log_sum_exp(self.logits_CV)


AnySignal = TypeVar("AnySignal", bound=Signal)


class Reduction(Generic[AnySignal]):
    """One signal of one answer, from the first chunk to the last; made anew for every answer."""

    needs_logits: ClassVar[bool] = True  # else `chunk` may not be called at all
    captures: ClassVar[str] = ""  # the field of `Wish` that it needs: offered where the backend can capture that

    @classmethod
    def wish(cls, signal: AnySignal) -> Wish:
        """What this signal is made of from inside the pass."""
        return Wish()

    def __init__(self, signal: AnySignal, rows: Rows) -> None:
        self.signal = signal
        self.rows = rows

    def seen(self, states_RD: Tensor) -> Tensor:
        """The states of which logits are made: those that the student will have, where this signal changes them."""
        return states_RD

    def chunk(self, chunk: Chunk) -> dict[str, Tensor]:
        """Tensors with an entry for each row of the chunk."""
        return {}

    def rest(self) -> dict[str, Tensor]:
        """Tensors that are whole only at the end, with the entries that are answered (see `Rows.kept`)."""
        return {}


def masked(part_C: Tensor, kept_C: np.ndarray) -> Tensor:
    """The entries where `kept_C` holds."""
    return part_C if kept_C.all() else part_C.index_select(0, to_device(np.flatnonzero(kept_C), part_C.device))
