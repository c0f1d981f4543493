"""What travels when a teacher is asked for its tokens: texts in their conversations up, ids and byte ends down.

Axes: T tokens of a row, C of these behind its prompt.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from teacher_wire.core.errors import CapabilityError, LimitError, RequestError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.vocabulary.byte_table import THINK_CLOSE, THINK_OPEN

MAX_REPLY_BYTES = 12 << 20  # of ids and ends of one reply; a message may have 16 MiB
REPLY = "reply bytes"  # the field of a refusal that fewer rows mend
MARKED_ROLES = (THINK_OPEN, THINK_CLOSE)


@dataclass(frozen=True)
class TextRow:
    """A text to be tokenised, alone or as the answer in a conversation (proto: TokenizeRow).

    Attributes:
        text: UTF-8.
        conversation: what was said before it, a JSON object with `messages`, `tools`, `template_kwargs` and `day`, or with `prompt`;
            empty for the text alone.
        marks: (bytes of the text before it, role) of tokens in the text that have a role and no bytes, by rising place; the roles are
            those of `MARKED_ROLES`.
    """

    text: bytes
    conversation: bytes = b""
    marks: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """Bytes of both, as limits count them."""
        return len(self.text) + len(self.conversation)


@dataclass(frozen=True, eq=False)
class TokenizedRow:
    """A row in the tokens of a teacher (proto: TokenizedRow).

    Attributes:
        token_ids_T: int32, of the prompt, the text and the end of the turn.
        prompt_tokens: of these, in front.
        byte_ends_C: int32, where each token behind the prompt ends, in bytes of the text.
        ended: the last id is that of an end of turn or of text; it has no bytes.
        refused: why the row cannot be had, for a person; then there are no ids.
    """

    token_ids_T: np.ndarray
    prompt_tokens: int
    byte_ends_C: np.ndarray
    ended: bool
    refused: str = ""

    @classmethod
    def refusal(cls, reason: str) -> TokenizedRow:
        """A row that cannot be had."""
        return cls(np.zeros(0, np.int32), 0, np.zeros(0, np.int32), False, reason)

    @property
    def digest(self) -> str:
        """SHA-256 of all but `refused`."""
        sha256 = hashlib.sha256(self.token_ids_T.astype("<i4").tobytes() + struct.pack("<I", self.prompt_tokens))
        sha256.update(self.byte_ends_C.astype("<i4").tobytes() + bytes([self.ended]))
        return sha256.hexdigest()


@dataclass(frozen=True)
class TokenizeCall:
    """What a student asks of one teacher (proto: TokenizeRequest); `tenant` is filled in by the server."""

    teacher: str
    fingerprint: str
    rows: tuple[TextRow, ...]
    timeout_s: float = 0.0
    tenant: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return sum(row.size for row in self.rows)


def check_offered(info: TeacherInfo) -> None:
    """Raises CapabilityError if this teacher does not tokenise."""
    if not info.limits.max_tokenize_rows:
        raise CapabilityError(
            f"teacher {info.name!r} does not tokenise: its server is older than that, or its tokenizer does not say which bytes its "
            "tokens stand for; use a student with the teacher's tokenizer",
            field="Tokenize",
        )  # fmt: skip


def check_tokenize(call: TokenizeCall, info: TeacherInfo) -> None:
    """Refuses a request that breaks a limit of the teacher.

    Raises:
        CapabilityError: it does not tokenise.
        LimitError: naming value and limit.
        RequestError: no rows, or marks that are none.
    """
    check_offered(info)
    if not call.rows:
        raise RequestError("at least one", field="rows")
    for field_, value, limit in (
        ("rows", len(call.rows), info.limits.max_tokenize_rows),
        ("rows, bytes", call.size, info.limits.max_tokenize_bytes),
    ):
        if value > limit:
            raise LimitError("more than this teacher takes at once", field=field_, value=value, limit=limit)
    for number, row in enumerate(call.rows):
        if row.marks:
            _check_marks(row, number)


def _check_marks(row: TextRow, number: int) -> None:
    places = [place for place, _ in row.marks]
    if places != sorted(places) or places[-1] > len(row.text):
        raise RequestError("places by falling order, or outside the text", field=f"rows[{number}].marks")
    if any(role not in MARKED_ROLES for _, role in row.marks):
        raise RequestError("unknown role", field=f"rows[{number}].marks", limit="|".join(map(str, MARKED_ROLES)))


def chunked(rows: Sequence[TextRow], info: TeacherInfo) -> list[list[int]]:
    """The numbers of the rows of each call, within the teacher's limits; rows that are too large for any call are left out."""
    most, longest = info.limits.max_tokenize_bytes, info.limits.max_tokenize_rows
    chunks: list[list[int]] = []
    held = 0
    for number, row in enumerate(rows):
        if row.size > most:
            continue
        if not chunks or held + row.size > most or len(chunks[-1]) == longest:
            chunks.append([])
            held = 0
        chunks[-1].append(number)
        held += row.size
    return chunks
