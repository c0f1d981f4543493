"""Chat templates in a sandbox, as transformers renders them, without loading transformers.

In: a template's text and a conversation; out: text. A template is code that came with a model: it gets values and no objects, and nothing
here bounds its time; whoever renders what a stranger has sent does so where a loop can be ended (`process`).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Variables that are set here and cannot be a conversation's own.
OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
_PROBE = "lyceum-answer"
_PROBE_S = 10.0


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks an answer and changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    day: date | None = None,
) -> str:
    """What the template makes of a conversation; raises whatever the template raises.

    Args:
        source: its text.
        messages, tools: as JSON has them.
        add_generation_prompt: whether an answer is to follow.
        variables: of its own, among them the special tokens.
        day: that it prints if it asks for one; today if not given.
    """
    clock = datetime.now() if day is None else datetime.combine(day, time())
    return _compiled(source).render(
        messages=list(messages),
        tools=list(tools) if tools else None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        strftime_now=clock.strftime,
        **variables,
    )


def reads(source: str, name: str) -> bool:
    """Whether a template's text names a variable."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def written_end(source: str, variables: Mapping[str, Any], controls: Iterable[str]) -> str | None:
    """The first of `controls` that a template writes behind an answer; "" if it writes none, or refuses the conversation that asks.

    None if it does not come to an end: it must not be rendered.
    """
    found: list[str] = []

    def ask() -> None:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = render(source, messages, add_generation_prompt=False, variables=variables)
        except Exception:  # the template's own code raises what it likes
            found.append("")
            return
        behind = text.rpartition(_PROBE)[2]
        places = [(behind.find(control), -len(control), control) for control in controls if control in behind]
        found.append(min(places)[2] if places else "")

    asking = threading.Thread(target=ask, name="template-probe", daemon=True)  # cannot be ended, only left
    asking.start()
    asking.join(_PROBE_S)
    return found[0] if found else None
