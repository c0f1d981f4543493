"""Who a teacher is, what one request may ask of it, and what it gives away beside labels."""

from __future__ import annotations

from dataclasses import dataclass

from teacher_wire.core.errors import CapabilityError
from teacher_wire.core.tensor import DTYPES

LAYER_BASIS = "layer_basis"  # the kind of artifact that the reduction "pca" of states projects on
BYTE_TABLE = "byte_table"  # the kind of artifact by which a student with another tokenizer aligns its tokens


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; the last two are of Tokenize, the four before them of Generate (proto: Limits)."""

    max_sequence_tokens: int
    max_request_tokens: int
    max_request_sequences: int
    max_k: int
    max_reply_bytes: int
    max_new_tokens: int = 0
    max_samples: int = 0
    max_generate_tokens: int = 0
    max_schema_bytes: int = 0
    max_tokenize_bytes: int = 0
    max_tokenize_rows: int = 0


@dataclass(frozen=True)
class ArtifactInfo:
    """One artifact of a teacher, by name (proto: ArtifactInfo).

    Attributes:
        kind: one of `teacher_wire.artifacts.kinds.KINDS`, for those this side knows.
        sha256: of its content.
        bytes: of all its tensors together.
    """

    kind: str
    sha256: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.kind} {self.sha256} ({self.bytes:,} bytes)"


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
    artifacts: tuple[ArtifactInfo, ...]
    transports: tuple[str, ...]
    deterministic: bool
    limits: Limits
    generates: tuple[str, ...] = ()
    base_tokenizer_sha256: str = ""
    added_tokens: str = ""
    kv_width: int = 0
    basis_rank: int = 0
    basis_layers: tuple[int, ...] = ()
    revision: str = ""

    @property
    def value_bytes(self) -> int:
        """Bytes of one logit or state entry in this teacher's dtype."""
        return DTYPES[self.dtype][1]

    def artifact(self, kind: str) -> ArtifactInfo:
        """Its artifact of that kind, the first one if there are several.

        Raises:
            CapabilityError: it gives none away.
        """
        for artifact in self.artifacts:
            if artifact.kind == kind:
                return artifact
        offered = "|".join(artifact.kind for artifact in self.artifacts)
        raise CapabilityError(
            f"teacher {self.name!r} does not give this away", field="artifact", value=kind, limit=offered or "nothing"
        )
