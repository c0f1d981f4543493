"""Rows as people write them, turned into conversations.

In: one row (a JSON object) with its place. Out: a `Conversation` that ends with the assistant.
Must never guess: a missing, mistyped or unsupported field is a `DataError` naming file, line and field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from student_trainer.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One JSON object and where it stands.

    Attributes:
        fields: the object.
        file: the source as the config names it.
        line: line from 1 (JSONL), or position from 1 (JSON list, `datasets`).
    """

    fields: Mapping[str, Any]
    file: str
    line: int

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, message: str, field: str = "", value: object = None) -> DataError:
        """A `DataError` at this row; to be raised by the caller."""
        return DataError(message, file=self.file, line=self.line, field=field, value=value)


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Attributes:
        role: one of `ROLES`.
        content: the text; "" only where `extra` says the rest (an assistant that calls tools).
        weights: (characters, weight of their loss) all along the content; empty: `loss_weight` everywhere.
        loss_weight: of an assistant turn's loss; 0 makes it context that is not trained.
        extra: further fields of the message as chat templates read them: `reasoning_content`, `tool_calls`, `name`, `tool_call_id`.
    """

    role: str
    content: str
    weights: tuple[tuple[int, float], ...] = ()
    loss_weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a chat template takes it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Conversation:
    """Turns in order: an optional system turn first, the last one the assistant's.

    Attributes:
        tools: JSON schemas of the tools on offer, as chat templates take them.
        template_kwargs: further variables of the chat template, such as `enable_thinking`; a row's own stand before the config's.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """One way of writing rows.

    Attributes:
        marker: the field by which a row of this format is recognised.
        parse: row and the config's system prompt ("" for none) -> conversation.
    """

    marker: str
    parse: Callable[[Row, str], Conversation]


def parse_instruction(row: Row, system_prompt: str) -> Conversation:
    """`{instruction, input, output}`; `input` may be absent, null or empty. User turn: instruction, newline, input."""
    for field in ("history", "system"):  # other tools' extensions: dropping them would change the question
        if row.fields.get(field):
            raise row.error("not supported in the instruction format; write the row as messages", field)
    instruction = _text(row, row.fields, "instruction")
    extra = _text(row, row.fields, "input", empty_ok=True) if row.fields.get("input") is not None else ""
    output = _text(row, row.fields, "output")
    user = f"{instruction}\n{extra}" if extra else instruction
    return Conversation((*_system(system_prompt), Turn("user", user), Turn("assistant", output)))


def parse_messages(row: Row, system_prompt: str) -> Conversation:
    """`{messages: [{role, content}, ...]}`; a system turn of the row's own stands before the config's prompt."""
    messages = row.fields.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise row.error(f"must be a list of messages, not {_type_name(messages)}", "messages")
    turns = [_turn(row, message, f"messages[{i}]", first=i == 0) for i, message in enumerate(messages)]
    if not turns or turns[-1].role != "assistant":
        last = turns[-1].role if turns else None
        raise row.error("the last message must be the assistant's", "messages", last)
    if all(turn.role != "user" for turn in turns):
        raise row.error("there is no user message", "messages")
    return Conversation((*(() if turns[0].role == "system" else _system(system_prompt)), *turns))


def parse_trace(row: Row, system_prompt: str) -> Conversation:
    """`{conversation, trace, answer, source}` of `student-trainer traces`, as the question and its answer alone.

    `trace_rows` makes the tasks of it. The answer is the known one, else that of the trace.
    """
    turns = row.fields.get("conversation")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise row.error("must be a list of messages", "conversation")
    asked = [_turn(row, message, f"conversation[{i}]", first=i == 0) for i, message in enumerate(turns)]
    if asked[-1].role != "user":
        raise row.error("the last message must be the user's", "conversation", asked[-1].role)
    trace = row.fields.get("trace")
    if row.fields.get("answer") is not None:
        answer = _text(row, row.fields, "answer").strip()
    elif isinstance(trace, Mapping) and isinstance(trace.get("answer"), Mapping):
        answer = _text(row, trace["answer"], "text", "trace.answer").strip()
    else:
        raise row.error("neither an answer nor a trace", "answer")
    before = () if asked[0].role == "system" else _system(system_prompt)
    return Conversation((*before, *asked, Turn("assistant", answer)))


# A new format is one parser and one line here.
FORMATS: dict[str, Format] = {
    "instruction": Format("instruction", parse_instruction),
    "messages": Format("messages", parse_messages),
    "trace": Format("trace", parse_trace),
}


def parse_rows(rows: Sequence[Row], format_name: str = "auto", system_prompt: str = "") -> list[Conversation]:
    """The conversations of one source's rows, in order.

    Args:
        format_name: a key of `FORMATS`, or "auto" to recognise it by the first row.
        system_prompt: put before conversations that have no system turn; "" for none.
    Raises:
        DataError: an unknown format, a row of another format than the first, or any rule of the format broken.
    """
    if not rows:
        return []
    name = detect(rows[0]) if format_name == "auto" else format_name
    if name not in FORMATS:
        raise DataError(f"unknown format; known: auto, {', '.join(FORMATS)}", field="format", value=name)
    conversations = []
    for row in rows:
        if FORMATS[name].marker not in row.fields and (others := _marked(row)):
            raise row.error(f"a row of format {others[0]} in a source of format {name} (since line {rows[0].line})")
        conversations.append(FORMATS[name].parse(row, system_prompt))
    return conversations


def detect(row: Row) -> str:
    """The name of the one format whose marker `row` has.

    Raises:
        DataError: none fits, or more than one.
    """
    names = _marked(row)
    if len(names) != 1:
        found = "fits more than one format" if names else "fits no format"
        known = ", ".join(f"{name} (has '{form.marker}')" for name, form in FORMATS.items())
        raise row.error(f"the row {found}; set `format` to one of: {known}", value=sorted(row.fields))
    return names[0]


def _marked(row: Row) -> list[str]:
    return [name for name, form in FORMATS.items() if form.marker in row.fields]


def _system(prompt: str) -> tuple[Turn, ...]:
    return (Turn("system", prompt),) if prompt else ()


def _turn(row: Row, message: object, where: str, *, first: bool) -> Turn:
    if not isinstance(message, Mapping):
        raise row.error(f"must be an object with role and content, not {_type_name(message)}", where)
    for name, value in message.items():  # tool calls, weights, names: to ignore them would change what is taught
        if name not in ("role", "content") and value is not None:
            raise row.error("not supported in a message, which has only role and content", f"{where}.{name}")
    role = _text(row, message, "role", where)
    if role not in ROLES:
        raise row.error(f"unknown role; known: {', '.join(ROLES)}", f"{where}.role", role)
    if role == "system" and not first:
        raise row.error("a system message must be the first one", f"{where}.role", role)
    return Turn(role, _text(row, message, "content", where))


def _text(row: Row, fields: Mapping[str, Any], name: str, inside: str = "", *, empty_ok: bool = False) -> str:
    """The string `fields[name]`, refused if missing, mistyped, blank or not expressible in UTF-8."""
    where = f"{inside}.{name}" if inside else name
    if name not in fields:
        raise row.error("missing field", where)
    value = fields[name]
    if not isinstance(value, str):
        raise row.error(f"must be a string, not {_type_name(value)}", where, value)
    if not empty_ok and not value.strip():
        raise row.error("must not be empty", where, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise row.error("holds half of a surrogate pair, which UTF-8 cannot express", where, value) from error
    return value


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
