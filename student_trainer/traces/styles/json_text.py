"""Drafts in JSON: the short forms of styles `quotes` and `steps`, and the long form with ids and offsets of style `offsets`.

In: text; out: a `Draft`. A text is read in the form that it has, whichever was asked for; a grammar is made of the form asked for
(`grammar_schema`), with every list, string and number bounded, so that the longest document it admits is known.
"""

from __future__ import annotations

from typing import Any

from student_trainer.data.trace_schema import (
    DRAFT_SCHEMA,
    KINDS,
    TraceError,
    first_problem,
    from_fields,
    read_json,
    strip_fence,
)
from student_trainer.traces.styles.bounds import Bounds
from student_trainer.traces.styles.draft import Draft, WrittenStep, draft_of, moved
from student_trainer.traces.token_spans import value_spans


def read_json_draft(text: str) -> Draft:
    """The draft that a JSON text is; one code fence around it is taken off.

    Raises:
        TraceError: too_long, nul, broken_json or schema.
    """
    inside = strip_fence(text)
    fields = read_json(inside)
    short = isinstance(fields, dict) and "evidence" not in fields and isinstance(fields.get("answer"), str)
    draft = _short(inside, fields) if short else _long(inside, fields)
    return moved(draft, text.index(inside))


def _short(text: str, fields: Any) -> Draft:
    bare = isinstance(fields.get("steps"), list) and any(isinstance(step, str) for step in fields["steps"])
    if problem := first_problem(fields, BARE_SCHEMA if bare else SHORT_SCHEMA):
        raise TraceError("schema", problem)
    places = value_spans(text)
    if bare:
        steps = [WrittenStep(step, (), places["steps", number]) for number, step in enumerate(fields["steps"])]
    else:
        steps = [
            WrittenStep(step["text"], tuple(step.get("quotes", ())), places["steps", number, "text"])
            for number, step in enumerate(fields["steps"])
        ]
    return draft_of(steps, fields["answer"], places["answer",])


def _long(text: str, fields: object) -> Draft:
    trace = from_fields(fields, DRAFT_SCHEMA)
    places = value_spans(text)
    steps = tuple(places["steps", number, "text"] for number in range(len(trace.steps)))
    return Draft(trace, steps, places["answer", "text"])


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _text(most: int | None = None) -> dict[str, Any]:
    return {"type": "string", "minLength": 1} | ({} if most is None else {"maxLength": most})


def _list(items: dict[str, Any], least: int = 0, most: int | None = None) -> dict[str, Any]:
    bounds = {"minItems": least} if least else {}
    return {"type": "array", "items": items} | bounds | ({} if most is None else {"maxItems": most})


def _up_to(most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": most}


SHORT_SCHEMA = _object(
    {"steps": _list(_object({"text": _text()}, {"quotes": _list(_text())}), 1), "answer": _text()}
)  # what is read; a grammar holds a teacher to the same within bounds
BARE_SCHEMA = _object({"steps": _list(_text(), 1), "answer": _text()})


def grammar_schema(bounds: Bounds) -> dict[str, Any]:
    """What a grammar holds a teacher to: the parts of its style in their order, nothing in it without a bound."""
    quote, step, answer = _text(bounds.quote_chars), _text(bounds.step_chars), _text(bounds.answer_chars)
    if bounds.style == "quotes":
        one = _object({"text": step, "quotes": _list(quote, most=bounds.references)})
        return _object({"steps": _list(one, 1, bounds.steps), "answer": answer})
    if bounds.style == "steps":
        return _object({"steps": _list(step, 1, bounds.steps), "answer": answer})
    quote_id, step_id, offset = _up_to(bounds.evidence), _up_to(bounds.steps), _up_to(bounds.offset)
    evidence = _object({"id": quote_id, "start": offset, "end": offset, "text": quote})
    one = _object(
        {
            "id": step_id,
            "kind": {"enum": list(KINDS)},
            "text": step,
            "evidence": _list(quote_id, most=bounds.references),
            "depends_on": _list(step_id, most=bounds.references),
        }
    )
    return _object(
        {
            "evidence": _list(evidence, most=bounds.evidence),
            "steps": _list(one, 1, bounds.steps),
            "answer": _object({"text": answer}),
        }
    )


def longest_document(bounds: Bounds, filling: str) -> dict[str, Any]:
    """The longest document of `grammar_schema`, as plain data: every list full, every string made of repeated `filling`."""

    def text(chars: int) -> str:
        return (filling * (chars // len(filling) + 1))[:chars]

    if bounds.style == "quotes":
        step = {"text": text(bounds.step_chars), "quotes": [text(bounds.quote_chars)] * bounds.references}
        return {"steps": [step] * bounds.steps, "answer": text(bounds.answer_chars)}
    if bounds.style == "steps":
        return {"steps": [text(bounds.step_chars)] * bounds.steps, "answer": text(bounds.answer_chars)}
    offsets = {"start": bounds.offset, "end": bounds.offset}
    long_step = {
        "id": bounds.steps,
        "kind": max(KINDS, key=len),
        "text": text(bounds.step_chars),
        "evidence": [bounds.evidence] * bounds.references,
        "depends_on": [bounds.steps] * bounds.references,
    }
    return {
        "evidence": [{"id": bounds.evidence, **offsets, "text": text(bounds.quote_chars)}] * bounds.evidence,
        "steps": [long_step] * bounds.steps,
        "answer": {"text": text(bounds.answer_chars)},
    }
