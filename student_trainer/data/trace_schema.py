"""Reasoning traces: their schema, what they are in memory, and strict reading and writing.

In: JSON text that a teacher wrote; out: a `Trace`, or a `TraceError` whose reason is one of `REASONS`.
It trusts nothing that a model wrote, and never repairs anything but a code fence (see `trace_verify` for spans).

Offsets are half-open, in UTF-8 bytes of the exact user content (docs/concepts/method.md 7.1).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["extract", "infer", "compute", "verify", "decide"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Reason = Literal[
    "too_long",
    "unfinished",
    "nul",
    "broken_json",
    "broken_form",
    "no_answer",
    "schema",
    "cut_text",
    "wrong_prompt",
    "invented_evidence",
    "bad_reference",
    "cyclic_dependency",
    "wrong_answer",
    "minority_answer",
    "wrong_arithmetic",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

TRACE_VERSION = "1"
MAX_TEXT_BYTES = 1 << 20  # of a whole trace, before anybody parses it
UNCLAIMED = -1  # start and end of a quote whose place the teacher was not asked for
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_FENCE = re.compile(r"\A\s*```[A-Za-z]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_ID = {"type": "integer", "minimum": 0}


class TraceError(ValueError):
    """A trace that must not be learned from.

    Args:
        reason: one of `REASONS`.
        detail: where and what, for a person.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _list(items: dict[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items} | ({"minItems": least} if least else {})


def _text() -> dict[str, Any]:
    return {"type": "string", "minLength": 1}


@dataclass(frozen=True)
class Caps:
    """The longest trace that is accepted; text lengths are UTF-8 bytes."""

    steps: int = 32
    step_bytes: int = 1024
    evidence: int = 64
    evidence_bytes: int = 1024
    answer_bytes: int = 1024


# A stored trace; `DRAFT_SCHEMA` is the part of it that a teacher writes, with what it may leave to us as optional.
_EVIDENCE = {"id": _ID, "start": _ID, "end": _ID, "text": _text()}
_EVIDENCE_CONSTANTS = {"unit": {"const": "utf8_byte"}, "source": {"const": "prompt"}}
_STEP = {
    "id": _ID,
    "kind": {"enum": list(KINDS)},
    "text": _text(),
    "evidence": _list(_ID),
    "depends_on": _list(_ID),
}
_HEADER = {
    "trace_version": {"const": TRACE_VERSION},
    "prompt_sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "teacher": _object({"id": {"type": "string"}, "revision": {"type": "string"}}),
    "sampling": _object(
        {
            "n": {"type": "integer", "minimum": 1},
            "agree": {"type": "integer", "minimum": 1},
            "temperature": {"type": "number", "minimum": 0},
            "seed": {"type": "integer", "minimum": 0},
        }
    ),
}
TRACE_SCHEMA: dict[str, Any] = {"$schema": _DIALECT} | _object(
    _HEADER
    | {
        "evidence": _list(_object(_EVIDENCE | _EVIDENCE_CONSTANTS)),
        "steps": _list(_object(_STEP | {"confidence": _SHARE}), least=1),
        "answer": _object({"text": _text(), "normalized": _text(), "confidence": _SHARE}),
    }
)
DRAFT_SCHEMA: dict[str, Any] = {"$schema": _DIALECT} | _object(
    {
        "evidence": _list(_object(_EVIDENCE, _EVIDENCE_CONSTANTS)),
        "steps": _list(_object(_STEP, {"confidence": _SHARE}), least=1),
        "answer": _object({"text": _text()}, {"normalized": _text(), "confidence": _SHARE}),
    },
    _HEADER,
)


@dataclass(frozen=True)
class Evidence:
    """A quote: bytes start..end of the user content, which are `text`; start is `UNCLAIMED` while nobody has looked for it."""

    id: int
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Step:
    """One step; `evidence` and `depends_on` are ids."""

    id: int
    kind: Kind
    text: str
    evidence: tuple[int, ...] = ()
    depends_on: tuple[int, ...] = ()
    confidence: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What the steps end in; `normalized` is what answers are compared by."""

    text: str
    normalized: str
    confidence: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How the trace was drawn: n samples of the prompt, `agree` of them with this answer."""

    n: int = 1
    agree: int = 1
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Trace:
    """A trace; one that a teacher has just written has no `prompt_sha256` yet."""

    steps: tuple[Step, ...]
    evidence: tuple[Evidence, ...]
    answer: Answer
    prompt_sha256: str = ""
    teacher_id: str = ""
    teacher_revision: str = ""
    sampling: Sampling = Sampling()

    def evidence_of(self, step: Step) -> list[Evidence]:
        """The quotes that `step` rests on, in its order."""
        by_id = {quote.id: quote for quote in self.evidence}
        return [by_id[number] for number in step.evidence if number in by_id]


def prompt_sha256(prompt: str) -> str:
    """What names the user content."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def dump(trace: Trace) -> str:
    """One line of JSON under `TRACE_SCHEMA`."""
    return json.dumps(to_fields(trace), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def to_fields(trace: Trace) -> dict[str, Any]:
    """The trace as plain data."""
    return {
        "trace_version": TRACE_VERSION,
        "prompt_sha256": trace.prompt_sha256,
        "teacher": {"id": trace.teacher_id, "revision": trace.teacher_revision},
        "evidence": [vars(quote) | {"unit": "utf8_byte", "source": "prompt"} for quote in trace.evidence],
        "steps": [
            vars(step) | {"evidence": list(step.evidence), "depends_on": list(step.depends_on)} for step in trace.steps
        ],
        "answer": dict(vars(trace.answer)),
        "sampling": dict(vars(trace.sampling)),
    }


def parse(text: str) -> Trace:
    """A stored trace.

    Raises:
        TraceError: too_long, nul, broken_json or schema.
    """
    return from_fields(read_json(text))


def parse_draft(text: str) -> Trace:
    """A trace as a teacher wrote it; one code fence around it is taken off.

    Raises:
        TraceError: too_long, nul, broken_json or schema.
    """
    return from_fields(read_json(strip_fence(text)), DRAFT_SCHEMA)


def strip_fence(text: str) -> str:
    """The inside of a Markdown code fence that holds everything, or the text as it is."""
    found = _FENCE.match(text) if len(text) <= MAX_TEXT_BYTES else None
    return found.group(1) if found else text


def from_fields(fields: object, schema: dict[str, Any] = TRACE_SCHEMA) -> Trace:
    """A trace from plain data.

    Raises:
        TraceError: schema, naming the place.
    """
    problem = first_problem(fields, schema)
    if problem:
        raise TraceError("schema", problem)
    assert isinstance(fields, dict)
    teacher, answer = fields.get("teacher", {}), fields["answer"]
    return Trace(
        steps=tuple(
            Step(
                step["id"],
                step["kind"],
                step["text"],
                tuple(step["evidence"]),
                tuple(step["depends_on"]),
                float(step.get("confidence", 1.0)),
            )
            for step in fields["steps"]
        ),
        evidence=tuple(Evidence(*(quote[name] for name in _EVIDENCE)) for quote in fields["evidence"]),
        answer=Answer(answer["text"], answer.get("normalized", ""), float(answer.get("confidence", 1.0))),
        prompt_sha256=fields.get("prompt_sha256", ""),
        teacher_id=teacher.get("id", ""),
        teacher_revision=teacher.get("revision", ""),
        sampling=Sampling(**fields["sampling"]) if "sampling" in fields else Sampling(),
    )


# ---------------------------------------------------------------- strict JSON


def read_json(text: str) -> object:
    """Strict JSON: no second value of a key, no NaN, no half characters, no NUL.

    Raises:
        TraceError: too_long, nul or broken_json.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise TraceError("too_long", f"{len(text)} characters, limit {MAX_TEXT_BYTES}")
    if "\0" in text:
        raise TraceError("nul", f"at character {text.index(chr(0))}")
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise TraceError("broken_json", str(error)[:200] or type(error).__name__) from None
    for string in _strings(value):
        if "\0" in string:
            raise TraceError("nul", "as an escape in a string")
        if not string.isascii() and any("\ud800" <= character <= "\udfff" for character in string):
            raise TraceError("broken_json", "half of a surrogate pair")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _strings(value: object) -> Iterator[str]:
    """Every string in it, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
}


def first_problem(value: Any, schema: dict[str, Any], where: str = "trace") -> str:
    """Where `value` first breaks `schema`, of the keywords used in this file; "" if it does not."""
    kind = schema.get("type")
    if kind and (not isinstance(value, _TYPES[kind]) or isinstance(value, bool)):
        return f"{where} must be of type {kind}, not {type(value).__name__}"
    if "const" in schema and value != schema["const"]:
        return f"{where} must be {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} must be one of {', '.join(schema['enum'])}"
    if isinstance(value, str):
        return _string_problem(value, schema, where)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            return f"{where} is empty"
        found = (first_problem(item, schema["items"], f"{where}[{i}]") for i, item in enumerate(value))
        return next(filter(None, found), "")
    if isinstance(value, dict):
        return _object_problem(value, schema, where)
    low, high = schema.get("minimum", value), schema.get("maximum", value)
    return "" if low <= value <= high else f"{where} is {value}, outside {low}..{schema.get('maximum', '')}"


def _string_problem(value: str, schema: dict[str, Any], where: str) -> str:
    if len(value) < schema.get("minLength", 0):
        return f"{where} is empty"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"{where} does not match {schema['pattern']}"
    return ""


def _object_problem(value: dict[str, Any], schema: dict[str, Any], where: str) -> str:
    missing = [name for name in schema["required"] if name not in value]
    unknown = [name for name in value if name not in schema["properties"]]
    if missing or unknown:
        return f"{where} lacks {missing[0]}" if missing else f"{where} has an unknown key {unknown[0][:40]!r}"
    found = (first_problem(item, schema["properties"][name], f"{where}.{name}") for name, item in value.items())
    return next(filter(None, found), "")
