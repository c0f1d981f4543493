"""Who can be asked in a chat or by a file: a student here, or a teacher behind its server, under one name each.

In: conversations; out: answers, as text that streams or as a list. Each speaker has its own tokenizer and template.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from student_trainer.config.teachers import TeacherConfig
from student_trainer.data.rows.formats import Conversation
from student_trainer.data.text.tokenizer_file import load_tokenizer
from student_trainer.errors import ConfigError, ModelError
from student_trainer.inference.load import Located, load, locate
from student_trainer.inference.prompts import Prompter
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.served import ServedTeacher, served_teacher
from student_trainer.inference.text_stream import TextStream
from student_trainer.inference.writer import StudentWriter, Written, written
from student_trainer.teachers.connect import connections

_ADDRESS = re.compile(r"[^\s/]+:\d{1,5}(,[^\s/]+:\d{1,5})*")


class Speaker(Protocol):
    """Who answers; `identity` names what its answers depend on."""

    name: str
    prompter: Prompter

    @property
    def identity(self) -> str: ...

    def check_room(self, tokens: int, sampling: Sampling, source: str) -> None: ...

    def stream(self, conversation: Conversation, sampling: Sampling, number: int = 0) -> Answering: ...

    def answers(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        first: int = 0,
        done: Callable[[int], None] | None = None,
    ) -> list[Written]: ...


class Answering:
    """An answer on its way: iterate for its text; `written` is the whole of it afterwards."""

    def __init__(self, pieces: Callable[[Answering], Iterator[str]]) -> None:
        self.written: Written | None = None
        self._pieces = pieces(self)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """Ends the writing."""
        self._pieces.close()  # type: ignore[attr-defined]


@dataclass
class StudentSpeaker:
    """A student in this process."""

    name: str
    located: Located
    writer: StudentWriter
    prompter: Prompter
    batch_size: int = 8

    @property
    def identity(self) -> str:
        folder = Path(self.located.path)
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        dtype = next(self.writer.student.causal_lm.parameters()).dtype
        return f"{self.located} {dtype} {[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]}"

    def check_room(self, tokens: int, sampling: Sampling, source: str) -> None:
        """
        Raises:
            ConfigError: the prompt of `source` and its answer do not fit into the model's positions.
        """
        self.writer.check_room(tokens, sampling.max_new_tokens, source)

    def stream(self, conversation: Conversation, sampling: Sampling, number: int = 0) -> Answering:
        """One answer, text by text.

        Raises:
            DataError: the template refuses the conversation.
            ConfigError: prompt and answer do not fit into the model's positions.
        """
        [ids] = self.prompter.ids([conversation])
        self.writer.check_room(len(ids), sampling.max_new_tokens)

        def pieces(answering: Answering) -> Iterator[str]:
            text, stopped = TextStream(self.writer.tokenizer), True
            try:
                with contextlib.closing(self.writer.stream(ids, sampling, number)) as tokens:  # type: ignore[type-var]
                    for token in tokens:
                        if piece := text.push(token):
                            yield piece
                stopped = False
                if piece := text.finish():
                    yield piece
            finally:
                answering.written = written(self.writer.tokenizer, text.ids, self.writer.stop_ids, stopped=stopped)

        return Answering(pieces)

    def answers(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        first: int = 0,
        done: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """Answers in order, in batches; `first` is the number of the first one."""
        prompts = self.prompter.ids(conversations)
        found: list[Written] = []
        for start in range(0, len(prompts), self.batch_size):
            some = prompts[start : start + self.batch_size]
            found += self.writer.write(some, sampling, range(first + start, first + start + len(some)))
            if done is not None:
                done(len(some))
        return found


@dataclass
class TeacherSpeaker:
    """A served teacher; its server sends whole answers, so they stream in one piece."""

    name: str
    teacher: ServedTeacher
    prompter: Prompter = field(init=False)

    def __post_init__(self) -> None:
        self.prompter = self.teacher.prompter

    @property
    def identity(self) -> str:
        return self.teacher.info.fingerprint

    def check_room(self, tokens: int, sampling: Sampling, source: str) -> None:
        """
        Raises:
            ConfigError: the prompt of `source` and its answer are more than the server takes.
        """
        limit = self.teacher.info.limits.max_sequence_tokens
        if limit and tokens + sampling.max_new_tokens > limit:
            raise ConfigError(
                f"{source}: a prompt of {tokens:,} tokens and --max-new-tokens {sampling.max_new_tokens:,} are more than the {limit:,} that "
                f"{self.name} takes: shorten the prompt, or lower --max-new-tokens"
            )

    def stream(self, conversation: Conversation, sampling: Sampling, number: int = 0) -> Answering:
        """One answer, when it is whole."""
        [ids] = self.prompter.ids([conversation])

        def pieces(answering: Answering) -> Iterator[str]:
            [answering.written] = self.teacher.write([ids], sampling)
            yield answering.written.text

        return Answering(pieces)

    def answers(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        first: int = 0,
        done: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """Answers in order; the server draws each from a stream of the seed and its prompt, wherever it stands in a call."""
        return self.teacher.write(self.prompter.ids(conversations), sampling, done=done)


def is_address(text: str) -> bool:
    """Whether a name is HOST:PORT and nothing on this machine's disk."""
    return bool(_ADDRESS.fullmatch(text)) and not Path(text).expanduser().exists()


@dataclass(frozen=True)
class Opening:
    """How speakers are opened.

    Attributes:
        base, device, dtype, batch_size: of students, as `inference.load` takes them.
        template, kwargs: of prompts.
        teacher: how a server is reached; its address is replaced by that of the speaker. None: by the address alone.
        teacher_tokenizer: folder of a teacher's tokenizer, where no student has the same.
    """

    base: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8
    template: str = "auto"
    kwargs: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherConfig | None = None
    teacher_tokenizer: str | None = None


@contextlib.contextmanager
def open_speakers(named: Sequence[tuple[str, str]], opening: Opening, console: Console) -> Iterator[list[Speaker]]:
    """Everybody who is to answer, while the block runs; students are loaded first, since a teacher needs one of their tokenizers.

    Args:
        named: name and place of each: HOST:PORT of a server, or what `inference.load.locate` takes.

    Raises:
        ConfigError, ModelError, TeacherWireError: naming who cannot be opened.
    """
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two models are called {twice!r}: name them apart, as NAME=PATH")
    found: dict[str, Speaker] = {}
    places = {name: locate(where, opening.base) for name, where in named if not is_address(where)}
    for name, located in places.items():
        with console.status(f"loading {located.named}"):
            student = load(located, opening.device, opening.dtype)
        prompter = Prompter(student.tokenizer, opening.template, opening.kwargs)
        found[name] = StudentSpeaker(name, located, StudentWriter(student, prompter), prompter, opening.batch_size)
    tokenizers = [
        (one.located.named, one.writer.tokenizer) for one in found.values() if isinstance(one, StudentSpeaker)
    ]
    if opening.teacher_tokenizer is not None:
        tokenizers.append((opening.teacher_tokenizer, tokenizer_of(opening.teacher_tokenizer)))
    with contextlib.ExitStack() as teachers:
        for name, where in named:
            if name not in places:
                config = (opening.teacher or TeacherConfig(address=where)).model_copy(update={"address": where, "embedded": None})  # fmt: skip
                [connection] = teachers.enter_context(connections([config], console))
                opened = served_teacher(connection, tokenizers, console, template=opening.template, kwargs=opening.kwargs)  # fmt: skip
                found[name] = TeacherSpeaker(name, teachers.enter_context(opened))
        yield [found[name] for name in names]


def tokenizer_of(folder: str) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        ModelError: it has none that is fast.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"--teacher-tokenizer {folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error  # fmt: skip
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"--teacher-tokenizer {folder}: has no tokenizer.json")
    return tokenizer
