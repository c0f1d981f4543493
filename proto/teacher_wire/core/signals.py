"""What is asked of a teacher, a list of signals, and the answer: named tensors.

A kind of signal is one class in `score/signals`; this module knows none of them. What an answer weighs, how it is cut into chunks, kept and
put together again follows from the fields that its signals declare.

Axes: N wanted rows, C checked rows, K kept ids, V vocabulary rows, D hidden width, F width of keys. A tensor's name ends in its axes (`axes.axis_of`).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np

from teacher_wire.core.axes import Axis, Entries, axis_of
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.errors import LabelError, RequestError
from teacher_wire.core.tensor import DTYPES, Tensor

if TYPE_CHECKING:
    from teacher_wire.core.info import TeacherInfo

Check = Literal["all", "sampled"]
CHECKS: tuple[Check, ...] = ("all", "sampled")
_UNEVEN = (
    Axis.PAIR,
    Axis.BLOCK,
    Axis.TOKEN,
)  # axes of which a row has as many entries as its place in the sequence says


@dataclass(frozen=True)
class AnswerShape:
    """What the widths of an answer depend on beside its signals.

    Attributes:
        vocab_rows: V of the request.
        hidden_size: D of the teacher.
        dtype: of the teacher's logits and states, on the wire.
        kv_width: F of the teacher.
    """

    vocab_rows: int
    hidden_size: int
    dtype: str
    kv_width: int = 0


@dataclass(frozen=True)
class Field:
    """One tensor of an answer.

    Attributes:
        name: ending in its axes, of which the first letter is that of `axis`.
        axis: what its entries are counted by.
        dtype: on the wire.
        entry: shape of one entry; () for a number.
    """

    name: str
    axis: Axis
    dtype: str
    entry: tuple[int, ...] = ()

    @property
    def entry_bytes(self) -> int:
        """Payload bytes of one entry."""
        return math.prod(self.entry) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Signal(ABC):
    """One signal of a request. A kind is a frozen dataclass; what crosses the wire are its own fields.

    A field `layers` (tuple of ints) and a field `reduction` (str) travel as such; every other field is an int or a float and
    travels among the named numbers, or a str and travels among the names (proto: Signal).
    """

    kind: ClassVar[str]
    # Whether it is good for nothing without lse and logp(label) of every row, so that a request with it cannot have a sample checked.
    needs_every_row: ClassVar[bool] = False
    # Whether it is good for nothing without the teacher's output head, so that a teacher that keeps its head does not offer it.
    needs_head: ClassVar[bool] = False

    @abstractmethod
    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        """The tensors that answer it."""

    def check(self, vocab_rows: int) -> None:  # noqa: B027 (most kinds have nothing to refuse)
        """Refuses settings that mean nothing over a vocabulary of that size.

        Raises:
            RequestError: naming the field.
        """

    def check_teacher(self, info: TeacherInfo) -> None:  # noqa: B027
        """Refuses what this teacher cannot give although it offers the kind.

        Raises:
            LimitError, CapabilityError: naming field, value and limit.
        """

    @property
    def extra_ids(self) -> int:
        """Ids per row that the student must name beside it (`TokenBatch.extra_ids_NM`)."""
        return 0

    def widened_bytes(self, shape: AnswerShape) -> int:
        """Bytes per row by which its tensors grow in memory, where ids of two and three bytes become four."""
        ids = (f for f in self.fields(shape) if f.axis is Axis.ROW and f.dtype in ("uint16", "uint24"))
        return sum(2 * math.prod(f.entry) for f in ids)

    def captured_numbers(self, shape: AnswerShape) -> int:
        """Values a token that the teacher's device holds of a sequence while it answers, beyond the answer itself, or so."""
        return 0


AnySignal = TypeVar("AnySignal", bound=Signal)


@dataclass(frozen=True)
class SignalSpec:
    """What is asked about each wanted row, over which part of the vocabulary.

    Attributes:
        vocab_rows: V; distributions are over ids 0..V-1 (docs/concepts/method.md 1.6).
        signals: at least one, of different kinds.
        check: of which rows lse and logp(label) are sent: of `all`, or of the `sampled` ones (`checked_rows`).

    Raises:
        RequestError: these settings mean nothing.
    """

    vocab_rows: int
    signals: tuple[Signal, ...]
    check: Check = "all"

    def __post_init__(self) -> None:
        if self.vocab_rows < 2:
            raise RequestError("vocabulary too small", field="vocab_rows", value=self.vocab_rows, limit=">= 2")
        if not self.signals or len(set(self.kinds)) < len(self.signals):
            raise RequestError(
                "a request asks for at least one signal, and for each kind once", field="signals", value=self.name
            )
        if self.check not in CHECKS:
            raise RequestError(
                "unknown choice of checked rows", field="check", value=self.check, limit="|".join(CHECKS)
            )
        for signal in self.signals:
            signal.check(self.vocab_rows)
            if self.check != "all" and signal.needs_every_row:
                raise RequestError(
                    f"{signal.kind} labels need lse and logp(label) of every row",
                    field="check",
                    value=self.check,
                    limit="all",
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the signals, in order."""
        return tuple(signal.kind for signal in self.signals)

    @property
    def name(self) -> str:
        """The kinds in one word, for people and for tables."""
        return "+".join(self.kinds)

    def find(self, kind: type[AnySignal]) -> AnySignal | None:
        """The signal of that class, if it is asked for."""
        return next((signal for signal in self.signals if isinstance(signal, kind)), None)

    @property
    def extra_ids(self) -> int:
        """Ids per row that the student must name."""
        return max(signal.extra_ids for signal in self.signals)

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        """Every tensor of an answer: lse and logp(label) of the rows to be checked, and those of the signals."""
        evidence = ("lse_N", "label_logp_N") if self.check == "all" else ("lse_C", "label_logp_C")
        own = (Field(name, axis_of(name), "float32") for name in evidence)
        return (*own, *(part for signal in self.signals for part in signal.fields(shape)))

    def shape_of(self, info: TeacherInfo) -> AnswerShape:
        """What the widths of that teacher's answer depend on."""
        return AnswerShape(self.vocab_rows, info.hidden_size, info.dtype, info.kv_width)

    def fields_of(self, info: TeacherInfo) -> tuple[Field, ...]:
        """The tensors of an answer of that teacher."""
        return self.fields(self.shape_of(info))

    def row_bytes(self, hidden_size: int, value_bytes: int) -> int:
        """Payload bytes of one row at most; exact unless `check` is sampled or there are entries of sequences.

        Entries of pairs, blocks and tokens are left out: how many of them a row has, its sequence says (`answer_bytes`).

        Args:
            hidden_size: D of the teacher.
            value_bytes: of one logit or state entry.
        """
        shape = AnswerShape(
            self.vocab_rows, hidden_size, "float32" if value_bytes == DTYPES["float32"][1] else "bfloat16"
        )
        return sum(part.entry_bytes for part in self.fields(shape) if part.axis not in _UNEVEN)

    def answer_bytes(self, batch: TokenBatch, shape: AnswerShape) -> int:
        """Payload bytes of the whole answer about a batch."""
        entries = Entries(batch)
        return sum(part.entry_bytes * entries.total(part.axis) for part in self.fields(shape))

    def captured_bytes(self, batch: TokenBatch, shape: AnswerShape) -> int:
        """Bytes that the teacher's device holds for signals of chosen layers while it answers the longest sequence, or so."""
        numbers = sum(signal.captured_numbers(shape) for signal in self.signals)
        return numbers * int(batch.lengths_B.max()) * DTYPES[shape.dtype][1]

    def json(self) -> str:
        """The same text for the same spec: what labels on disk are named by.

        A single signal without layers is written as before there were lists of signals, so that labels kept then are found.
        """
        if len(self.signals) == 1:
            (signal,) = self.signals
            settings = {"reduction": "none", "k": 0, "extra": 0} | asdict(signal)
            if settings.keys() == {"reduction", "k", "extra"}:
                flat = {
                    "transport": signal.kind,
                    "vocab_rows": self.vocab_rows,
                    "compression": settings.pop("reduction"),
                    **settings,
                }
                return json.dumps(flat if self.check == "all" else flat | {"check": self.check}, sort_keys=True)
        signals = [{"kind": signal.kind, **asdict(signal)} for signal in self.signals]
        return json.dumps({"vocab_rows": self.vocab_rows, "signals": signals, "check": self.check}, sort_keys=True)

    @staticmethod
    def name_in(text: str) -> str:
        """`name` of the spec whose `json` this is; ValueError, KeyError or TypeError if it is none."""
        found: dict[str, Any] = json.loads(text)
        return str(found["transport"]) if "transport" in found else "+".join(part["kind"] for part in found["signals"])


@dataclass(frozen=True)
class Timing:
    """Where the server's time went, in microseconds; `batch_tokens` shared one forward pass."""

    queue_us: int = 0
    forward_us: int = 0
    reduce_us: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True)
class TeacherSignals:
    """The teacher's answer to a request, or to some rows of one.

    Attributes:
        tensors: by name, entries in packed order; those that `SignalSpec.fields` says.
        fingerprint: of the teacher that computed them.
    """

    tensors: dict[str, Tensor]
    fingerprint: str = ""
    timing: Timing = field(default_factory=Timing)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def lse_N(self) -> Tensor:
        """float32, log-sum-exp of the logits at temperature 1 over the first V ids; KeyError if only some rows have it."""
        return self.tensors["lse_N"]

    @property
    def label_logp_N(self) -> Tensor:
        """float32, log-probability of the token that the row describes; KeyError as `lse_N`."""
        return self.tensors["label_logp_N"]

    @property
    def rows(self) -> int:
        """N, if a tensor has an entry per row; else 0."""
        return next((tensor.shape[0] for name, tensor in self.tensors.items() if axis_of(name) is Axis.ROW), 0)

    @property
    def payload_bytes(self) -> int:
        return sum(tensor.payload_bytes for tensor in self.tensors.values())

    def slice(self, entries: Entries, start: int, stop: int) -> TeacherSignals:
        """Rows start..stop of an answer about the batch of `entries`, without a copy."""
        parts = {name: tensor.rows(*entries.span(axis_of(name), start, stop)) for name, tensor in self.tensors.items()}
        return TeacherSignals(parts, self.fingerprint, self.timing)

    def cut(self, batch: TokenBatch) -> list[TeacherSignals]:
        """The part of each sequence of the batch that this is the answer about; of one without a wanted row it has no entries."""
        entries, bounds = Entries(batch), batch.row_bounds_B1.tolist()
        return [self.slice(entries, start, stop) for start, stop in pairwise(bounds)]

    def divide(self, batches: Sequence[TokenBatch]) -> list[TeacherSignals]:
        """The part of each batch, if this is the answer about all of them one behind the other."""
        parts: list[TeacherSignals] = []
        at = dict.fromkeys(Axis, 0)
        for batch in batches:
            entries = Entries(batch)
            ends = {axis: at[axis] + entries.total(axis) for axis in {axis_of(name) for name in self.tensors}}
            spans = {name: (at[axis_of(name)], ends[axis_of(name)]) for name in self.tensors}
            parts.append(
                TeacherSignals(
                    {name: self.tensors[name].rows(*span) for name, span in spans.items()},
                    self.fingerprint,
                    self.timing,
                )
            )
            at |= ends
        return parts

    def sampled(self, batch: TokenBatch) -> TeacherSignals:
        """The answer to the same question about this batch if a sample of rows is to be checked, where this one may have all of them."""
        if "lse_N" not in self:
            return self
        checked_N = checked_rows(batch)
        parts = {f"{name}_C": Tensor("float32", self[f"{name}_N"].array[checked_N]) for name in ("lse", "label_logp")}
        others = {name: tensor for name, tensor in self.tensors.items() if name not in ("lse_N", "label_logp_N")}
        return TeacherSignals(parts | others, self.fingerprint, self.timing)

    @classmethod
    def join(cls, parts: Sequence[TeacherSignals]) -> TeacherSignals:
        """One answer from consecutive slices of it.

        Raises:
            LabelError: the parts do not hold the same tensors.
        """
        names = [set(part.tensors) for part in parts]
        if not parts or any(n != names[0] for n in names):
            raise LabelError("chunks of one reply hold different tensors", field="chunk")
        if len(parts) == 1:
            return parts[0]
        joined = {}
        for name, first in parts[0].tensors.items():
            tensors = [part.tensors[name] for part in parts]
            if any(t.dtype != first.dtype or t.shape[1:] != first.shape[1:] for t in tensors):
                raise LabelError("chunks of one reply differ in dtype or width", field=name)
            joined[name] = Tensor(first.dtype, np.concatenate([t.array for t in tensors]))
        return cls(joined, parts[-1].fingerprint, parts[-1].timing)
