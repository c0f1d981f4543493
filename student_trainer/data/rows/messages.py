"""Messages as people write them, turned into turns: role names, parts, tool calls, flags, reasoning.

In: one message (an object) with its row; out: a `Turn` as chat templates take it.
Must never drop what changes the meaning: it is used, or refused by name. What is merely noted beside it is told as not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from student_trainer.data.rows import json_text
from student_trainer.data.rows.conversations import ROLES, Row, Turn

# What speakers are called: OpenAI, ShareGPT, LLaMA-Factory, ms-swift, and the models people talked to.
ROLE_NAMES: dict[str, str] = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "bot": "assistant", "chatbot": "assistant",
    "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")  # the content is the call, as JSON
_ROLE_FIELDS, _CONTENT_FIELDS = ("role", "from"), ("content", "value")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_WEIGHT_FIELDS = ("weight", "loss", "loss_scale", "loss_weight")  # a number, or true and false
_TRAIN_FIELDS = ("train", "training", "train_on_turn")  # true or false
_MASK_FIELDS = ("mask", "masked")  # true: not trained
FLAG_FIELDS = (*_WEIGHT_FIELDS, *_TRAIN_FIELDS, *_MASK_FIELDS)
_PASSED_ON = ("name", "tool_call_id")
KNOWN_FIELDS = frozenset({
    *_ROLE_FIELDS, *_CONTENT_FIELDS, *_REASONING_FIELDS, *FLAG_FIELDS, *_PASSED_ON, "tool_calls", "function_call",
})  # fmt: skip
# Fields of a message that change what is taught and that nothing here can use.
MEANING_FIELDS = frozenset({
    "images", "image", "image_url", "audio", "audios", "input_audio", "video", "videos", "objects", "files", "attachments",
    "tools", "functions", "documents", "refusal", "prefix", "partial", "continue_final_message", "loss_mask", "weights", "label", "labels",
    "train_detail", "training_detail", "recipient", "input_ids", "token_ids", "chosen", "rejected", "rejected_content",
    "enable_thinking", "chat_template_kwargs", "thinking_blocks",
})  # fmt: skip
MAX_WEIGHT = 100.0


def read_messages(row: Row, messages: object, where: str) -> list[Turn]:
    """The turns of a list of messages, or of the JSON text of one; [{human, assistant}, ...] are pairs of turns.

    Raises:
        DataError: naming the message and its field.
    """
    items = as_list(row, messages, where)
    turns: list[Turn] = []
    for i, message in enumerate(items):
        here = f"{where}[{i}]"
        if isinstance(message, Mapping) and "human" in message and not _given(message, _ROLE_FIELDS):
            turns += _pair_of(row, message, here)
        elif isinstance(message, Mapping) and _role_name(message) in CALL_ROLES:
            turns = _with_call(row, message, here, turns, joins=i > 0 and _role_name(items[i - 1]) in CALL_ROLES)
        else:
            turns.append(_turn(row, message, here))
        if turns[-1].role == "system" and len(turns) > 1:
            said = "a system message must be the first one, and the only one (developer is another name for it)"
            raise row.error(said, f"{here}.role", "system")
    return turns


def read_history(row: Row, history: object) -> list[Turn]:
    """Earlier exchanges: a list of [user, assistant] pairs, or of messages. Their answers are learned like the last one."""
    items = as_list(row, history, "history")
    if any(isinstance(item, Mapping) for item in items):
        return read_messages(row, items, "history")
    turns: list[Turn] = []
    for i, pair in enumerate(items):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise row.error("must be a pair [user, assistant]", f"history[{i}]", pair)
        turns += [
            Turn(role, checked_text(row, said, f"history[{i}][{place}]"))
            for place, (role, said) in enumerate(zip(("user", "assistant"), pair, strict=True))
        ]
    return turns


def read_tools(row: Row, tools: object, where: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Tool schemas as {type: function, function: {name, ...}}, from a list of these or of bare functions, or JSON text of it."""
    read = []
    for i, tool in enumerate(as_list(row, tools, where)):
        here = f"{where}[{i}]"
        value = from_json(row, tool, here) if isinstance(tool, str) else tool
        if not isinstance(value, Mapping):
            raise row.error(f"must be the schema of a tool, an object, not {type_name(value)}", here)
        if "function" not in value:
            value = {"type": "function", "function": value}
        function = value["function"]
        if value.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise row.error("only tools of type function are known", f"{here}.type", value.get("type"))
        checked_text(row, function.get("name"), f"{here}.function.name")
        read.append(checked_tree(row, {**value, "type": "function"}, here))
    return tuple(read)


def unused_fields(messages: object) -> Iterator[str]:
    """Names of fields of messages that are neither used nor refused."""
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        for message in messages:
            if isinstance(message, Mapping) and "human" not in message:
                yield from (name for name, value in message.items() if name not in KNOWN_FIELDS and not is_empty(value))


def reasoning_of(row: Row, fields: Mapping[str, Any], inside: str = "") -> dict[str, str]:
    """{reasoning_content: text} of a message or row that has some under any of its names, else {}."""
    given = _given(fields, _REASONING_FIELDS)
    if not given:
        return {}
    if len(given) > 1 and len({repr(fields[name]) for name in given}) > 1:
        raise row.error(f"{' and '.join(given)} say different things", _inside(inside, given[1]))
    return {"reasoning_content": checked_text(row, fields[given[0]], _inside(inside, given[0]))}


def weight_of(row: Row, value: object, where: str) -> float:
    """A weight from 0 to 100; true is 1 and false 0.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str):  # cells of a CSV file are text
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    try:
        weight = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight <= MAX_WEIGHT:
        raise row.error(f"must be true, false or a number from 0 to {MAX_WEIGHT:g}", where, value)
    return weight


def as_list(row: Row, value: object, where: str) -> Sequence[Any]:
    """A list, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json_text.parse(value)
        except json_text.JsonError as error:
            raise row.error(f"must be a list, or the JSON text of one: {error}", where, value) from error
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise row.error(f"must be a list, or the JSON text of one, not {type_name(value)}", where)
    return value


def from_json(row: Row, text: str, where: str) -> Any:
    """What a field holds as JSON text."""
    try:
        return json_text.parse(text)
    except json_text.JsonError as error:
        raise row.error(f"is text, and not that of a JSON value: {error}", where, text) from error


def checked_text(row: Row, value: object, where: str, *, empty_ok: bool = False) -> str:
    """`value`, refused unless it is a text that is not blank and can be expressed in UTF-8."""
    if not isinstance(value, str):
        raise row.error(f"must be a string, not {type_name(value)}", where, value)
    if not empty_ok and not value.strip():
        raise row.error("must not be empty", where, value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise row.error("holds half of a surrogate pair, which UTF-8 cannot express", where, value) from error
    return value


def checked_tree(row: Row, value: Any, where: str) -> Any:
    """Nested data, refused where a text in it cannot be expressed in UTF-8 or a value is none of JSON's."""
    if isinstance(value, Mapping):
        return {
            checked_text(row, key, where, empty_ok=True): checked_tree(row, item, where) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [checked_tree(row, item, where) for item in value]
    if isinstance(value, str):
        return checked_text(row, value, where, empty_ok=True)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise row.error(f"holds a value of type {type_name(value)}, which JSON does not know", where, value)


def is_empty(value: object) -> bool:
    """Whether a field says nothing: null, or a text, list or object without anything in it."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and len(value) == 0)


def type_name(value: object) -> str:
    """The type of a value, as errors call it."""
    return "null" if value is None else type(value).__name__


def _turn(row: Row, message: object, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise row.error(f"must be an object with role and content, not {type_name(message)}", where)
    _refuse_meaning(row, message, where)
    role_field, content_field = _only(row, message, _ROLE_FIELDS, where), _only(row, message, _CONTENT_FIELDS, where)
    said = checked_text(row, message[role_field], f"{where}.{role_field}")
    role = ROLE_NAMES.get(said)
    if role is None:
        raise row.error(f"unknown role; known: {', '.join((*ROLE_NAMES, *CALL_ROLES))}", f"{where}.{role_field}", said)
    extra: dict[str, Any] = {}
    if calls := _calls(row, message, where):
        extra["tool_calls"] = calls
    if reasoning := reasoning_of(row, message, where):
        extra |= reasoning
    if extra and role != "assistant":
        raise row.error(f"belongs to the assistant's messages, not to a {role} message", f"{where}.{next(iter(extra))}")
    extra |= {
        name: checked_text(row, message[name], f"{where}.{name}")
        for name in _PASSED_ON
        if not is_empty(message.get(name))
    }
    content = _content(row, message, content_field, where, empty_ok=bool(calls) or role in ("system", "tool"))
    return Turn(role, content, loss_weight=_loss_weight(row, message, role, where), extra=extra)


def _refuse_meaning(row: Row, message: Mapping[str, Any], where: str) -> None:
    for name, value in message.items():
        if name in MEANING_FIELDS and not is_empty(value):
            raise row.error("changes what the message says, and cannot be used here", f"{where}.{name}", value)


def _content(row: Row, message: Mapping[str, Any], name: str, where: str, *, empty_ok: bool) -> str:
    """A text, or a list of text parts, which are joined as they are."""
    where, value = f"{where}.{name}", message.get(name)
    if name not in message and not empty_ok:
        raise row.error("missing field", where)
    if value is None and empty_ok:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = "".join(_part(row, part, f"{where}[{i}]") for i, part in enumerate(value))
    return checked_text(row, value, where, empty_ok=empty_ok)


def _part(row: Row, part: object, where: str) -> str:
    if isinstance(part, str):
        return checked_text(row, part, where, empty_ok=True)
    if not isinstance(part, Mapping):
        raise row.error(f"must be a part {{type: text, text: ...}}, not {type_name(part)}", where)
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise row.error("is not a text; parts of other types cannot be learned from", f"{where}.type", kind)
    for name, value in part.items():  # Arrow fills in the fields that other parts have, with null
        if name not in ("type", "text", "cache_control", "annotations") and not is_empty(value):
            raise row.error("unknown field of a text part", f"{where}.{name}", value)
    return checked_text(row, part.get("text"), f"{where}.text", empty_ok=True)


def _calls(row: Row, message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Tool calls as {type: function, function: {name, arguments: object}}, with their ids."""
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if not is_empty(calls) and not is_empty(legacy):
        raise row.error("stands beside tool_calls, which says the same", f"{where}.function_call")
    if not is_empty(legacy):
        return [_call(row, legacy, f"{where}.function_call")]
    if is_empty(calls):
        return []
    return [
        _call(row, call, f"{where}.tool_calls[{i}]")
        for i, call in enumerate(as_list(row, calls, f"{where}.tool_calls"))
    ]


def _call(row: Row, call: object, where: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = from_json(row, call, where)
    if not isinstance(call, Mapping):
        raise row.error(f"must be a call {{name, arguments}}, not {type_name(call)}", where)
    bare = is_empty(call.get("function"))
    function = call if bare else call["function"]
    if not isinstance(function, Mapping):
        raise row.error(f"must be an object {{name, arguments}}, not {type_name(function)}", f"{where}.function")
    if call.get("type") not in (None, "function"):
        raise row.error("only calls of type function are known", f"{where}.type", call["type"])
    inside = where if bare else f"{where}.function"
    known = {*("type", "id", "index", "function"), *(("name", "arguments", "parameters") if bare else ())}
    strange = [f"{where}.{name}" for name in call if name not in known and not is_empty(call[name])]
    if not bare:
        inner = ("name", "arguments", "parameters")
        strange += [f"{inside}.{name}" for name in function if name not in inner and not is_empty(function[name])]
    if strange:
        raise row.error("unknown field of a tool call, which has name and arguments", strange[0])
    if "arguments" in function and "parameters" in function:
        raise row.error("stands beside arguments, which says the same", f"{inside}.parameters")
    made: dict[str, Any] = {"type": "function"}
    if not is_empty(call.get("id")):
        made = {"id": checked_text(row, call["id"], f"{where}.id"), **made}
    name = checked_text(row, function.get("name"), f"{inside}.name")
    arguments = "parameters" if "parameters" in function else "arguments"
    return {
        **made,
        "function": {"name": name, "arguments": _arguments(row, function.get(arguments), f"{inside}.{arguments}")},
    }


def _arguments(row: Row, value: object, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = from_json(row, value, where) if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise row.error(f"must be an object, or the JSON text of one, not {type_name(value)}", where, value)
    tree: dict[str, Any] = checked_tree(row, value, where)
    return tree


def _with_call(row: Row, message: Mapping[str, Any], where: str, turns: list[Turn], *, joins: bool) -> list[Turn]:
    """The turns with a message of role function_call, whose content is the call.

    It joins an assistant turn directly before it: calls that follow one another are one turn's, and so is the text before them.
    """
    _refuse_meaning(row, message, where)
    content = _only(row, message, _CONTENT_FIELDS, where)
    said = checked_text(row, message.get(content), f"{where}.{content}")
    value = from_json(row, said, f"{where}.{content}")
    listed = value if isinstance(value, list) else [value]
    calls = [_call(row, call, f"{where}.{content}") for call in listed]
    weight = _loss_weight(row, message, "assistant", where)
    extra: dict[str, Any] = {**reasoning_of(row, message, where), "tool_calls": calls}
    before = turns[-1] if turns else None
    if before is None or before.role != "assistant" or ("tool_calls" in before.extra and not joins):
        return [*turns, Turn("assistant", "", loss_weight=weight, extra=extra)]
    if before.loss_weight != weight:
        raise row.error("joins the message before it, which has another weight", where)
    if "reasoning_content" in extra and "reasoning_content" in before.extra:
        raise row.error("joins the message before it, which has a reasoning of its own", where)
    merged = {**before.extra, **extra, "tool_calls": [*before.extra.get("tool_calls", []), *calls]}
    return [*turns[:-1], replace(before, extra=merged)]


def _loss_weight(row: Row, message: Mapping[str, Any], role: str, where: str) -> float:
    given = [name for name in FLAG_FIELDS if message.get(name) is not None]
    weights = {}
    for name in given:
        weight = weight_of(row, message[name], f"{where}.{name}")
        if name not in _WEIGHT_FIELDS and weight not in (0, 1):
            raise row.error("must be true or false", f"{where}.{name}", message[name])
        weights[name] = 1 - weight if name in _MASK_FIELDS else weight
    if len(set(weights.values())) > 1:
        raise row.error(f"{' and '.join(given)} say different things", f"{where}.{given[1]}", message[given[1]])
    if not weights:
        return 1.0
    if role != "assistant" and (weight := next(iter(weights.values()))) > 0:
        raise row.error(
            f"only the assistant's messages can be trained, not a {role} message",
            f"{where}.{given[0]}",
            message[given[0]],
        )
    return next(iter(weights.values())) if role == "assistant" else 1.0


def _pair_of(row: Row, pair: Mapping[str, Any], where: str) -> list[Turn]:
    """Both turns of {human, assistant}, as ms-swift writes them."""
    for name, value in pair.items():
        if name not in ("human", "assistant") and not is_empty(value):
            raise row.error("unknown field of a pair, which has human and assistant", f"{where}.{name}", value)
    return [
        Turn(role, checked_text(row, pair.get(name), f"{where}.{name}"))
        for role, name in (("user", "human"), ("assistant", "assistant"))
    ]


def _only(row: Row, message: Mapping[str, Any], names: tuple[str, str], where: str) -> str:
    """Which of two names of the same thing the message uses."""
    given = [name for name in names if message.get(name) is not None]
    if len(given) > 1 and message[given[0]] != message[given[1]]:
        raise row.error(f"{' and '.join(given)} say different things", f"{where}.{given[1]}")
    present = given or [name for name in names if name in message]
    if not present and names == _ROLE_FIELDS:
        raise row.error("missing field", f"{where}.role")
    if not present and "from" in message and "role" not in message:
        return "value"
    return present[0] if present else names[0]


def _given(fields: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if not is_empty(fields.get(name))]


def _role_name(message: object) -> object:
    return (message.get("role") or message.get("from")) if isinstance(message, Mapping) else None


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
