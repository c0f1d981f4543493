"""The part of Go's text/template that Modelfiles are written in: text, if, range, variables, comparisons, slice, index and len.

In: a template's source and data; out: text, as Ollama's `template.Execute` renders messages. What is not of this part is refused by name,
never passed over. Checked against Go itself (docs/after/export.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(-\s)?\s*((?:\"(?:\\.|[^\"\\])*\"|`[^`]*`|[^\"`}]|\}(?!\}))*?)\s*(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"\s+|\"(?:\\.|[^\"\\])*\"|`[^`]*`|:=|[=(),|]|-?\d+|\$?[A-Za-z_][A-Za-z_0-9]*(?:\.[A-Za-z_0-9]+)*|\$(?:\.[A-Za-z_0-9]+)*|\.[A-Za-z_0-9.]*"
)


class GoTemplateError(ValueError):
    """A template that Go refuses, or that this part of Go does not cover."""


@dataclass
class _Branch:
    """`if` or `range`, its conditions with their bodies, and what stands behind the last else."""

    word: str
    arms: list[tuple[str, list[Any]]] = field(default_factory=list)
    otherwise: list[Any] = field(default_factory=list)


def render(source: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama makes of a conversation: neighbours of one role are one message, and all system messages are `.System` too.

    Raises:
        GoTemplateError: the template is wrong, goes beyond this part of Go, or ends itself (`index "" 0`).
    """
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["role"] != "tool":
            collated[-1]["Content"] += "\n\n" + message["content"]
        else:
            collated.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    data = {"System": system, "Messages": collated, "Response": ""}
    nodes = iter(_pieces(source))
    parsed, ended = _parse(nodes)
    if ended:
        raise GoTemplateError(f"{ended} without an if or range")
    return _run(parsed, data, [{"$": data}])


def quoted(text: str) -> str:
    """A text as an action that prints it, whatever is in it; nothing for nothing."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _pieces(source: str) -> list[tuple[str, str]]:
    """Texts and actions, trimmed as the dashes say."""
    found: list[tuple[str, str]] = []
    place, trim_next = 0, False
    for action in _ACTION.finditer(source):
        text = source[place : action.start()]
        text = text.lstrip() if trim_next else text
        found.append(("text", text.rstrip() if action[1] else text))
        if not action[2].startswith("/*"):
            found.append(("action", action[2].strip()))
        trim_next, place = bool(action[3]), action.end()
    rest = source[place:]
    if "{{" in rest:
        raise GoTemplateError(f"an action is not closed: {rest[rest.index('{{') :][:40]}")
    return [*found, ("text", rest.lstrip() if trim_next else rest)]


def _parse(pieces: Iterator[tuple[str, str]]) -> tuple[list[Any], str]:
    """Nodes up to the end, or to an else or end that belongs to the caller, which is returned."""
    nodes: list[Any] = []
    for kind, text in pieces:
        word = text.split(maxsplit=1)[0] if kind == "action" and text else ""
        if kind == "text" or word not in ("if", "range", "else", "end"):
            if kind == "action" and word in ("with", "define", "template", "block", "break", "continue"):
                raise GoTemplateError(f"{word} is not supported")
            nodes.append((kind, text))
            continue
        if word in ("else", "end"):
            return nodes, text
        branch, condition = _Branch(word), text[len(word) :].strip()
        while True:
            body, ended = _parse(pieces)
            branch.arms.append((condition, body))
            if ended.startswith("else if"):
                condition = ended.removeprefix("else if").strip()
                continue
            if ended == "else":
                branch.otherwise, ended = _parse(pieces)
            if ended != "end":
                raise GoTemplateError(f"{word} is not closed")
            break
        nodes.append(branch)
    return nodes, ""


def _run(nodes: Sequence[Any], dot: Any, scopes: list[dict[str, Any]]) -> str:
    out = []
    for node in nodes:
        if isinstance(node, _Branch):
            out.append(_range(node, dot, scopes) if node.word == "range" else _if(node, dot, scopes))
        elif node[0] == "text":
            out.append(node[1])
        else:
            out.append(_act(node[1], dot, scopes))
    return "".join(out)


def _if(node: _Branch, dot: Any, scopes: list[dict[str, Any]]) -> str:
    for condition, body in node.arms:
        if _value(condition, dot, scopes):
            return _run(body, dot, [*scopes, {}])
    return _run(node.otherwise, dot, [*scopes, {}])


def _range(node: _Branch, dot: Any, scopes: list[dict[str, Any]]) -> str:
    [(head, body)] = node.arms
    names, mark, expression = head.rpartition(":=")
    variables = [name.strip() for name in names.split(",")] if mark else []
    items = _value(expression, dot, scopes)
    out = []
    for number, item in enumerate(items):
        bound = dict(zip(variables[-2:], (number, item) if len(variables) == 2 else (item,), strict=False))
        out.append(_run(body, item, [*scopes, bound]))
    return "".join(out) if items else _run(node.otherwise, dot, scopes)


def _act(text: str, dot: Any, scopes: list[dict[str, Any]]) -> str:
    assigned = re.fullmatch(r"(\$\w+)\s*(:?=)\s*(.+)", text, re.DOTALL)
    if assigned is None:
        value = _value(text, dot, scopes)
        return ("true" if value else "false") if isinstance(value, bool) else str(value)
    name, mark, expression = assigned.groups()
    value = _value(expression, dot, scopes)
    scope = scopes[-1] if mark == ":=" else next((s for s in reversed(scopes) if name in s), None)
    if scope is None:
        raise GoTemplateError(f"{name} is not declared")
    scope[name] = value
    return ""


def _value(expression: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    tokens = _tokens(expression)
    place = 0

    def operand() -> Any:
        nonlocal place
        token = tokens[place]
        place += 1
        if token == "(":
            value = call()
            if place >= len(tokens):
                raise GoTemplateError(f"{expression!r}: a bracket is not closed")
            place += 1
            return value
        return _operand(token, dot, scopes)

    def call() -> Any:
        nonlocal place
        if place >= len(tokens):
            raise GoTemplateError("an empty action")
        function = _FUNCTIONS.get(tokens[place])
        if function is None:
            return operand()
        place += 1
        arguments = []
        while place < len(tokens) and tokens[place] != ")":
            arguments.append(operand())
        return function(*arguments)

    found = call()
    if place != len(tokens):
        raise GoTemplateError(f"{expression!r} goes beyond what is supported")
    return found


def _tokens(expression: str) -> list[str]:
    found, place = [], 0
    while place < len(expression):
        token = _TOKEN.match(expression, place)
        if token is None or token[0] in ("|", ",", "=", ":="):
            raise GoTemplateError(f"{expression!r} goes beyond what is supported")
        found.append(token[0])
        place = token.end()
    return [token for token in found if token.strip()]


def _operand(token: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    if token[0] == '"':
        return json.loads(token)
    if token[0] == "`":
        return token[1:-1]
    if token in ("true", "false"):
        return token == "true"
    if re.fullmatch(r"-?\d+", token):
        return int(token)
    head, *fields = token.split(".")
    if head and not head.startswith("$"):
        raise GoTemplateError(f"{token} is no function that is supported")
    if head:
        scope = next((s for s in reversed(scopes) if head in s), None)
        if scope is None:
            raise GoTemplateError(f"{token} is not known")
        value = scope[head]
    else:
        value = dot
    for name in filter(None, fields):
        if not isinstance(value, Mapping):
            raise GoTemplateError(f"{token}: no field {name}")
        value = value.get(name, "")
    return value


def _slice(value: Any, *bounds: int) -> Any:
    low, high = (*bounds, len(value))[:2] if bounds else (0, len(value))
    if not 0 <= low <= high <= len(value):
        raise GoTemplateError(f"slice {low}:{high} of {len(value)}")
    return value[low:high]


def _index(value: Any, number: int) -> Any:
    if not 0 <= number < len(value):
        raise GoTemplateError(f"index {number} of {len(value)}")
    return value[number]


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "not": lambda a: not a,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
    "slice": _slice,
    "index": _index,
}
