"""Which signal of a teacher is asked for, and the answer.

Axes: N wanted rows, K kept ids, V vocabulary rows, D hidden width, G blocks and O outlier channels of a compressed state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from teacher_wire.core.errors import LabelError, RequestError
from teacher_wire.core.tensor import DTYPES, Tensor, token_id_dtype

Transport = Literal["top_k", "hidden", "full"]
TRANSPORTS: tuple[Transport, ...] = ("top_k", "hidden", "full")
Compression = Literal["none", "int8"]

# States as int8: channels of one scale, and the channels of largest magnitude that are sent as they are (algorithms.md 3.4).
BLOCK_CHANNELS = 128
OUTLIER_CHANNELS = 16


@dataclass(frozen=True)
class SignalSpec:
    """Which signal of the teacher, over which part of its vocabulary.

    Attributes:
        transport: `top_k` (k logits and the exact tail mass), `hidden` (state after the final norm), `full`.
        vocab_rows: V; the distribution is over ids 0..V-1 (algorithms.md 1.6).
        k: entries kept by `top_k`; 0 for the others.
        extra: ids a row that the student names (`TokenBatch.extra_ids_NM`), kept beside the k likeliest others.
        compression: of `hidden` states.
    """

    transport: Transport
    vocab_rows: int
    k: int = 0
    extra: int = 0
    compression: Compression = "none"

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise RequestError("unknown transport", field="transport", value=self.transport, limit="|".join(TRANSPORTS))
        if self.vocab_rows < 2:
            raise RequestError("vocabulary too small", field="vocab_rows", value=self.vocab_rows, limit=">= 2")
        if self.transport == "top_k" and not (self.k >= 1 and self.extra >= 0 and self.kept <= self.vocab_rows):
            limit = f"1..{self.vocab_rows - self.extra}"
            raise RequestError("k must lie within the vocabulary", field="k", value=self.k, limit=limit)
        if self.transport != "top_k" and (self.k or self.extra):
            raise RequestError(f"{self.transport} takes no k", field="k", value=self.k or self.extra, limit=0)
        if self.compression not in ("none", "int8"):
            raise RequestError("unknown compression", field="compression", value=self.compression, limit="none|int8")
        if self.compression != "none" and self.transport != "hidden":
            raise RequestError(
                f"{self.transport} is not compressed", field="compression", value=self.compression, limit="none"
            )

    @property
    def kept(self) -> int:
        """K, ids a row of a `top_k` answer."""
        return self.k + self.extra

    def row_bytes(self, hidden_size: int, value_bytes: int) -> int:
        """Payload bytes of one row on the wire."""
        ids = DTYPES[token_id_dtype(self.vocab_rows)][1]
        packed = hidden_size + 2 * blocks_of(hidden_size) + 4 * outliers_of(hidden_size)
        widths = {
            "top_k": self.kept * (ids + value_bytes) + 4,
            "hidden": packed if self.compression == "int8" else hidden_size * value_bytes,
            "full": self.vocab_rows * value_bytes,
        }
        return 8 + widths[self.transport]


def blocks_of(hidden_size: int) -> int:
    """Scales a row of a compressed state."""
    return -(-hidden_size // BLOCK_CHANNELS)


def outliers_of(hidden_size: int) -> int:
    """Channels a row of a compressed state that are sent as they are."""
    return min(OUTLIER_CHANNELS, hidden_size)


@dataclass(frozen=True)
class Timing:
    """Where the server's time went, in microseconds; `batch_tokens` shared one forward pass."""

    queue_us: int = 0
    forward_us: int = 0
    reduce_us: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True)
class TeacherSignals:
    """The teacher's answer: N rows, in packed order of the wanted rows.

    Attributes:
        lse_N: float32, log-sum-exp of the logits at temperature 1 over the first V ids.
        label_logp_N: float32, log-probability of the token the row describes.
        topk_ids_NK, topk_logits_NK, tail_logp_N: `top_k`; ids by falling logit, then rising id.
        hidden_ND: `hidden`, after the final norm.
        logits_NV: `full`.
        state_int8_ND, state_scales_NG, outlier_ids_NO, outlier_values_NO: `hidden` compressed (proto: Compression).
        fingerprint: of the teacher that computed them.
    """

    lse_N: Tensor
    label_logp_N: Tensor
    topk_ids_NK: Tensor | None = None
    topk_logits_NK: Tensor | None = None
    tail_logp_N: Tensor | None = None
    hidden_ND: Tensor | None = None
    logits_NV: Tensor | None = None
    state_int8_ND: Tensor | None = None
    state_scales_NG: Tensor | None = None
    outlier_ids_NO: Tensor | None = None
    outlier_values_NO: Tensor | None = None
    fingerprint: str = ""
    timing: Timing = field(default_factory=Timing)

    @property
    def rows(self) -> int:
        return self.lse_N.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The present tensors by attribute name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def payload_bytes(self) -> int:
        return sum(t.payload_bytes for t in self.tensors().values())

    @classmethod
    def of(cls, tensors: dict[str, Tensor], fingerprint: str = "", timing: Timing | None = None) -> TeacherSignals:
        """An answer from its tensors by attribute name."""
        return cls(**tensors, fingerprint=fingerprint, timing=timing or Timing())

    def slice(self, start: int, stop: int) -> TeacherSignals:
        """Rows start..stop, without a copy."""
        parts = {name: tensor.rows(start, stop) for name, tensor in self.tensors().items()}
        return TeacherSignals.of(parts, self.fingerprint, self.timing)

    @classmethod
    def join(cls, parts: Sequence[TeacherSignals]) -> TeacherSignals:
        """One answer from consecutive slices of it.

        Raises:
            LabelError: the parts do not hold the same tensors.
        """
        names = [set(part.tensors()) for part in parts]
        if not parts or any(n != names[0] for n in names):
            raise LabelError("chunks of one reply hold different tensors", field="chunk")
        if len(parts) == 1:
            return parts[0]
        joined = {}
        for name, first in parts[0].tensors().items():
            arrays = [part.tensors()[name] for part in parts]
            if any(a.dtype != first.dtype or a.shape[1:] != first.shape[1:] for a in arrays):
                raise LabelError("chunks of one reply differ in dtype or width", field=name)
            joined[name] = Tensor(first.dtype, np.concatenate([a.array for a in arrays]))
        return cls.of(joined, parts[-1].fingerprint, parts[-1].timing)
