"""What a dataset holds for teachers beside the student's own reading: tags, renderings that one of them alone is shown, and what a teacher
with another tokenizer must be told to render a prompt itself.

In: rows, their conversations and the sequences made of them; out: the same examples with all that. Must never change what the student
reads, nor pair targets that differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from student_trainer.data.routing import Routing, tags_of_row
from student_trainer.data.teacher_view import TeacherContext, TeacherView, Told, check_targets
from student_trainer.data.text.answer import Answer, Template
from student_trainer.data.text.encoding import Encoder, TokenSequence
from student_trainer.data.text.plain import PLAIN
from student_trainer.data.trace_rows import TaskRow
from student_trainer.errors import DataError


@dataclass(frozen=True)
class Readers:
    """Who reads the rows beside the student.

    Attributes:
        context: what the only teacher is told; None for nothing.
        contexts: likewise of several teachers, by name.
        routing: of the rows among several teachers; None for one.
        tag_field: of the rows, which holds tags; None: tags are of sources alone.
        tells: keep of each example what a teacher with another tokenizer must be told. Each is then of one answer.
    """

    context: TeacherContext | None = None
    contexts: tuple[tuple[str, TeacherContext], ...] = ()
    routing: Routing | None = None
    tag_field: str | None = None
    tells: bool = False


@dataclass(frozen=True)
class ForTeachers:
    """What an example gets for its teachers.

    Attributes:
        teacher: the row as the only teacher reads it; None where that is as the student does.
        tags: of its row.
        views: as one of several teachers reads it, by name.
        told: to a teacher with another tokenizer; None where nobody needs it.
    """

    teacher: TeacherView | None = None
    tags: tuple[str, ...] = ()
    views: Mapping[str, TeacherView] | None = None
    told: Told | None = None


_ONLY = ""  # name of the only teacher, whose context is `Readers.context`


class Reading:
    """Makes of rows what their examples hold for teachers.

    Args:
        readers: who.
        template: makes a template with counters of its own for each rendering.
        kwargs: the config's variables of the chat template.
        day: that a chat template prints, for teachers that render their own prompts.
    """

    def __init__(
        self,
        readers: Readers,
        tokenizer: PreTrainedTokenizerBase,
        template: Callable[[], Template],
        kwargs: Mapping[str, Any],
        day: date,
    ) -> None:
        self._readers = readers
        self._kwargs = kwargs
        self._day = day
        self._is_plain = template().name == PLAIN
        named = [] if readers.context is None else [(_ONLY, readers.context)]
        self._informing = {
            name: _Informing(context, tokenizer, template(), f"teachers {name}: context" if name else "teacher.context")
            for name, context in (*named, *readers.contexts)
        }
        fields = [informing.context.field for informing in self._informing.values()]
        self.fields = frozenset(fields if readers.tag_field is None else [*fields, readers.tag_field])

    def answers(self, made: TaskRow, turns: str) -> dict[str, list[Answer]]:
        """The answers of a row behind the prompt that each teacher with a context is shown.

        Raises:
            DataError: a context has no place in the row.
        """
        return {name: informing.answers(made, turns) for name, informing in self._informing.items()}

    def encode(self, rows: Sequence[Mapping[str, list[Answer]]], turns: str) -> list[dict[str, list[TeacherView]]]:
        """What `answers` gave for some rows, as views by teacher."""
        found: list[dict[str, list[TeacherView]]] = [{} for _ in rows]
        for name, informing in self._informing.items():
            for place, views in enumerate(informing.encode([answers[name] for answers in rows], turns)):
                found[place][name] = views
        return found

    def of(
        self,
        made: TaskRow,
        source_tags: Sequence[str],
        sequences: Sequence[TokenSequence],
        seen: Mapping[str, list[TeacherView]],
    ) -> list[ForTeachers]:
        """What the examples of a row hold for its teachers, one for each of its `sequences`.

        Raises:
            DataError: tags that cannot be read, or that give the row to no teacher; or the targets of two renderings differ.
        """
        tags = tags_of_row(made.row, self._readers.tag_field, source_tags) if self._readers.routing else ()
        if self._readers.routing is not None:
            self._readers.routing.check(made.row, tags)
        for name, views in seen.items():
            self._informing[name].check(made, sequences, views)
        return [
            ForTeachers(
                seen[_ONLY][place] if _ONLY in seen else None,
                tags,
                {name: views[place] for name, views in seen.items() if name != _ONLY} or None,
                self._told(made, sequence) if self._readers.tells else None,
            )
            for place, sequence in enumerate(sequences)
        ]

    def _told(self, made: TaskRow, sequence: TokenSequence) -> Told:
        (turn,), (start,), (first,) = sequence.turns, sequence.starts, sequence.firsts
        before = made.conversation.turns[:turn]
        told: dict[str, Any]
        if self._is_plain:
            told = {"prompt": "".join(said.content + "\n" for said in before)}
        else:
            told = {
                "messages": [said.message for said in before],
                "tools": [dict(tool) for tool in made.conversation.tools],
                "template_kwargs": {**self._kwargs, **made.conversation.template_kwargs},
                "day": self._day.isoformat(),
            }
        written = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        return Told(written, start, first == " ")


class _Informing:
    """Makes one teacher's renderings of conversations, with a template and counters of its own.

    Attributes:
        context: what the teacher is told.
    """

    def __init__(
        self, context: TeacherContext, tokenizer: PreTrainedTokenizerBase, template: Template, setting: str
    ) -> None:
        self.context = context
        self._template = template
        self._encoder = Encoder(tokenizer, template)
        self._setting = setting

    def answers(self, made: TaskRow, turns: str) -> list[Answer]:
        return self._template.answers(self.context.informed(made.row, made.conversation, turns), turns)

    def encode(self, told: Sequence[Sequence[Answer]], turns: str) -> list[list[TeacherView]]:
        found = self._encoder.encode(told, turns)
        return [[TeacherView(sequence.token_ids, sequence.loss_mask) for sequence in sequences] for sequences in found]

    def check(self, made: TaskRow, sequences: Sequence[TokenSequence], views: Sequence[TeacherView]) -> None:
        """
        Raises:
            DataError: the targets of the two differ.
        """
        if len(sequences) != len(views):
            raise made.row.error(
                f"the teacher's rendering makes {len(views)} sequences of its answers, the student's {len(sequences)} ({self._setting}); "
                "data.turns=each makes one of each answer"
            )
        for sequence, view in zip(sequences, views, strict=True):
            try:
                check_targets(sequence.token_ids, sequence.loss_mask, view)
            except DataError as error:
                raise made.row.error(str(error)) from error
