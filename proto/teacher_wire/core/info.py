"""Who a teacher is, what one request may ask of it, and its output head."""

from __future__ import annotations

from dataclasses import dataclass

from teacher_wire.core.tensor import DTYPES, Tensor


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
