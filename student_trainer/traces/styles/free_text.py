"""Free text as a draft: reasoning in `<think>` tags or plain lines, then one answer.

In: text; out: a `Draft`. Lines of the reasoning are steps; what stands in double quotation marks, or as `[ev: "..."]`, is quoted from the prompt
and is checked as any evidence. It guesses nothing: a text that leaves open where the reasoning ends or what the answer is, is refused.
Every pattern is matched within one line and bounded, so that no text takes long to read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from student_trainer.data.trace_schema import MAX_TEXT_BYTES, TraceError
from student_trainer.traces.answers import same_answer
from student_trainer.traces.styles.draft import Draft, Reading, Span, WrittenStep, draft_of

# "Answer: 12", "**Final answer:** 12", "So the answer is 12.", "#### 12"
_ANSWER = re.compile(
    r"[ \t>*_#-]{0,12}(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct |short )?answer[ \t*_]{0,4}(?:is[ \t*_]{0,4}:?|:|=)[ \t*_]{0,4}",
    re.IGNORECASE,
)
_MARKED = re.compile(r"[ \t]{0,12}####[ \t]{0,4}(?=\S)")
_TAGGED = re.compile(r"[ \t]{0,12}<answer>[ \t]{0,4}", re.IGNORECASE)
_TAGGED_END = re.compile(r"[ \t]{0,4}</answer>[ \t]{0,12}\Z", re.IGNORECASE)
_BOXED = re.compile(r"\\f?box(?:ed)?\s{0,4}\{")
_ENUMERATED = re.compile(
    r"[ \t>]{0,12}(?:[-*•]|\(?\d{1,3}[.)]|(?:\*\*)?step \d{1,3}(?:\*\*)?[:.)](?:\*\*)?)[ \t]{1,12}", re.IGNORECASE
)
_EVIDENCE = re.compile(r"[ \t]{0,4}\[ev: ?((?:\"[^\"\n]{1,1024}\"(?:, ?)?){1,64})\][ \t]{0,4}\Z")
_QUOTED = re.compile(r"(?<!\w)\"([^\s\"](?:[^\"\n]{0,1022}[^\s\"])?)\"(?!\w)|“([^“”\n]{1,1024})”")

_MAX_ANSWERS = 64
_MAX_LINES = 4_096  # that are not blank


@dataclass(frozen=True)
class _Line:
    """A line of the text that is not blank: without the white space around it, and where that begins."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class _Stated:
    """An answer: its text, where that stands, and where the line begins that announces it."""

    text: str
    place: Span
    line_start: int


def read_free(text: str, reading: Reading) -> Draft:
    """The draft that a free text is.

    Raises:
        TraceError: too_long, nul; broken_form: tags that are not one pair, no steps, control tokens; no_answer: none, or two that differ.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise TraceError("too_long", f"{len(text)} characters, limit {MAX_TEXT_BYTES}")
    if "\0" in text:
        raise TraceError("nul", f"at character {text.index(chr(0))}")
    if sum(1 for line in text.split("\n") if line.strip()) > _MAX_LINES:
        raise TraceError("too_long", f"more than {_MAX_LINES} lines")
    tags = reading.tags
    for control in reading.control:
        if control not in (tags.open, tags.close) and control in text:
            raise TraceError("broken_form", f"holds the control token {control}")
    thought = _thought(text, tags.open, tags.close)
    after = thought[1] + len(tags.close) if thought else 0
    lines = list(_lines(text, after, len(text)))
    answers = _answers(lines)
    if thought and not answers and len(lines) == 1:  # the one line behind the reasoning
        answers = [_Stated(lines[0].text, (lines[0].start, lines[0].end), lines[0].start)]
    _check_agreement(answers)
    steps = [_step(line) for line in _lines(text, *(thought or (0, answers[0].line_start)))]
    steps = [step for step in steps if any(character.isalnum() for character in step.text)]
    if not steps:
        raise TraceError("broken_form", "no steps before the answer")
    return draft_of(steps, answers[-1].text, answers[-1].place)


def stated_part(text: str, reading: Reading) -> str | None:
    """Of a text that ran out of tokens the lines that are whole, if they are a draft whose answer a line announces; None if not.

    What follows an answer is no part of a trace, so that a teacher that goes on behind it has said all that is learned. Neither a box nor the first line behind
    the reasoning announces one: a later line might have held another.
    """
    part = text[: text.rfind("\n") + 1]
    closed = part.find(reading.tags.close)
    lines = _lines(part, closed + len(reading.tags.close) if closed >= 0 else 0, len(part))
    if not any(_marker(line) for line in lines):
        return None
    try:
        read_free(part, reading)
    except TraceError:
        return None
    return part


def _check_agreement(answers: list[_Stated]) -> None:
    if not answers:
        raise TraceError("no_answer", "no line says 'Answer: ...'")
    if len(answers) > _MAX_ANSWERS:
        raise TraceError("no_answer", f"{len(answers)} answers")
    for stated in answers[:-1]:
        if not same_answer(stated.text, answers[-1].text):
            raise TraceError("no_answer", f"two answers: {stated.text[:60]!r} and {answers[-1].text[:60]!r}")


def _thought(text: str, opened: str, closed: str) -> Span | None:
    """Where the inside of the tags is; None if there are none. The opening one may be the prompt's."""
    opens, closes = text.count(opened), text.count(closed)
    if not opens and not closes:
        return None
    if opens > 1 or closes > 1:
        raise TraceError("broken_form", f"{opens} times {opened} and {closes} times {closed}")
    if not closes:
        raise TraceError("broken_form", f"{opened} is never closed")
    end = text.index(closed)
    if not opens:
        return 0, end
    start = text.index(opened)
    if start > end:
        raise TraceError("broken_form", f"{closed} before {opened}")
    if text[:start].strip():
        raise TraceError("broken_form", f"text before {opened}")
    return start + len(opened), end


def _lines(text: str, start: int, end: int) -> Iterator[_Line]:
    at = start
    for line in text[start:end].split("\n"):
        bare = line.strip()
        if bare:
            yield _Line(bare, at + line.index(bare))
        at += len(line) + 1


def _answers(lines: list[_Line]) -> list[_Stated]:
    """Every answer that a line states."""
    found = []
    for number, line in enumerate(lines):
        marker = _marker(line)
        if marker is None:
            boxed = _boxed(line)
            found += [boxed] if boxed else []
            continue
        body = _Line(line.text[marker.end() :], line.start + marker.end())
        if not body.text.strip("*_ ") and number + 1 < len(lines) and not _marker(lines[number + 1]):
            body = lines[number + 1]  # behind "Answer:" on a line of its own
        stated = _TAGGED_END.sub("", body.text)
        if stated.endswith("**") and stated.count("**") == 1:  # **Answer: 12**
            stated = stated.removesuffix("**").rstrip()
        if stated.strip("*_ "):
            found.append(_Stated(stated, (body.start, body.start + len(stated)), line.start))
    return found


def _marker(line: _Line) -> re.Match[str] | None:
    return _ANSWER.match(line.text) or _MARKED.match(line.text) or _TAGGED.match(line.text)


def _boxed(line: _Line) -> _Stated | None:
    """The last `\\boxed{...}` of a line, as it stands there; braces that do not close in it box nothing."""
    opened = list(_BOXED.finditer(line.text))
    if not opened:
        return None
    depth, at = 1, opened[-1].end()
    while at < len(line.text) and depth:
        depth += {"{": 1, "}": -1}.get(line.text[at], 0)
        at += 1
    if depth:
        return None
    start = opened[-1].start()
    return _Stated(line.text[start:at], (line.start + start, line.start + at), line.start)


def _step(line: _Line) -> WrittenStep:
    """A line without its number or bullet; its quotes."""
    skipped = _ENUMERATED.match(line.text)
    start = skipped.end() if skipped else 0
    body, named = line.text[start:], ()
    if evidence := _EVIDENCE.search(body):
        named = tuple(re.findall(r"\"([^\"\n]+)\"", evidence[1]))
        body = body[: evidence.start()]
    quotes = tuple(one or other for one, other in _QUOTED.findall(body))
    place = line.start + start, line.start + start + len(body)
    return WrittenStep(body, tuple(dict.fromkeys((*named, *quotes))), place)
