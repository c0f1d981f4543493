"""A config's model as JSON schema (2020-12), as a person may write it: what the models take beside their types, and what their fields mean.

In: a pydantic model; out: plain data. The other house has the same module, since neither imports the other;
`tests/deploy/test_schemas.py` holds both to the same text.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_FIELD = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<told>.*)$")


def json_schema(kind: type[BaseModel], title: str) -> dict[str, Any]:
    """The schema of a config; descriptions of fields are the `Attributes` of their sections' docstrings."""
    schema = kind.model_json_schema(mode="validation")
    sections = {model.__name__: model for model in _models(kind)}
    for name, section in [(kind.__name__, schema), *schema.get("$defs", {}).items()]:
        if name in sections:
            _describe(section, sections[name])
    return {"$schema": _DIALECT, **_as_written(schema), "title": title}


def _models(kind: type[BaseModel], found: dict[str, type[BaseModel]] | None = None) -> list[type[BaseModel]]:
    """A model and all that its fields hold."""
    seen = {} if found is None else found
    if kind.__name__ not in seen:
        seen[kind.__name__] = kind
        for field in kind.model_fields.values():
            for inner in _inside(field.annotation):
                _models(inner, seen)
    return list(seen.values())


def _inside(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _inside(inner)]


def _describe(section: dict[str, Any], model: type[BaseModel]) -> None:
    """Puts what the docstring says of each field to it, and leaves the first paragraph to the section."""
    told: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base.__doc__ and base is not BaseModel:
            told |= fields_of(inspect.cleandoc(base.__doc__))
    section["description"] = inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    short = _short_forms(model)
    for name, field in section.get("properties", {}).items():
        if name in short:
            field = section["properties"][name] = _or_text(field)
        if name in told:
            field.setdefault("description", told[name])


def _short_forms(model: type[BaseModel]) -> set[str]:
    """Fields whose sections may stand as a text, such as a path: those that a validator reads before their type does."""
    validators = model.__pydantic_decorators__.field_validators.values()
    return {name for validator in validators if validator.info.mode == "before" for name in validator.info.fields}


def _or_text(node: Any) -> Any:
    """The same schema where each section may also be a text."""
    if isinstance(node, list):
        return [_or_text(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return {"anyOf": [node, {"type": "string"}]}
    return {name: _or_text(inner) for name, inner in node.items()}


def fields_of(docstring: str) -> dict[str, str]:
    """What a docstring's `Attributes` say of each; several names before one colon share it."""
    _, _, listed = docstring.partition("Attributes:\n")
    told: dict[str, str] = {}
    names: list[str] = []
    for line in listed.splitlines():
        entry = _FIELD.match(line[4:]) if line.startswith("    ") and line[4:5] != " " else None
        if entry:
            names = entry["names"].split(", ")
            told |= dict.fromkeys(names, entry["told"])
        elif line.startswith("     ") and names:
            told |= {name: f"{told[name]} {line.strip()}" for name in names}
        elif line.strip() and not line.startswith(" "):
            break
    return told


def _as_written(node: Any) -> Any:
    """The same schema where it also allows what the reader of configs does: a single value for a list of it, a number for text.

    A definition of an object stays as it is, since references point at it.
    """
    if isinstance(node, list):
        return [_as_written(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    kept = {name: _as_written(inner) for name, inner in node.items()}
    if kept.get("type") == "array" and "prefixItems" not in kept:
        items = kept.get("items", {})
        around = {name: kept.pop(name) for name in ("description", "default", "title") if name in kept}
        return {"anyOf": [kept, items], **around} if items else {**kept, **around}
    if kept.get("type") == "string" and not {"enum", "const"} & kept.keys():
        kept["type"] = ["string", "number", "boolean"]
    return kept
