"""Rows of Tokenize in a teacher's tokens: prompts as its chat template writes them, answers byte for byte.

In: `TextRow`s and the teacher's `TokenizerFiles`; out: a `TokenizedRow` for each, or why it cannot be had. The rules are those of
teacher.proto (tokenize); those of the student for its own rows are the same (student_trainer/data/text/encoding.py).

Axes: C tokens behind a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from teacher_server.tokenizing.files import TokenizerFiles
from teacher_server.tokenizing.rendering import OWN_VARIABLES, reads, render
from teacher_wire.tokenizing.messages import TextRow, TokenizedRow
from teacher_wire.vocabulary.byte_table import END, TEXT, ByteTable
from teacher_wire.vocabulary.tokenizer_file import byte_table, control_contents

_KEYS = ("messages", "tools", "template_kwargs", "day", "prompt")
_NEUTRAL = (
    "\n.:a1 "  # characters to tokenise a text behind; the first that no merge of the tokenizer joins to it is taken
)
_MOST = 16  # a prompt may be so many times as long as its conversation, and 64 KiB longer
_REASON_CHARS = 300


class _RefusedError(Exception):
    """A row that cannot be had; says why."""


@dataclass(frozen=True)
class _Asked:
    """A conversation as it was parsed."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    variables: dict[str, Any]
    day: date | None
    prompt: str | None


class RowReader:
    """Reads rows with one tokenizer.

    Args:
        files: of the teacher.
        table: its byte table; made of the files if not given.

    Raises:
        CapabilityError: the tokenizer does not say which bytes its tokens stand for.
    """

    def __init__(self, files: TokenizerFiles, table: ByteTable | None = None) -> None:
        self._files = files
        self.table = table or table_of(files)
        self._tokenizer: Any = Tokenizer.from_str(files.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._controls = control_contents(files.tokenizer_json, self.table)
        self._neutral = {character: self._ids(character) for character in _NEUTRAL}
        self._of_role: dict[int, str] = {}
        for content, token_id in self._controls.items():
            self._of_role.setdefault(int(self.table.role_V[token_id]), content)

    def row(self, row: TextRow) -> TokenizedRow:
        """One row; `refused` says why it cannot be had."""
        try:
            return self._row(row)
        except _RefusedError as refused:
            return TokenizedRow.refusal(str(refused)[:_REASON_CHARS])

    def _row(self, row: TextRow) -> TokenizedRow:
        text = _utf8(row.text, "the text")
        if not row.conversation:
            ids = self._marked("", [], text, row.marks)
            return self._made([], ids, ended=False)
        asked = self._parsed(row.conversation)
        prompt, first, end = self._prompt(asked)
        _check_encodes(prompt)
        if len(prompt) > _MOST * len(row.conversation) + (64 << 10):
            raise _RefusedError(f"the chat template makes {len(prompt)} characters of {len(row.conversation)} bytes")
        prompt_ids = self._ids(prompt)
        ids = self._marked(prompt, prompt_ids, text, row.marks)
        if end:
            ids.append(self._controls[end] if end in self._controls else self._tokenizer.token_to_id(end))
        return self._made(first + prompt_ids, ids, ended=bool(end))

    def _made(self, prompt_ids: list[int], ids: list[int], *, ended: bool) -> TokenizedRow:
        ends_C = self.table.ends_of(np.array(ids, np.int64)).astype(np.int32)
        return TokenizedRow(np.array(prompt_ids + ids, np.int32), len(prompt_ids), ends_C, ended)

    # ------------------------------------------------------------------ texts

    def _ids(self, text: str, *, literal: bool = False) -> list[int]:
        """The ids of a text; `literal`: special tokens in it are text."""
        self._tokenizer.encode_special_tokens = literal
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _marked(self, prompt: str, prompt_ids: list[int], text: str, marks: tuple[tuple[int, int], ...]) -> list[int]:
        """The ids of a text behind a prompt, with the teacher's tokens of the marks that it has."""
        data = text.encode()
        ids: list[int] = []
        start, before, before_ids = 0, prompt, prompt_ids
        for place, role in (*marks, (len(data), TEXT)):
            if role != TEXT and role not in self._of_role:
                continue
            part = _utf8(data[start:place], "the text between marks")
            ids += self._behind(before, before_ids, part)
            start = place
            if role != TEXT:
                token_id = self._controls[self._of_role[role]]
                ids.append(token_id)
                before, before_ids = self._of_role[role], [token_id]
        return ids

    def _behind(self, prompt: str, prompt_ids: list[int], text: str) -> list[int]:
        """The ids of a text behind a prompt, standing for exactly its bytes."""
        if not text:
            return []
        data = text.encode()
        whole = self._ids(prompt + text)
        if whole[: len(prompt_ids)] == prompt_ids and self._stands_for(whole[len(prompt_ids) :], data):
            return whole[len(prompt_ids) :]
        for character, before in self._neutral.items():
            whole = self._ids(character + text, literal=True)
            if whole[: len(before)] == before and self._stands_for(whole[len(before) :], data):
                return whole[len(before) :]
        alone = self._ids(text, literal=True)
        if self._stands_for(alone, data):
            return alone
        raise _RefusedError(f"the teacher's tokenizer does not keep the text: {self._lost(alone, data)}")

    def _stands_for(self, ids: list[int], data: bytes) -> bool:
        ids_n = np.array(ids, np.int64)
        return bool((self.table.role_V[ids_n] == TEXT).all()) and self.table.text_of(ids_n) == data

    def _lost(self, ids: list[int], data: bytes) -> str:
        """Where a text and what its ids stand for part, for a person."""
        kept = self.table.text_of(np.array(ids, np.int64))
        at = next((i for i, (a, b) in enumerate(zip(kept, data, strict=False)) if a != b), min(len(kept), len(data)))
        return f"it has {kept[at : at + 8]!r} where the text has {data[at : at + 8]!r}, at byte {at}"

    # ---------------------------------------------------------- conversations

    def _parsed(self, conversation: bytes) -> _Asked:
        try:
            found = json.loads(_utf8(conversation, "the conversation"))
        except (ValueError, RecursionError) as error:
            raise _RefusedError(f"the conversation is no JSON: {error}") from None
        if not isinstance(found, dict) or ("messages" in found) == ("prompt" in found):
            raise _RefusedError("a conversation is a JSON object with messages or with a prompt")
        if unknown := sorted(found.keys() - set(_KEYS)):
            raise _RefusedError(f"a conversation has no field {unknown[0][:64]!r}; known: {', '.join(_KEYS)}")
        if "prompt" in found:
            if len(found) > 1 or not isinstance(found["prompt"], str):
                raise _RefusedError("a conversation with a prompt has nothing else, and the prompt is text")
            return _Asked([], [], {}, None, found["prompt"])
        messages, tools = found["messages"], found.get("tools") or []
        variables, day = found.get("template_kwargs") or {}, found.get("day")
        if not _are_objects(messages) or not _are_objects(tools) or not isinstance(variables, dict):
            raise _RefusedError("messages and tools are lists of objects, template_kwargs is an object")
        try:
            return _Asked(messages, tools, variables, None if day is None else date.fromisoformat(day), None)
        except (TypeError, ValueError):
            raise _RefusedError(f"day is no date such as 2026-11-27: {str(day)[:32]!r}") from None

    def _prompt(self, asked: _Asked) -> tuple[str, list[int], str]:
        """The text of the prompt, the ids in front of it, and the token that ends the answer."""
        files = self._files
        if asked.prompt is not None:
            self._check_controls(asked.prompt, "the prompt")
            return asked.prompt, [self._controls[files.bos]] if files.adds_bos else [], files.eos
        source = files.source(tools=bool(asked.tools))
        if not source:
            raise _RefusedError("the teacher has no chat template; only a text with a prompt, or alone, can be had")
        self._check(asked, source)
        return self._rendered(asked, source), [], files.end

    def _check(self, asked: _Asked, source: str) -> None:
        """Refuses what the template would leave out without a word, and what would be read as the template's own."""
        if asked.tools and not reads(source, "tools"):
            raise _RefusedError("the teacher's chat template shows no tools, so the row's would be lost")
        if any(message.get("tool_calls") for message in asked.messages) and not reads(source, "tool_calls"):
            raise _RefusedError("the teacher's chat template shows no tool calls, so the row's would be lost")
        for name in asked.variables:
            if name in OWN_VARIABLES or name in self._files.special_tokens:
                raise _RefusedError(f"template_kwargs.{name[:64]}: set for every conversation")
            if not reads(source, name):
                raise _RefusedError(
                    f"template_kwargs.{name[:64]}: the teacher's chat template reads no variable of this name"
                )
        for number, message in enumerate(asked.messages):
            self._check_controls(message, f"messages[{number}]")
        self._check_controls(asked.tools, "tools")

    def _check_controls(self, value: Any, where: str) -> None:
        for text in _texts(value):
            for content in self._controls:
                if content in text:
                    raise _RefusedError(f"{where} holds {content!r}, a control token of the teacher's tokenizer")

    def _rendered(self, asked: _Asked, source: str) -> str:
        """The prompt for inference; some templates want tool calls in other shapes than the row's."""
        failure: Exception | None = None
        for messages in _variants(asked.messages):
            try:
                return render(
                    source, messages, tools=asked.tools, add_generation_prompt=True, day=asked.day,
                    variables={**self._files.special_tokens, **asked.variables},
                )  # fmt: skip
            except Exception as error:  # the template's own code raises what it likes
                failure = failure or error
        raise _RefusedError(
            f"the teacher's chat template refuses the conversation: {type(failure).__name__}: {failure}"
        )


def table_of(files: TokenizerFiles) -> ByteTable:
    """The byte table of a teacher.

    Raises:
        CapabilityError: its tokenizer's tokens do not say which bytes they stand for.
    """
    ends = [token for token in (files.eos, files.end) if token]
    table = byte_table(files.tokenizer_json, bos=files.bos, ends=ends, rows=files.rows)
    assert not files.end or END in table.role_V, "the end is a token of the tokenizer"
    return table


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _RefusedError(f"{what} is not UTF-8 at byte {error.start}") from None


def _check_encodes(prompt: str) -> None:
    """JSON may escape half of a surrogate pair, which tokenizers do not take."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise _RefusedError(
            f"the prompt holds half of a surrogate pair, {prompt[error.start]!r}, which is no text"
        ) from None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _variants(messages: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages, with tool calls also in the shapes that templates want: content as it is or null; arguments as they are or as text."""
    if not any(message.get("tool_calls") for message in messages):
        yield list(messages)
        return
    for null, text in product((False, True), repeat=2):
        yield [
            _variant(message, null=null, text=text) if message.get("tool_calls") else message for message in messages
        ]


def _variant(message: dict[str, Any], *, null: bool, text: bool) -> dict[str, Any]:
    made = {**message, "content": None} if null and not message.get("content") else dict(message)
    if text:
        made["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return made


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}
