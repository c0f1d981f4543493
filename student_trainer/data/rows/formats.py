"""Rows as people write them, turned into conversations.

In: one row (a JSON object) with its place. Out: a `Conversation` that ends with the assistant.
Must never guess: a missing, mistyped or unsupported field is a `DataError` naming file, line and field. Shapes: docs/data/rows.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from student_trainer.data.rows.conversations import ROLES, Conversation, Row, Turn
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.meaning import MEANING, is_preference, not_learned_here, why_refused
from student_trainer.data.rows.messages import (
    checked_text,
    checked_tree,
    from_json,
    is_empty,
    read_history,
    read_messages,
    read_tools,
    reasoning_of,
    type_name,
    unused_fields,
    weight_of,
)
from student_trainer.errors import DataError

__all__ = [
    "ANSWERS", "FORMATS", "MEANING", "ROLES", "Conversation", "Format", "ParsedRow", "Row", "Turn", "detect", "known_fields", "parse_rows",
    "read_rows",
]  # fmt: skip

ANSWERS = ("output", "response", "completion", "answer")  # what an answer is called beside a question
_USUAL_ANSWER = {"instruction": "output", "prompt": "completion", "query": "response", "question": "answer"}
_SYSTEM = ("system", "system_prompt")
_BESIDE = ("tools", "functions", "weight", "chat_template_kwargs")  # beside every conversation
_REASONING = ("reasoning_content", "thinking", "reasoning")
# template_kwargs that are this trainer's own to say.
_RESERVED = (
    "messages",
    "conversation",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
)

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """One way of writing rows.

    Attributes:
        fits: whether a row with these fields is of this format.
        shown: what `fits` looks for, in words.
        parse: row and the config's system prompt ("" for none) -> conversation.
        uses: every field that `parse` reads.
        lists: those of them that hold messages.
    """

    fits: Callable[[Fields], bool]
    shown: str
    parse: Callable[[Row, str], Conversation]
    uses: frozenset[str]
    lists: tuple[str, ...] = ()


class ParsedRow(NamedTuple):
    """A row and the conversation made of it."""

    row: Row
    conversation: Conversation


def parse_asked(row: Row, system_prompt: str, *, asks: str) -> Conversation:
    """A question and its answer: `{instruction, input, output}`, `{prompt, completion}`, `{query, response}`, `{question, answer}`.

    The answer goes by any name of `ANSWERS`, and only one of them. `input` (or `context`) belongs to an instruction: the user's turn is
    instruction, newline, input. `prompt` and the answer may be lists of messages; the assistant's turns of such a prompt
    are context, which is not trained. `history` stands before all of it.
    """
    turns = [] if is_empty(row.fields.get("history")) else read_history(row, row.fields["history"])
    asked = row.fields.get(asks)
    if isinstance(asked, Sequence) and not isinstance(asked, str):
        if turns:
            raise row.error(f"stands beside a {asks} of messages, which holds the turns before it", "history")
        for turn in read_messages(row, asked, asks):
            turns.append(replace(turn, loss_weight=0.0) if turn.role == "assistant" else turn)
    else:
        turns.append(Turn("user", _asked_text(row, asks)))
    name = _answer_name(row, asks)
    return _conversation(row, [*turns, *_answer(row, name)], system_prompt, name)


def parse_messages(row: Row, system_prompt: str, *, names: tuple[str, ...]) -> Conversation:
    """A list of messages: `{messages: [{role, content}, ...]}`, or ShareGPT's `{conversations: [{from, value}, ...]}`.

    A system turn of the row's own stands before the config's prompt.
    """
    name = next((name for name in names if row.fields.get(name) is not None), names[0])
    return _conversation(row, read_messages(row, row.fields.get(name), name), system_prompt, name)


def parse_trace(row: Row, system_prompt: str) -> Conversation:
    """`{conversation, trace, answer, source}` of `student-trainer traces`, as the question and its answer alone.

    `trace_rows` makes the tasks of it. The answer is the known one, else that of the trace.
    """
    asked = read_messages(row, row.fields.get("conversation"), "conversation")
    if not asked or asked[-1].role != "user":
        raise row.error(
            "must be a list of messages, and the last message must be the user's",
            "conversation",
            asked[-1].role if asked else None,
        )
    trace = row.fields.get("trace")
    if row.fields.get("answer") is not None:
        answer = checked_text(row, row.fields["answer"], "answer").strip()
    elif isinstance(trace, Mapping) and isinstance(trace.get("answer"), Mapping):
        answer = checked_text(row, trace["answer"].get("text"), "trace.answer.text").strip()
    else:
        raise row.error("neither an answer nor a trace", "answer")
    before = () if asked[0].role == "system" else _system(system_prompt)
    return Conversation((*before, *asked, Turn("assistant", answer)))


def _has(*names: str) -> Callable[[Fields], bool]:
    return lambda fields: any(fields.get(name) is not None for name in names)


def _asks(name: str, *, alone: bool = False) -> Format:
    """The format of questions called `name`; `alone`: recognised without an answer, whose absence is then named."""
    used = {
        name,
        *ANSWERS,
        *_SYSTEM,
        *_BESIDE,
        *_REASONING,
        "history",
        *(("input", "context") if name == "instruction" else ()),
    }
    return Format(
        fits=lambda fields: fields.get(name) is not None and (alone or any(fields.get(answer) is not None for answer in ANSWERS)),
        shown=f"'{name}'" + ("" if alone else f" with one of {', '.join(ANSWERS)}"),
        parse=partial(parse_asked, asks=name),
        uses=frozenset(used),
        lists=("history",) if name != "prompt" else (name, "history", *ANSWERS),
    )  # fmt: skip


def _listed(*names: str, fits: Callable[[Fields], bool]) -> Format:
    """The format of conversations as lists of messages, under any of `names`."""
    used = frozenset({*names, *_SYSTEM, *_BESIDE})
    return Format(fits, " or ".join(f"'{name}'" for name in names), partial(parse_messages, names=names), used, names)


def _is_trace(fields: Fields) -> bool:
    return "trace" in fields and "conversation" in fields


# A new format is one parser and one line here.
FORMATS: dict[str, Format] = {
    "instruction": _asks("instruction", alone=True),
    "messages": _listed("messages", fits=_has("messages")),
    "sharegpt": _listed("conversations", "conversation", fits=lambda fields: not _is_trace(fields) and _has("conversations", "conversation")(fields)),
    "prompt_completion": _asks("prompt"),
    "query_response": _asks("query"),
    "question_answer": _asks("question"),
    "trace": Format(_is_trace, "'conversation' and 'trace'", parse_trace, frozenset({"conversation", "trace", "answer", "source"}), ("conversation",)),
}  # fmt: skip


def known_fields() -> frozenset[str]:
    """Every field that some format reads: what `columns` can map to."""
    return frozenset().union(*(form.uses for form in FORMATS.values()))


def parse_rows(rows: Sequence[Row], format_name: str = "auto", system_prompt: str = "") -> list[Conversation]:
    """The conversations of one source's rows, in order; `read_rows` where the first bad row ends the reading."""
    return [parsed.conversation for parsed in read_rows(rows, format_name, system_prompt, Intake())[1]]


def read_rows(
    rows: Sequence[Row], format_name: str, system_prompt: str, intake: Intake, path: str = ""
) -> tuple[str, list[ParsedRow]]:
    """The format of one source's rows, and those of them that are good, in order.

    Args:
        format_name: a key of `FORMATS`, or "auto" to recognise it by the first row that fits one.
        system_prompt: put before conversations that have no system turn; "" for none.
        intake: takes bad rows and is told what the source holds.
        path: the source as the config names it.
    Raises:
        DataError: an unknown format, a source without a good row, or, where `intake` refuses bad rows, any of them.
    """
    if not rows:
        return format_name, []
    if format_name != "auto" and format_name not in FORMATS:
        raise DataError(f"unknown format; known: auto, {', '.join(FORMATS)}", field="format", value=format_name)
    name = _detect_any(rows, intake) if format_name == "auto" else format_name
    good: list[ParsedRow] = []
    unused: set[str] = set()
    before = len(intake.bad)
    for row in rows:
        try:
            conversation = _parse(row, name, rows[0].line, system_prompt, chosen=format_name != "auto")
        except DataError as error:
            intake.leave_out(error, row.fields)
        else:
            good.append(ParsedRow(row, conversation))
            unused.update(_unused(row, FORMATS[name]))
    if not good:
        raise intake.all_bad(path or rows[0].file, intake.bad[before:])
    intake.found(path or rows[0].file, [one.row for one in good], name, unused)
    return name, good


def detect(row: Row) -> str:
    """The name of the one format that `row` fits.

    Raises:
        DataError: none does, or more than one.
    """
    names = _fitting(row)
    if len(names) == 1:
        return names[0]
    if not names and (told := not_learned_here(row.fields)):
        raise row.error(told, value=sorted(row.fields))
    found = f"fits more than one format ({', '.join(names)})" if names else "fits no format"
    known = ", ".join(f"{name} (has {form.shown})" for name, form in FORMATS.items())
    way_out = (
        "set `format` to one of" if names else "name its fields with `columns: {theirs: ours}`, or set `format`; known"
    )
    raise row.error(f"the row {found}; {way_out}: {known}", value=sorted(row.fields))


def _detect_any(rows: Sequence[Row], intake: Intake) -> str:
    """The format of the first row that fits one; the error of the first row if none does or bad rows are refused."""
    first: DataError | None = None
    for row in rows:
        try:
            return detect(row)
        except DataError as error:
            first = first or error
            if intake.policy == "refuse":
                break
    assert first is not None
    raise first


def _parse(row: Row, name: str, since: int, system_prompt: str, *, chosen: bool) -> Conversation:
    """The row's conversation; `chosen`: the config names the format, so that what marks others is no part of the row."""
    form = FORMATS[name]
    others = [other for other in _fitting(row) if other != name]
    if others and not form.fits(row.fields):
        raise row.error(f"a row of format {others[0]} in a source of format {name} (since line {since})")
    if others and not chosen:
        raise row.error(
            f"the row fits more than one format ({name}, {', '.join(others)}); set `format`", value=sorted(row.fields)
        )
    if is_preference(row.fields):
        raise row.error(not_learned_here(row.fields), value=sorted(row.fields))
    for field, value in row.fields.items():
        if field in form.uses or field in row.beside or is_empty(value) or not isinstance(field, str):
            continue
        if why := why_refused(field, value):
            own = row.renamed.get(field, field)
            raise row.error(f"is not used: {why}; to leave it out all the same: columns: {{{own}: null}}", field, value)
    if not form.fits(row.fields) and (told := not_learned_here(row.fields)):
        raise row.error(told, value=sorted(row.fields))
    return form.parse(row, system_prompt)


def _fitting(row: Row) -> list[str]:
    return [name for name, form in FORMATS.items() if form.fits(row.fields)]


def _unused(row: Row, form: Format) -> Iterable[str]:
    """Fields of the row and of its messages that are neither used nor refused."""
    for name, value in row.fields.items():
        if name not in form.uses and name not in row.beside and not is_empty(value):
            yield str(name)
    for name in form.lists:
        value = row.fields.get(name)
        if not isinstance(value, str):
            yield from (f"{name}[].{field}" for field in unused_fields(value))


def _asked_text(row: Row, asks: str) -> str:
    """The user's turn: the question, and below an instruction its input."""
    extras = [name for name in ("input", "context") if asks == "instruction" and not is_empty(row.fields.get(name))]
    if len(extras) > 1:
        raise row.error("stands beside input, which says the same", "context", row.fields["context"])
    extra = checked_text(row, row.fields[extras[0]], extras[0]) if extras else ""
    question = _field(row, asks, empty_ok=bool(extra))
    return f"{question}\n{extra}" if extra and question.strip() else extra or question


def _answer_name(row: Row, asks: str) -> str:
    """Which field holds the answer; where there is none, the one that is usual beside `asks`."""
    given = [name for name in ANSWERS if not is_empty(row.fields.get(name))] or [
        name for name in ANSWERS if name in row.fields
    ]
    if len(given) > 1:
        raise row.error(
            f"the row has more than one answer ({', '.join(given)}); leave out the others: columns: {{{given[1]}: null}}",
            given[1],
        )
    return given[0] if given else _USUAL_ANSWER[asks]


def _answer(row: Row, name: str) -> list[Turn]:
    reasoning = reasoning_of(row, row.fields)
    value = row.fields.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if reasoning:
            raise row.error(f"stands beside {name}, whose messages have their own", next(iter(reasoning)))
        return read_messages(row, value, name)
    return [Turn("assistant", _field(row, name), extra=reasoning)]


def _conversation(row: Row, turns: list[Turn], system_prompt: str, name: str) -> Conversation:
    """Turns with what stands beside them in the row.

    Raises:
        DataError: there is nothing to ask or nothing to train.
    """
    turns = [*_own_system(row, turns, system_prompt), *turns]
    if not turns or turns[-1].role != "assistant":
        last = turns[-1].role if turns else None
        raise row.error("the last message must be the assistant's", name, last)
    if all(turn.role not in ("user", "tool") for turn in turns):
        raise row.error("there is no user message", name)
    if any(turn.role == "system" for turn in turns[1:]):
        raise row.error("a system message must be the first one", name)
    if not is_empty(row.fields.get("weight")):
        weight = weight_of(row, row.fields["weight"], "weight")
        turns = [
            replace(turn, loss_weight=turn.loss_weight * weight) if turn.role == "assistant" else turn for turn in turns
        ]
    if not any(turn.loss_weight > 0 for turn in turns if turn.role == "assistant"):
        field = "weight" if "weight" in row.fields else name
        raise row.error(
            "nothing to train: every answer has weight 0; leave the row out, or set data.bad_rows=skip", field
        )
    return Conversation(tuple(turns), _tools(row), _template_kwargs(row))


def _own_system(row: Row, turns: Sequence[Turn], system_prompt: str) -> tuple[Turn, ...]:
    """The system turn to put before `turns`: the row's own field, else the config's where the turns have none."""
    given = [name for name in _SYSTEM if not is_empty(row.fields.get(name))]
    if len({repr(row.fields[name]) for name in given}) > 1:
        raise row.error(f"{' and '.join(given)} say different things", given[1])
    own = checked_text(row, row.fields[given[0]], given[0]) if given else ""
    if turns and turns[0].role == "system":
        if own and own != turns[0].content:
            raise row.error("stands beside a system message that says something else", given[0], own)
        return ()
    return _system(own or system_prompt)


def _tools(row: Row) -> tuple[Fields, ...]:
    given = [name for name in ("tools", "functions") if not is_empty(row.fields.get(name))]
    if len(given) > 1:
        raise row.error("stands beside tools, which says the same", "functions")
    return read_tools(row, row.fields[given[0]], given[0]) if given else ()


def _template_kwargs(row: Row) -> Fields:
    name = "chat_template_kwargs"
    value = row.fields.get(name)
    if is_empty(value):
        return {}
    if isinstance(value, str):
        value = from_json(row, value, name)
    if not isinstance(value, Mapping):
        raise row.error(f"must be an object, or the JSON text of one, not {type_name(value)}", name, value)
    for key in value:
        if key in _RESERVED:
            raise row.error("is said by this trainer itself, not by a row", f"{name}.{key}", value[key])
    tree: dict[str, Any] = checked_tree(row, value, name)
    return tree


def _system(prompt: str) -> tuple[Turn, ...]:
    return (Turn("system", prompt),) if prompt else ()


def _field(row: Row, name: str, *, empty_ok: bool = False) -> str:
    if name not in row.fields:
        raise row.error("missing field", name)
    return checked_text(row, row.fields[name], name, empty_ok=empty_ok)
