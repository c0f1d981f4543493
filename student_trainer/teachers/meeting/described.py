"""What the teachers of a run say of themselves, all asked at once, and what follows for the rows: whether one has another tokenizer.

In: a config, connections, the student and its data; out: a `Met`. A teacher that does not answer is named when its session is opened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from student_trainer.config.features import FeatureConfig
from student_trainer.config.run import TrainConfig
from student_trainer.config.teachers import TeacherConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import check_date
from student_trainer.errors import OfflineError
from student_trainer.labels import event_loop
from student_trainer.model.load import Outline
from student_trainer.teachers.connect import Connection
from student_trainer.teachers.handshake import StudentFacts, is_bridged, shared_rows
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import TeacherInfo

Described = TeacherInfo | TeacherWireError | OfflineError
Data = tuple[TokenizedDataset, TokenizedDataset | None]


class Trouble:
    """Shows each different trouble with a teacher once, not every retry.

    Args:
        teacher: which of several; empty for the only one.
    """

    def __init__(self, console: Console, teacher: str = "") -> None:
        self._console = console
        self._whose = f"teacher {teacher}" if teacher else "teacher"
        self._last = ""

    def __call__(self, error: TeacherWireError) -> None:
        if error.message != self._last:
            self._last = error.message
            self._console.print(f"[yellow]{self._whose}:[/] {escape(str(error))}; trying again", highlight=False)


class DiskTrouble:
    """Shows the first trouble with the cache: a disk that is full or read-only has many ways to say so."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = False

    def __call__(self, message: str) -> None:
        if not self._told:
            self._told = True
            self._console.print(f"[yellow]cache:[/] {escape(message)}", highlight=False)


def describe_all(config: TrainConfig, connections: Sequence[Connection], console: Console) -> list[Described]:
    """What each teacher says of itself, in the order of the config; why not, of one that does not answer."""

    async def describe(settings: TeacherConfig, connection: Connection) -> Described:
        several = settings.called if len(connections) > 1 else ""
        try:
            async with connection.client(Trouble(console, several), config.feed.window_mb << 20) as client:
                return await connection.describe(client)
        except (TeacherWireError, OfflineError) as error:
            return error

    async def every() -> list[Described]:
        return await asyncio.gather(*map(describe, config.every_teacher, connections))

    return event_loop.run(every()) if connections else []


def facts_of(
    config: TrainConfig, student: Outline, data: TokenizedDataset, held_out: TokenizedDataset | None
) -> StudentFacts:
    """What the handshakes need to know of the student of a run."""
    uses_chat = config.data.template == "chat" or (
        config.data.template == "auto" and bool(student.tokenizer.chat_template)
    )
    return StudentFacts.of(student.tokenizer, student.vocab_rows, uses_chat, data, held_out)


def meet(
    config: TrainConfig,
    connections: Sequence[Connection],
    student: Outline,
    data: Data,
    reload: Callable[[], Data],
    console: Console,
) -> tuple[Data, list[Described]]:
    """The teachers' descriptions, and the rows as all of them can be asked about them.

    Args:
        config: the run.
        connections: one per teacher of the config.
        student: who is to learn.
        data: the rows, and those to measure with, as the student and teachers of its tokenizer read them.
        reload: reads them again, with what a teacher of another tokenizer must be told; called if there is one.
        console: told of that.

    Raises:
        ConfigError: `data.date`, and nobody prints one.
    """
    described = describe_all(config, connections, console)
    facts = facts_of(config, student, *data)
    others = [
        settings.called or found.name
        for settings, found in zip(config.every_teacher, described, strict=True)
        if isinstance(found, TeacherInfo) and is_bridged(found, facts)
    ]
    if not others:
        check_date(config.data, *data)
        return data, described
    told = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} another tokenizer than the student"
    each = ": each answer of a row is an example of its own (data.turns=each)" if config.data.turns == "auto" else ""
    console.print(f"[yellow]note:[/] {escape(told + each)}", soft_wrap=True)
    return reload(), described


def layers_of(
    config: TrainConfig, described: Sequence[Described], facts: StudentFacts
) -> dict[str, dict[str, FeatureConfig]]:
    """The sections on layers by what the teacher is called whose layers they learn from."""
    called = [settings.called for settings in config.every_teacher]
    same = [name for name, found in zip(called, described, strict=True) if not is_bridged(found, facts)]
    first = (same or called)[0]
    sections: dict[str, dict[str, FeatureConfig]] = {}
    for name, section in config.loss.features.items():
        sections.setdefault(first if section.teacher is None else section.teacher, {})[name] = section
    return sections


def student_rows(described: Sequence[Described], facts: StudentFacts) -> int:
    """V of the student's head that learns: ids that it, its tokenizer and all teachers of that tokenizer have."""
    shared = [
        shared_rows(found, facts)
        for found in described
        if isinstance(found, TeacherInfo) and not is_bridged(found, facts)
    ]
    return min([facts.vocab_rows, facts.tokenizer_size, *shared])
