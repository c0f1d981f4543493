"""The rows of a run as a teacher with another tokenizer reads them, and which tokens of both belong together.

In: examples with what the teacher must be told, and its tokens of them; out: a `BridgedRow` for each. It asks nobody.

Axes: n tokens of an answer as the student writes it, C as the teacher does, with its end of turn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from student_trainer.data.cross_tokenizer.alignment import Alignment, align
from student_trainer.data.dataset import Example
from student_trainer.data.teacher_view import TeacherView, Told
from student_trainer.errors import DataError
from teacher_wire.tokenizing.messages import MARKED_ROLES, TextRow, TokenizedRow
from teacher_wire.vocabulary.byte_table import ByteTable


@dataclass(frozen=True, eq=False)
class BridgedRow:
    """An example in another tokenizer.

    Attributes:
        view: as the teacher reads it; None if too little of it can be joined, so that the teacher does not label it.
        alignment: of its supervised rows; None without a view.
        coverage: share of the student's supervised rows that are one to one.
        refused: why the teacher cannot read it; empty if it can.
    """

    view: TeacherView | None
    alignment: Alignment | None
    coverage: float = 0.0
    refused: str = ""


def told_of(example: Example) -> Told:
    """What a teacher with another tokenizer must be told of an example."""
    assert example.told is not None, "rows of a run with a teacher of another tokenizer keep what it must be told"
    return example.told


def answer_of(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The ids of an example's answer, int64 [n], and which of them are supervised, bool [n]."""
    start = told_of(example).answer_start
    return example.token_ids[start:].astype(np.int64), example.loss_mask[start:]


def row_key(example: Example) -> bytes:
    """Names an example by what a teacher is told of it and by the student's tokens of the answer."""
    told = told_of(example)
    ids_n, wanted_n = answer_of(example)
    digest = hashlib.blake2b(told.conversation, digest_size=20)
    digest.update(b"\0" + bytes([told.begins_with_space]) + ids_n.tobytes() + wanted_n.tobytes())
    return digest.digest()


def text_row(example: Example, table: ByteTable) -> TextRow:
    """What the teacher is asked to tokenise: the text of the answer behind its conversation.

    Args:
        table: the bytes of the student's ids.
    """
    ids_n, _ = answer_of(example)
    ends_n = _ends(example, table)
    text = table.text_of(ids_n)
    spaced = len(text) - (int(ends_n[-1]) if ends_n.size else 0)
    roles_n = np.asarray(table.role_V)[ids_n]
    marks = tuple((int(ends_n[i]), int(roles_n[i])) for i in np.flatnonzero(np.isin(roles_n, MARKED_ROLES)))
    return TextRow(text[spaced:], told_of(example).conversation, marks)


def bridged_row(
    example: Example,
    table: ByteTable,
    answered: TokenizedRow,
    teacher_table: ByteTable,
    min_coverage: float,
    teacher_rows: int | None = None,
) -> BridgedRow:
    """An example in the teacher's tokens.

    Args:
        table: the bytes of the student's ids.
        answered: what the teacher made of `text_row`.
        teacher_table: the bytes of the teacher's ids.
        min_coverage: share of the student's supervised rows that must be one to one.
        teacher_rows: ids that the teacher's head has; None: all of its table.
    """
    if answered.refused:
        return BridgedRow(None, None, refused=answered.refused)
    most = int(answered.token_ids_T.max(initial=-1))
    if teacher_rows is not None and most >= teacher_rows:
        return BridgedRow(
            None, None, refused=f"its token {most} is beyond the {teacher_rows} that the teacher's head has"
        )
    if answered.prompt_tokens < 1:
        return BridgedRow(None, None, refused="nothing stands before the answer in the teacher's rendering")
    ids_n, wanted_n = answer_of(example)
    mask_T = np.zeros(answered.token_ids_T.size, np.bool_)
    mask_T[answered.prompt_tokens :] = True
    try:
        found = align(
            ids_n, table, answered.token_ids_T[answered.prompt_tokens :], teacher_table,
            student_ends_n=_ends(example, table), teacher_ends_m=answered.byte_ends_C, student_wanted_n=wanted_n,
        )  # fmt: skip
    except DataError as error:
        return BridgedRow(None, None, refused=str(error))
    coverage = found.one_to_one_share(int(wanted_n.sum()))
    if not mask_T.any() or not found.groups or coverage < min_coverage:
        return BridgedRow(None, None, coverage)
    return BridgedRow(TeacherView(answered.token_ids_T.astype(np.int32), mask_T), found, coverage)


def _ends(example: Example, table: ByteTable) -> np.ndarray:
    """int64 [n], where each token ends in the answer's text; without the space that SentencePiece puts before it."""
    ids_n, _ = answer_of(example)
    ends_n = table.ends_of(ids_n)
    text = table.text_of(ids_n[: int(np.searchsorted(ends_n, 1)) + 1]) if ends_n.size else b""
    if text.startswith(b" ") and not told_of(example).begins_with_space:
        return np.maximum(ends_n - 1, 0)
    return ends_n
