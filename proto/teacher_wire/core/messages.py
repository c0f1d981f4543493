"""The things that travel, as frozen dataclasses; the floor everything else stands on.

Axes: B sequences, T packed tokens, N wanted rows, K kept ids, V vocabulary rows, D hidden width.
bfloat16 arrays are held as their uint16 bit patterns, since numpy has no such type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from teacher_wire.core.errors import LabelError, RequestError, TensorError

Transport = Literal["top_k", "hidden", "full"]
TRANSPORTS: tuple[Transport, ...] = ("top_k", "hidden", "full")
Compression = Literal["none", "int8"]

# States as int8: channels of one scale, and the channels of largest magnitude that are sent as they are (algorithms.md 3.4).
BLOCK_CHANNELS = 128
OUTLIER_CHANNELS = 16

# wire dtype -> (numpy dtype in memory, bytes an element on the wire)
DTYPES: dict[str, tuple[str, int]] = {
    "uint8": ("uint8", 1),
    "uint16": ("uint16", 2),
    "uint24": ("uint32", 3),
    "int32": ("int32", 4),
    "int8": ("int8", 1),
    "float16": ("float16", 2),
    "bfloat16": ("uint16", 2),
    "float32": ("float32", 4),
}
FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Tensor:
    """An array and the type it has on the wire (`bfloat16` is held as uint16 bits)."""

    dtype: str
    array: np.ndarray

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise TensorError("unknown dtype", field="dtype", value=self.dtype, limit="|".join(DTYPES))
        if self.array.dtype != np.dtype(DTYPES[self.dtype][0]):
            raise TensorError(
                f"{self.dtype} is held as {DTYPES[self.dtype][0]}", field="array.dtype", value=self.array.dtype
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def payload_bytes(self) -> int:
        """Bytes of the data on the wire."""
        return self.array.size * DTYPES[self.dtype][1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the first axis, without a copy."""
        return Tensor(self.dtype, self.array[start:stop])

    def as_float32(self) -> np.ndarray:
        """The values as float32, same shape."""
        if self.dtype == "bfloat16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)


def float32(array: np.ndarray) -> Tensor:
    """A float32 tensor of `array`."""
    return Tensor("float32", np.ascontiguousarray(array, dtype=np.float32))


def token_id_dtype(vocab_rows: int) -> str:
    """The narrowest wire type that holds every id below `vocab_rows`."""
    return "uint16" if vocab_rows <= 1 << 16 else "uint24"


@dataclass(frozen=True)
class TokenBatch:
    """B sequences packed into T tokens, and which of their rows are wanted.

    Attributes:
        token_ids_T: int32 ids.
        cu_lengths_B1: int32, rising from 0 to T; sequence b is [cu[b], cu[b+1]).
        wanted_T: bool; row t describes token t+1, so the last token of a sequence cannot be wanted.
        extra_ids_NM: int32 ids, distinct in a row, whose logits the student wants beside the likeliest ones; or None.

    Raises:
        RequestError: the three do not fit together.
    """

    token_ids_T: np.ndarray
    cu_lengths_B1: np.ndarray
    wanted_T: np.ndarray
    extra_ids_NM: np.ndarray | None = None

    def __post_init__(self) -> None:
        ids, cu, wanted = self.token_ids_T, self.cu_lengths_B1, self.wanted_T
        for name, array, dtype in (
            ("token_ids", ids, np.int32),
            ("cu_lengths", cu, np.int32),
            ("wanted", wanted, np.bool_),
        ):
            if array.ndim != 1 or array.dtype != dtype:
                raise RequestError(
                    "wrong type", field=name, value=f"{array.dtype}{list(array.shape)}", limit=f"{np.dtype(dtype)}[n]"
                )
        if cu.size < 2 or cu[0] != 0 or cu[-1] != ids.size or np.any(np.diff(cu.astype(np.int64)) < 2):
            raise RequestError(
                "cu_lengths must rise from 0 to the number of tokens in steps of at least 2",
                field="cu_lengths", value=_short(cu), limit=f"0..{ids.size}",
            )  # fmt: skip
        if wanted.size != ids.size:
            raise RequestError("one flag a token", field="wanted", value=wanted.size, limit=ids.size)
        if np.any(wanted[cu[1:] - 1]):
            sequence = int(np.argmax(wanted[cu[1:] - 1]))
            raise RequestError("the last token of a sequence has no row", field="wanted", value=f"sequence {sequence}")
        if not wanted.any():
            raise RequestError("no row is wanted", field="wanted", value=0, limit=">= 1")
        if np.any(ids < 0):
            raise RequestError("negative token id", field="token_ids", value=int(ids.min()), limit=">= 0")
        if self.extra_ids_NM is not None:
            self._check_extra(self.extra_ids_NM)

    def _check_extra(self, extra_NM: np.ndarray) -> None:
        if extra_NM.ndim != 2 or extra_NM.dtype != np.int32 or extra_NM.shape[0] != self.rows or not extra_NM.shape[1]:
            shown = f"{extra_NM.dtype}{list(extra_NM.shape)}"
            raise RequestError("wrong type", field="extra_ids", value=shown, limit=f"int32[{self.rows}, M]")
        if np.any(extra_NM < 0) or np.any(np.diff(np.sort(extra_NM, axis=-1), axis=-1) == 0):
            raise RequestError("ids of a row must be distinct and not negative", field="extra_ids")

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[bool]] | None = None) -> TokenBatch:
        """Packs sequences of ids; by default every row that has a next token is wanted."""
        lengths = [len(s) for s in sequences]
        cu = np.zeros(len(sequences) + 1, np.int32)
        cu[1:] = np.cumsum(lengths, dtype=np.int32)
        ids = np.fromiter((i for s in sequences for i in s), np.int32, int(cu[-1]))
        if wanted is None:
            flags = np.ones(ids.size, np.bool_)
            flags[cu[1:] - 1] = False
        else:
            flags = np.fromiter((bool(w) for s in wanted for w in s), np.bool_)
        return cls(ids, cu, flags)

    @property
    def tokens(self) -> int:
        return int(self.token_ids_T.size)

    @property
    def sequences(self) -> int:
        return int(self.cu_lengths_B1.size - 1)

    @property
    def rows(self) -> int:
        """N, the number of wanted rows."""
        return int(np.count_nonzero(self.wanted_T))

    @property
    def lengths_B(self) -> np.ndarray:
        return np.diff(self.cu_lengths_B1)

    def rows_of(self) -> np.ndarray:
        """Packed positions [N] of the wanted rows."""
        return np.flatnonzero(self.wanted_T)

    def labels_N(self) -> np.ndarray:
        """int32 [N]: the token each wanted row describes."""
        return self.token_ids_T[self.rows_of() + 1]

    def sequence_of_row(self, row: int) -> int:
        """The sequence that wanted row number `row` belongs to."""
        return int(np.searchsorted(self.cu_lengths_B1, self.rows_of()[row], side="right") - 1)

    @property
    def row_bounds_B1(self) -> np.ndarray:
        """int64 [B+1]: rows [bounds[b], bounds[b+1]) of an answer are sequence b's; none if it has no wanted row."""
        before_T1 = np.zeros(self.tokens + 1, np.int64)
        np.cumsum(self.wanted_T, out=before_T1[1:])
        return before_T1[self.cu_lengths_B1]

    def select(self, sequences: Sequence[int]) -> TokenBatch:
        """These sequences alone, in the given order, with their extra ids.

        Raises:
            RequestError: a number that no sequence has, or none of them has a wanted row.
        """
        for number in sequences:
            if not 0 <= number < self.sequences:
                limit = f"0..{self.sequences - 1}"
                raise RequestError("no such sequence", field="sequences", value=number, limit=limit)
        chosen = np.asarray(sequences, np.int64)
        cu_B1 = np.zeros(chosen.size + 1, np.int32)
        np.cumsum(self.lengths_B[chosen], out=cu_B1[1:])
        place_T = _ranges(self.cu_lengths_B1, chosen)
        extra_NM = None if self.extra_ids_NM is None else self.extra_ids_NM[_ranges(self.row_bounds_B1, chosen)]
        return TokenBatch(self.token_ids_T[place_T], cu_B1, self.wanted_T[place_T], extra_NM)


def _ranges(bounds_B1: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """All numbers of the intervals [bounds[b], bounds[b+1]) of the chosen b, one interval after the other."""
    parts = [np.arange(bounds_B1[b], bounds_B1[b + 1]) for b in chosen]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _short(array: np.ndarray) -> str:
    return np.array2string(array, threshold=8, edgeitems=3)


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


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; the last four are of Generate (proto: Limits)."""

    max_sequence_tokens: int
    max_request_tokens: int
    max_request_sequences: int
    max_k: int
    max_reply_bytes: int
    max_new_tokens: int = 0
    max_samples: int = 0
    max_generate_tokens: int = 0
    max_schema_bytes: int = 0


@dataclass(frozen=True)
class TeacherInfo:
    """Who a teacher is and what it can do (proto: TeacherInfo)."""

    name: str
    model: str
    fingerprint: str
    architecture: str
    dtype: str
    vocab_rows: int
    tokenizer_size: int
    tokenizer_sha256: str
    chat_template_sha256: str
    hidden_size: int
    layers: int
    head_sha256: str
    transports: tuple[str, ...]
    deterministic: bool
    limits: Limits
    generates: tuple[str, ...] = ()
    base_tokenizer_sha256: str = ""
    added_tokens: str = ""

    @property
    def value_bytes(self) -> int:
        """Bytes of one logit or state entry in this teacher's dtype."""
        return DTYPES[self.dtype][1]


@dataclass(frozen=True)
class HeadHeader:
    """All of an output head but its weight.

    Attributes:
        dtype, rows, columns: of the weight [V, D].
        bias_V: or None.
        logit_scale: multiplier, 1.0 for most models.
        final_softcap: 0.0 for none, else c in c * tanh(z / c).
        sha256: over everything, see `teacher_wire.core.identity.head_sha256`.
    """

    dtype: str
    rows: int
    columns: int
    bias_V: Tensor | None
    logit_scale: float
    final_softcap: float
    sha256: str

    @property
    def weight_bytes(self) -> int:
        return self.rows * self.columns * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class TeacherHead:
    """The output head: logits = softcap(logit_scale * (h W^T + b)); weight_VD in the model's dtype."""

    header: HeadHeader
    weight_VD: Tensor


@dataclass(frozen=True)
class ScoreCall:
    """One request as the server sees it.

    Attributes:
        timeout_s: seconds the student waits; 0 for no limit.
        tenant: who asks, for fairness and quotas.
    """

    request_id: str
    teacher: str
    fingerprint: str
    spec: SignalSpec
    batch: TokenBatch
    timeout_s: float = 0.0
    tenant: str = ""


@dataclass(frozen=True)
class LatencyStatus:
    """How long one stage of answering takes (proto: LatencyStatus); quantiles in seconds."""

    stage: str
    count: int = 0
    p50_s: float = 0.0
    p90_s: float = 0.0
    p99_s: float = 0.0


@dataclass(frozen=True)
class TeacherStatus:
    """How one teacher is doing (proto: TeacherStatus).

    Attributes:
        state: `starting`, `running`, `rolling` or `failed`; `message` says more.
        fingerprints: of the live replicas, the newest first; several during a rolling update.
        healthy: replicas whose forward passes succeed.
        tokens_per_s, batch_fill: of the last seconds.
        forwards, forward_tokens, answered, failed, expired, cancelled, refused, retries, failed_forwards, given_up,
            generated_samples, generated_tokens: since the server came up; see proto.
        generate_calls, generate_running, generate_waiting: now; calls, and sequences of them.
        latencies: of the last minute.
    """

    name: str
    state: str
    message: str = ""
    replicas: int = 0
    replicas_wanted: int = 0
    fingerprints: tuple[str, ...] = ()
    queued_tokens: int = 0
    queued_requests: int = 0
    tokens_per_s: float = 0.0
    batch_fill: float = 0.0
    forwards: int = 0
    forward_tokens: int = 0
    answered: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    refused: int = 0
    retries: int = 0
    healthy: int = 0
    failed_forwards: int = 0
    given_up: int = 0
    generate_calls: int = 0
    generate_running: int = 0
    generate_waiting: int = 0
    generated_samples: int = 0
    generated_tokens: int = 0
    latencies: tuple[LatencyStatus, ...] = ()


@dataclass(frozen=True)
class TenantStatus:
    """What one tenant takes (proto: TenantStatus); the empty name is whoever has none."""

    name: str
    weight: float = 1.0
    share: float = 0.0
    tokens_per_s: float = 0.0
    served_tokens: int = 0
    queued_tokens: int = 0
    inflight_tokens: int = 0
    refused: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class StoreStatus:
    """Where the labels of sequences came from, and what is kept (proto: StoreStatus)."""

    memory_hits: int = 0
    disk_hits: int = 0
    joined: int = 0
    computed: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    trouble: str = ""


@dataclass(frozen=True)
class EdgeStatus:
    """What one edge has open."""

    node: str
    open_streams: int = 0
    open_requests: int = 0


@dataclass(frozen=True)
class ServerStatus:
    """How the whole server is doing."""

    server_version: str = ""
    up_s: float = 0.0
    teachers: tuple[TeacherStatus, ...] = ()
    tenants: tuple[TenantStatus, ...] = ()
    store: StoreStatus = field(default_factory=StoreStatus)
    edges: tuple[EdgeStatus, ...] = ()
