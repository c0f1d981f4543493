"""A chat in the terminal with one model, or with several side by side.

In: lines of a user; out: answers as they are written. Ctrl-C ends an answer and keeps what was written of it; at the prompt it takes back what
was typed. Ctrl-D, or the end of a piped input, ends the chat.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.errors import StudentError
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.speakers import Answering, Speaker
from student_trainer.inference.writer import Written
from teacher_wire.core.errors import TeacherWireError

HELP = """/reset            forget the conversation
/system TEXT      another system prompt, and a new conversation; without TEXT none
/help             this
/quit             end; so does Ctrl-D
\"\"\"               begins and ends a message of several lines; so does a \\ at the end of a line go on
//...             a message that begins with /
Ctrl-C            ends an answer; at the prompt, takes back the line"""
_BLOCK = '"""'


@dataclass
class Chat:
    """See module.

    Attributes:
        speakers: who answers; each keeps the conversation with its own answers.
        sampling: how.
        system: prompt; "" for none.
        out: for answers; told: for everything else.
        read: a line of the user, by its prompt; EOFError at the end.
    """

    speakers: Sequence[Speaker]
    sampling: Sampling
    system: str
    out: Console
    told: Console
    read: Callable[[str], str] = input
    _turns: dict[str, list[Turn]] = field(default_factory=dict)
    _asked: int = 0

    def run(self) -> None:
        """Until the user ends it."""
        self._begin()
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # arrow keys and history for input()
            names = ", ".join(speaker.name for speaker in self.speakers)
            self.told.print(f"[bold]{escape(names)}[/]; /help for commands, Ctrl-D to end")
        while (message := self._message()) is not None:
            if message.startswith("/") and not message.startswith("//"):
                if not self._command(message):
                    return
            elif message.strip():
                self.ask(message[1:] if message.startswith("//") else message)

    def ask(self, message: str) -> None:
        """Has everybody answer; an error is told, and the message forgotten."""
        before = {name: list(turns) for name, turns in self._turns.items()}
        for turns in self._turns.values():
            turns.append(Turn("user", message))
        try:
            answers = self._one() if len(self.speakers) == 1 else self._side_by_side()
        except (StudentError, TeacherWireError) as error:
            self.told.print(f"[red]{escape(str(error))}[/]")
            self._turns = before
            return
        self._asked += 1
        for speaker, answer in zip(self.speakers, answers, strict=True):
            if answer.text:
                self._turns[speaker.name].append(Turn("assistant", answer.text))
            else:  # templates refuse an empty answer, and two messages of a user behind each other
                self._turns[speaker.name] = before[speaker.name]

    def _begin(self) -> None:
        first = [Turn("system", self.system)] if self.system else []
        self._turns = {speaker.name: list(first) for speaker in self.speakers}

    def _message(self) -> str | None:
        """The next message; None at the end."""
        lines: list[str] = []
        in_block = False
        while True:
            try:
                line = self.read(("… " if lines or in_block else "> ") if sys.stdin.isatty() else "")
            except EOFError:
                if sys.stdin.isatty():
                    self.out.print()
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                self.told.print("\n[dim]Ctrl-D ends[/]")
                lines, in_block = [], False
                continue
            if in_block:
                if line.rstrip().endswith(_BLOCK):
                    return "\n".join([*lines, line.rstrip().removesuffix(_BLOCK)]).strip("\n")
                lines.append(line)
            elif not lines and line.startswith(_BLOCK):
                rest = line.removeprefix(_BLOCK)
                if rest.rstrip().endswith(_BLOCK):
                    return rest.rstrip().removesuffix(_BLOCK)
                in_block = True
                lines = [rest] if rest else []
            elif line.endswith("\\"):
                lines.append(line[:-1])
            else:
                return "\n".join([*lines, line])

    def _command(self, line: str) -> bool:
        """Does what a line with / says; False to end."""
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self._begin()
            self.told.print("[dim]a new conversation[/]")
        elif name == "/system":
            self.system = rest.strip()
            self._begin()
            self.told.print(
                f"[dim]a new conversation {'with another' if self.system else 'without a'} system prompt[/]"
            )
        elif name == "/help":
            self.told.print(HELP, markup=False)
        else:
            self.told.print(f"unknown command {name}; known: /reset, /system, /help, /quit, and // for a message that begins with /", markup=False)  # fmt: skip
        return True

    def _conversation(self, speaker: Speaker) -> Conversation:
        return Conversation(tuple(self._turns[speaker.name]))

    def _one(self) -> list[Written]:
        speaker, began_s = self.speakers[0], time.monotonic()
        answering = speaker.stream(self._conversation(speaker), self.sampling, self._asked)
        waiting = self.told.status(f"{speaker.name} writes") if self.told.is_terminal else contextlib.nullcontext()
        try:
            with waiting:
                pieces = iter(answering)
                piece = next(pieces, None)
            while piece is not None:
                self.out.file.write(piece)
                self.out.file.flush()
                piece = next(pieces, None)
        except KeyboardInterrupt:
            answering.close()
        self.out.file.write("\n")
        self.out.file.flush()
        made = _made(answering)
        self.told.print(f"[dim]{_told(made, time.monotonic() - began_s)}[/]")
        return [made]

    def _side_by_side(self) -> list[Written]:
        texts = {speaker.name: "" for speaker in self.speakers}
        found: list[Written] = []
        live = Live(console=self.out, auto_refresh=False, vertical_overflow="visible") if self.out.is_terminal else None
        with live or contextlib.nullcontext():
            for speaker in self.speakers:
                answering = speaker.stream(self._conversation(speaker), self.sampling, self._asked)
                try:
                    for piece in answering:
                        texts[speaker.name] += piece
                        if live is not None:
                            live.update(columns(texts, found), refresh=True)
                except KeyboardInterrupt:
                    answering.close()
                found.append(_made(answering))
            if live is not None:
                live.update(columns(texts, found), refresh=True)
        if live is None:
            self.out.print(columns(texts, found))
        return found


def columns(texts: dict[str, str], found: Sequence[Written]) -> Table:
    """A column per speaker with its text, and below it what is said of those that are `found`."""
    table = Table(expand=True, show_lines=True)
    for name in texts:
        table.add_column(escape(name), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts.values()))
    if found:
        table.add_row(*(Text(_told(one), style="dim") for one in found), *[""] * (len(texts) - len(found)))
    return table


def _made(answering: Answering) -> Written:
    return answering.written or Written("", (), 0, "stopped")


def _told(made: Written, seconds: float | None = None) -> str:
    """What is said below an answer."""
    ended = {"stop": "", "length": ", cut off at --max-new-tokens", "stopped": ", stopped"}[made.finish]
    speed = "" if seconds is None else f", {made.tokens / max(seconds, 1e-9):,.1f} tok/s"
    return f"{made.tokens:,} tokens{speed}{ended}"
