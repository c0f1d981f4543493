"""A file of prompts: plain lines, or rows in any format that training reads, with or without their answers.

In: a path; out: conversations to be answered, each with its place. A row's own last answer is left out: it is what the model is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from student_trainer.data.rows.files import READERS, suffix_of
from student_trainer.data.rows.formats import ANSWERS, Conversation, Row, Turn, read_rows
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.sources import DataSource, local_path, parse_source, read_source
from student_trainer.errors import DataError

_ASKED = ("instruction", "prompt", "query", "question")
_LISTS = ("messages", "conversations", "conversation")
_FILLED = "?"  # stands for the answer while a row is read by a format that wants one


@dataclass(frozen=True)
class FilePrompt:
    """One prompt of a file.

    Attributes:
        key: "file:line".
        conversation: to be answered; its last turn is the user's or a tool's.
    """

    key: str
    conversation: Conversation


def read_prompts(path: str, system: str = "", format_name: str = "auto") -> list[FilePrompt]:
    """The prompts of a file, in order.

    Args:
        path: a file of rows (`path#N` for a sample of N), or of plain text, whose lines are prompts; empty lines are none.
        system: put before prompts that have no system turn of their own; "" for none.
        format_name: a key of `data.rows.formats.FORMATS`, or "auto".

    Raises:
        DataError: naming file, line and field.
    """
    source = parse_source(path, format_name)
    file = local_path(source.path)
    if file.is_file() and suffix_of(file) not in READERS:
        if source.sample is not None:
            raise DataError("a sample (#N) is taken of rows; this file has plain lines", file=path)
        return _plain(source, system)
    return prompts_of(source, system)


def prompts_of(source: DataSource, system: str = "") -> list[FilePrompt]:
    """The questions of a source of rows, in order; as `read_prompts`."""
    rows = [_with_answer(row) for row in read_source(source)]
    return [_without_answer(*pair) for pair in read_rows(rows, source.format, system, Intake(), source.path)[1]]


def _plain(source: DataSource, system: str) -> list[FilePrompt]:
    try:
        text = local_path(source.path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=source.path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", file=source.path) from error
    before = (Turn("system", system),) if system else ()
    found = [
        FilePrompt(f"{source.path}:{line}", Conversation((*before, Turn("user", prompt.rstrip("\r")))))
        for line, prompt in enumerate(text.split("\n"), start=1)
        if prompt.strip()
    ]
    if not found:
        raise DataError("holds no prompt: every line is empty", file=source.path)
    return found


def _with_answer(row: Row) -> Row:
    """The row with something in the place of an answer that it does not have, so that the readers of training rows take it."""
    fields = dict(row.fields)
    for name in _LISTS:
        turns = fields.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            last = turns[-1]
            if "from" in last and last["from"] not in ("gpt", "assistant", "chatgpt", "bot", "model"):
                fields[name] = [*turns, {"from": "gpt", "value": _FILLED}]
            elif "from" not in last and last.get("role") != "assistant":
                fields[name] = [*turns, {"role": "assistant", "content": _FILLED}]
            return replace(row, fields=fields)
    asked = next((name for name in _ASKED if fields.get(name) is not None), None)
    if asked is not None and not any(_there(fields.get(name)) for name in ANSWERS):
        for name in ANSWERS:
            fields.pop(name, None)
        fields["output" if asked == "instruction" else "completion"] = _FILLED
    return replace(row, fields=fields)


def _there(value: Any) -> bool:
    return value is not None and value not in ("", [])


def _without_answer(row: Row, conversation: Conversation) -> FilePrompt:
    turns = conversation.turns[:-1]
    if not turns or turns[-1].role not in ("user", "tool"):
        raise row.error("the turn before the answer must be the user's or a tool's", "messages")
    return FilePrompt(row.key, replace(conversation, turns=turns))
