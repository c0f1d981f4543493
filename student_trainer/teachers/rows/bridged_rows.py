"""The rows of a run as a teacher with another tokenizer reads them, and which tokens of both belong together.

In: examples with what the teacher must be told; out: a `BridgedRow` for each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from student_trainer.data.cross_tokenizer.alignment import Alignment
from student_trainer.data.dataset import Example
from student_trainer.data.teacher_view import TeacherView


@dataclass(frozen=True, eq=False)
class BridgedRow:
    """An example in another tokenizer.

    Attributes:
        view: as the teacher reads it; None if too little of it can be joined, so that the teacher does not label it.
        alignment: of its supervised rows; None without a view.
        one_to_one: supervised rows of the student that are one to one.
        refused: why the teacher cannot read it; empty if it can.
    """

    view: TeacherView | None
    alignment: Alignment | None
    one_to_one: int = 0
    refused: str = ""


def row_key(example: Example) -> bytes:
    """Names an example by what a teacher is told of it and by the student's tokens of the answer."""
    assert example.told is not None, "rows of a run with a teacher of another tokenizer keep what it must be told"
    digest = hashlib.blake2b(example.told.conversation, digest_size=20)
    digest.update(b"\0" + example.token_ids[example.told.answer_start :].tobytes())
    digest.update(example.loss_mask[example.told.answer_start :].tobytes())
    return digest.digest()
