"""What the teacher sees of a row when it is told more than the student: its own rendering of the conversation, with the same targets.

In: a row, its conversation, and which field of the row goes where; out: the conversation as the teacher is asked it, and a `TeacherView`
of the tokens that came of it. Both sides render their own prompt; their targets are the same ids and are joined by position
(docs/concepts/method.md 10). Must never change what the student reads, nor pair targets that differ.

Axes: L tokens of the teacher's sequence, n of a completion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from student_trainer.data.rows.formats import Conversation, Row, Turn
from student_trainer.data.text.answer import trained
from student_trainer.errors import DataError

_PLACES = re.compile(r"\{(message|context)\}")


@dataclass(frozen=True)
class TeacherContext:
    """What of a row the teacher alone is told.

    Attributes:
        field: of the row, whose text it is.
        template: what becomes of the message: `{message}` stands for the message as the student reads it, `{context}` for the text.
        role: whose message: the last one of the `user` before the first answer that is learned, or the `system` message, which is made
            if there is none.
    """

    field: str
    template: str = "{message}\n\n{context}"
    role: Literal["user", "system"] = "user"

    def informed(self, row: Row, conversation: Conversation, turns: str) -> Conversation:
        """The conversation as the teacher is asked it.

        Args:
            row: whose field it is.
            conversation: what the row became.
            turns: which answers are learned, as `Template.answers`.

        Raises:
            DataError: the field is missing or no text, or there is no message for it; names the field.
        """
        text = row.fields.get(self.field)
        if text is None:
            raise row.error("the row lacks the field that teacher.context shows to the teacher", self.field)
        if not isinstance(text, str) or not text.strip():
            raise row.error(
                "what teacher.context shows to the teacher must be text that is not empty", self.field, text
            )
        place = self._place(row, conversation, turns)
        said = conversation.turns
        if place is None:
            made = Turn("system", self._filled("", text).strip())
            return replace(conversation, turns=(made, *said))
        turn = replace(said[place], content=self._filled(said[place].content, text))
        return replace(conversation, turns=(*said[:place], turn, *said[place + 1 :]))

    def _place(self, row: Row, conversation: Conversation, turns: str) -> int | None:
        """Number of the message that is changed; None if a system message is to be made."""
        if self.role == "system":
            return 0 if conversation.turns[0].role == "system" else None
        learned = trained(conversation, turns)
        before = conversation.turns[: learned[0]] if learned else ()
        asking = [i for i, turn in enumerate(before) if turn.role == "user"]
        if learned and not asking:
            raise row.error(
                "no message of the user stands before the first answer, for teacher.context to add to; data.turns=last learns "
                "the last answer alone",
                self.field,
            )
        return asking[-1] if asking else 0  # nothing is learned of a row without an answer

    def _filled(self, message: str, context: str) -> str:
        told = {"message": message, "context": context}
        return _PLACES.sub(lambda found: told[found[1]], self.template)


@dataclass(frozen=True, eq=False)
class TeacherView:
    """A row as the teacher reads it.

    Attributes:
        token_ids: int32 [L].
        loss_mask: bool [L]; True at the same targets as the student's, in the same order.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray

    def answered(self, completion_n: np.ndarray) -> TeacherView:
        """The same prompt with another completion behind it, every token of which is a target.

        The prompt is what stands before the last answer, as of an inference prompt.
        """
        prompt_ids = self.token_ids[: answer_start(self.loss_mask)]
        loss_mask = np.zeros(prompt_ids.size + completion_n.size, np.bool_)
        loss_mask[prompt_ids.size :] = True
        return TeacherView(np.concatenate([prompt_ids, completion_n]).astype(np.int32), loss_mask)


@dataclass(frozen=True, eq=False)
class Told:
    """What a teacher with another tokenizer must be told of an example to render its prompt itself.

    Attributes:
        conversation: JSON of what stands before the answer, as `Tokenize` takes it (teacher.proto).
        answer_start: tokens of the student's before the answer, of which the first ones may have the weight 0.
        begins_with_space: the answer's text does; a space before another one is that of SentencePiece, and not of the text.
    """

    conversation: bytes
    answer_start: int
    begins_with_space: bool = False


def answer_start(loss_mask: np.ndarray) -> int:
    """Tokens before the last answer of a sequence, all that an inference prompt of it holds; `loss_mask` is bool [L]."""
    targets = np.flatnonzero(loss_mask)
    breaks = np.flatnonzero(np.diff(targets) > 1)
    return int(targets[breaks[-1] + 1 if breaks.size else 0])


def check_targets(token_ids: np.ndarray, loss_mask: np.ndarray, view: TeacherView) -> None:
    """Refuses a view whose targets are not the student's (`token_ids` and `loss_mask`, [Ls] each).

    Raises:
        DataError: without a place.
    """
    ours, theirs = token_ids[loss_mask], view.token_ids[view.loss_mask]
    if not np.array_equal(ours, theirs):
        raise DataError(
            f"the answer has other tokens behind the teacher's prompt ({theirs.size} targets, the student's {ours.size}): labels could "
            "not be joined by position (teacher.context)"
        )
