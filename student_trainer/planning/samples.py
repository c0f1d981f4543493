"""Some rows as their readers see them: runs of tokens that are learned from, that are not, and control tokens.

In: tokenised rows and sessions; out: `Sample`s, pure text. A teacher is shown where it reads a row otherwise than the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.teachers.session import TeacherSession
from teacher_wire.vocabulary.byte_table import ByteTable

Role = Literal["supervised", "context", "control"]


@dataclass(frozen=True)
class Piece:
    """Tokens side by side that have one role.

    Attributes:
        role: `supervised` (a target of the loss), `context`, or `control` (a special token that is no target).
        text: as the tokenizer decodes them.
        tokens: how many.
        is_special: whether it is a special token; supervised ones, as the end of a turn, are too.
    """

    role: Role
    text: str
    tokens: int
    is_special: bool


@dataclass(frozen=True)
class Sample:
    """One row as one reader sees it.

    Attributes:
        key: "file:line" of the row.
        reader: `student`, or a teacher's name in the run.
        pieces: all of its tokens, in order.
        weights: smallest and largest weight of a target; None if all are 1.
    """

    key: str
    reader: str
    pieces: tuple[Piece, ...]
    weights: tuple[float, float] | None = None

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def supervised(self) -> int:
        """Those that are targets."""
        return sum(piece.tokens for piece in self.pieces if piece.role == "supervised")

    def plain(self) -> str:
        """The text with targets in ⟦ ⟧ and control tokens in ‹ ›, for output that has no colours."""
        marks = {"supervised": ("⟦", "⟧"), "control": ("‹", "›"), "context": ("", "")}
        return "".join(f"{marks[piece.role][0]}{piece.text}{marks[piece.role][1]}" for piece in self.pieces)


def samples_of(
    data: TokenizedDataset,
    count: int,
    tokenizer: Any,
    sessions: Sequence[TeacherSession],
    tables: Mapping[str, ByteTable],
) -> list[Sample]:
    """The first `count` rows, spread over the data, as the student reads them and as each teacher that reads them otherwise does.

    Args:
        tokenizer: the student's.
        tables: bytes of the ids of teachers with another tokenizer, by name.
    """
    found = []
    for index in spread(len(data), count):
        example = data[index].example
        found.append(_of_student(example, tokenizer))
        for session in sessions:
            if not session.responsible(example):
                continue
            view = session.reading.view(example)
            if session.bridge is None and np.array_equal(view.token_ids, example.token_ids):
                continue
            table = tables.get(session.name)
            if session.bridge is None:
                pieces = _pieces(view.token_ids, view.loss_mask, tokenizer)
            else:
                pieces = _by_bytes(view.token_ids, view.loss_mask, table) if table is not None else ()
            found.append(Sample(example.key, session.name, pieces))
    return found


def spread(length: int, count: int) -> list[int]:
    """`count` of 0..length-1, evenly, the first among them."""
    count = min(length, count)
    return [place * length // count for place in range(count)]


def _of_student(example: Example, tokenizer: Any) -> Sample:
    weights = example.target_weights
    uneven = (float(weights.min()), float(weights.max())) if weights.size and (weights != 1).any() else None
    return Sample(example.key, "student", _pieces(example.token_ids, example.loss_mask, tokenizer), uneven)


def _pieces(ids_L: np.ndarray, mask_L: np.ndarray, tokenizer: Any) -> tuple[Piece, ...]:
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    is_special_L = np.isin(ids_L, sorted(special)) if special else np.zeros(len(ids_L), np.bool_)

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(ids_L[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return tuple(_cut(mask_L, is_special_L, text))


def _by_bytes(ids_L: np.ndarray, mask_L: np.ndarray, table: ByteTable) -> tuple[Piece, ...]:
    """Of ids whose tokenizer is not here: what is known of them is the bytes they stand for; control tokens stand for none."""
    ends_V1, bytes_B = table.ends_V1, table.bytes_B
    empty_L = ends_V1[ids_L] == ends_V1[ids_L + 1]

    def text(start: int, end: int) -> str:
        parts = [bytes_B[ends_V1[i] : ends_V1[i + 1]].tobytes() for i in ids_L[start:end]]
        return b"".join(part or b"[%d]" % i for part, i in zip(parts, ids_L[start:end], strict=True)).decode(
            errors="replace"
        )

    return tuple(_cut(mask_L, empty_L, text))


def _cut(mask_L: np.ndarray, is_special_L: np.ndarray, text: Any) -> list[Piece]:
    kind_L = mask_L.astype(np.int8) * 2 + is_special_L
    borders = [0, *(np.flatnonzero(np.diff(kind_L)) + 1).tolist(), len(kind_L)]
    found = []
    for start, end in pairwise(borders):
        if start == end:
            continue
        special = bool(is_special_L[start])
        role: Role = "supervised" if mask_L[start] else "control" if special else "context"
        found.append(Piece(role, text(start, end), end - start, special))
    return found
