"""Conversations to answers: for each trained turn the exact inference prompt, and the text the model is to write behind it.

In: a `Conversation`, the tokenizer, a chat template. Out: `Answer`s; `encoding` makes ids of them and decides what shares a sequence.
Must never alter a content, nor supervise anything but an assistant's words and the end of its turn. See docs/data/templates.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.data.text.answer import Answer, Template, trained
from student_trainer.data.text.clock import Clock, reads
from student_trainer.data.text.control_tokens import ControlTokens
from student_trainer.data.text.layout import Laid, lay_out, weights_along
from student_trainer.data.text.plain import PLAIN, PlainTemplate
from student_trainer.errors import DataError
from teacher_wire.core.identity import default_template, text_sha256

TEMPLATES = ("chat", PLAIN)
# Variables that `render_jinja_template` and this module set themselves.
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "chat_template", "conversations", "strftime_now")


class ChatTemplate:
    """A jinja template as transformers renders it; see `Template`.

    BOS is as the template renders it, as in inference servers. Templates that trim contents (Llama) teach the trimmed content.
    """

    begins_with_bos = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        *,
        name: str = "chat",
        tools_source: str = "",
        kwargs: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            source: its text.
            tools_source: the text for conversations with tools, if it is another (a template named "tool_use").
            kwargs: variables for every conversation; a row's own stand before them.
            clock: the day it prints.
        """
        self.name = name
        self.source_sha256 = text_sha256(source)
        self.literal_rows = 0
        self.sources: tuple[str, ...] = (source, tools_source or source)
        self._kwargs = dict(kwargs or {})
        self._clock = clock or Clock()
        self._special = dict(tokenizer.special_tokens_map)
        self._eos = None if tokenizer.eos_token is None else str(tokenizer.eos_token)
        self.control = ControlTokens(tokenizer, source + tools_source)
        _check_kwargs(self._kwargs, source + tools_source, "data.template_kwargs")

    def answers(self, conversation: Conversation, turns: str = "auto") -> list[Answer]:
        self._check(conversation)
        learned = trained(conversation, turns)
        literal = self._refuse_or_mark(conversation, learned)
        messages = self._messages(conversation, literal=literal)
        return [self._answer(conversation, messages, i, literal=literal) for i in learned]

    def prompt(self, conversation: Conversation) -> tuple[str, bool]:
        self._check(conversation)
        literal = self._refuse_or_mark(conversation, [])
        messages = self._messages(conversation, literal=literal)
        return self._render(messages, conversation, literal=literal, generation_prompt=True), literal

    def _answer(self, conversation: Conversation, messages: list[dict[str, Any]], i: int, *, literal: bool) -> Answer:
        turn = conversation.turns[i]

        def render(count: int, generation_prompt: bool) -> str:
            return self._render(messages[:count], conversation, literal=literal, generation_prompt=generation_prompt)

        try:
            prompt = render(i, True)
        except DataError as error:
            if i > 0:
                raise
            raise DataError(
                "the assistant speaks first, and the chat template renders no prompt without a message before it "
                f"({error}); give a system message (data.system_prompt), or the first turn the weight 0"
            ) from error
        whole = render(i + 1, False)

        def header() -> str:
            before = render(i, False) if i else ""
            same = next(
                (k for k, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b),
                min(len(before), len(prompt)),
            )
            return prompt[same:]

        laid = lay_out(prompt, whole, turn, i, lambda text: bool(self.control.first_in(text)) or literal, header)
        self._check_calls(turn, i, laid)
        ending = "" if laid.ended else self._ending(literal=literal)
        return Answer(i, prompt, laid.target, ending, laid.places, weights_along(turn, laid, len(ending)), literal)

    def _ending(self, *, literal: bool) -> str:
        if self._eos is None:
            raise DataError("the tokenizer has no eos token to end an answer with")
        return self.control.settled(self._eos) if literal else self._eos

    def _render(
        self, messages: list[dict[str, Any]], conversation: Conversation, *, literal: bool, generation_prompt: bool
    ) -> str:
        source = self.sources[bool(conversation.tools)]
        variables = {**self._clock.variables(source), **self._special, **self._kwargs, **conversation.template_kwargs}
        tools = [dict(tool) for tool in conversation.tools] or None
        try:
            [text], _ = render_jinja_template(
                [messages],
                tools=self.control.marked(tools) if literal and tools else tools,
                chat_template=source,
                add_generation_prompt=generation_prompt,
                **variables,
            )
        except Exception as error:  # jinja runs the template's own code, which raises what it likes
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return self.control.settled(text) if literal else str(text)

    def _check(self, conversation: Conversation) -> None:
        """Refuses what the template would leave out without a word."""
        source = self.sources[bool(conversation.tools)]
        if conversation.tools and not reads(source, "tools"):
            raise DataError(
                f"the chat template ({self.name}) shows no tools, so the row's would be lost", field="tools"
            )
        if any(turn.extra.get("tool_calls") for turn in conversation.turns) and not reads(source, "tool_calls"):
            raise DataError(f"the chat template ({self.name}) shows no tool calls, so the row's would be lost", field="tool_calls")  # fmt: skip
        _check_kwargs(conversation.template_kwargs, source, "chat_template_kwargs")

    def _refuse_or_mark(self, conversation: Conversation, learned: list[int]) -> bool:
        """Whether a control token stands in what others say, which then stays text.

        Raises:
            DataError: one stands in what the model is to write.
        """
        held = False
        for i, turn in enumerate(conversation.turns):
            found = self.control.first_in((turn.content, turn.extra))
            if found and i in learned:
                raise DataError(
                    f"turn {i} of the assistant holds {found!r}, a control token of the tokenizer (id {self.control.ids[found]}); "
                    "the chat template ends turns by itself, so take it out of the row",
                    field=f"messages[{i}].content",
                )
            held = held or bool(found)
        held = held or bool(self.control.first_in(conversation.tools))
        self.literal_rows += held
        return held

    def _messages(self, conversation: Conversation, *, literal: bool) -> list[dict[str, Any]]:
        """The turns as the template takes them: some want `content: null` beside tool calls, or arguments as text."""
        messages = [turn.message for turn in conversation.turns]
        if literal:
            messages = [{**message, **self.control.marked({k: v for k, v in message.items() if k != "role"})} for message in messages]  # fmt: skip
        if not any(message.get("tool_calls") for message in messages):
            return messages
        error: DataError | None = None
        for variant in _variants(messages):
            silent = [{k: v for k, v in message.items() if k != "tool_calls"} for message in variant]
            try:
                shown = self._render(variant, conversation, literal=literal, generation_prompt=False)
            except DataError as refused:
                error = error or refused
                continue
            try:
                without = self._render(silent, conversation, literal=literal, generation_prompt=False)
            except DataError:  # it needs them, so it reads them
                return variant
            if shown != without:
                return variant
        raise error or DataError("the chat template does not show the tool calls of the row", field="tool_calls")

    def _check_calls(self, turn: Turn, i: int, laid: Laid) -> None:
        for call in turn.extra.get("tool_calls") or ():
            name = str((call.get("function") or call).get("name", "")) if isinstance(call, Mapping) else ""
            if name not in laid.target:
                raise DataError(f"the chat template does not show the call of {name!r} in turn {i}", field="tool_calls")


def choose(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kwargs: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
) -> Template:
    """The template called `name`.

    Args:
        name: "chat", the tokenizer's own; "plain"; "auto", chat where the tokenizer has a chat template and plain elsewhere; the name of one
            of a tokenizer's several templates; or the path of a file that holds one (./x.jinja).
        kwargs: variables of the template.
        clock: the day it prints.

    Raises:
        DataError: no such template, or variables that it does not read.
    """
    own = tokenizer.chat_template
    named: Mapping[str, str] = own if isinstance(own, Mapping) else {}
    clock = clock or Clock()
    if _is_path(name):
        return ChatTemplate(tokenizer, _read_file(name), name=name, kwargs=kwargs, clock=clock)
    if name == PLAIN or (name == "auto" and not own):
        if kwargs:
            raise DataError("template=plain has no variables", field="data.template_kwargs", value=dict(kwargs))
        return PlainTemplate(tokenizer)
    if name in named:
        return ChatTemplate(tokenizer, named[name], name=name, kwargs=kwargs, clock=clock)
    if name not in ("auto", "chat"):
        known = ", ".join(("auto", *TEMPLATES, *sorted(named), "a path such as ./template.jinja"))
        raise DataError(f"unknown template; known: {known}", field="data.template", value=name)
    source = default_template(own)
    if not source:
        if named:
            raise DataError(f"the tokenizer has several chat templates and none is called default; choose one: {', '.join(sorted(named))}", field="data.template", value=name)  # fmt: skip
        raise DataError("the tokenizer has no chat template; use template=plain", field="data.template", value=name)
    return ChatTemplate(tokenizer, source, tools_source=named.get("tool_use", ""), kwargs=kwargs, clock=clock)


def rendering_sha256(template: Template, kwargs: Mapping[str, Any], clock: Clock) -> str:
    """Names how conversations are rendered: the template's text, the variables of the config, and the day if it is printed."""
    day = clock.day.isoformat() if clock.asked else ""
    return hashlib.sha256(
        json.dumps(
            [template.name == PLAIN, template.source_sha256, dict(kwargs), day], sort_keys=True, default=str
        ).encode()
    ).hexdigest()


def _check_kwargs(kwargs: Mapping[str, Any], source: str, field: str) -> None:
    for name in kwargs:
        if name in _OWN_VARIABLES:
            raise DataError(
                "is set for every conversation and cannot be a variable of one's own", field=f"{field}.{name}"
            )
        if not reads(source, name):
            raise DataError("the chat template reads no variable of this name", field=f"{field}.{name}")


def _variants(messages: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same messages with tool calls in the shapes that templates want: content as it is or null; arguments as they are or as text."""
    for null, text in product((False, True), repeat=2):
        yield [
            _variant(message, null=null, text=text) if message.get("tool_calls") else message for message in messages
        ]


def _variant(message: dict[str, Any], *, null: bool, text: bool) -> dict[str, Any]:
    made = {**message, "content": None} if null and not message["content"] else dict(message)
    if text:
        made["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return made


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".jinja", ".jinja2", ".j2"))


def _read_file(name: str) -> str:
    try:
        source = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the template cannot be read: {error}", field="data.template", value=name) from error
    if not source.strip():
        raise DataError("the template file is empty", field="data.template", value=name)
    return source
