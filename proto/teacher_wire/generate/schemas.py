"""JSON Schemas that a teacher may be held to: which keywords, how large, never recursive.

In: a schema as JSON text from the other machine; out: nothing, or a refusal that names the place. A keyword that is
not in `KEYWORDS` is refused, since a grammar that ignored it would promise what it does not keep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from teacher_wire.core.errors import LimitError, RequestError

MAX_DEPTH = 32  # of the JSON text, and of $ref to $ref
MAX_NODES = 4096  # subschemas, with every $ref written out
MAX_COUNT = 65_536  # of minItems, maxItems, minLength, maxLength
MAX_NUMBER = 2**53
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
KEYWORDS = (
    "$schema", "$defs", "$ref", "title", "description", "type", "properties", "required", "additionalProperties",
    "items", "prefixItems", "anyOf", "enum", "const", "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum",
)  # fmt: skip
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_NUMBERS = ("minimum", "maximum")
_REF = "#/$defs/"


def check_schema(text: str, max_bytes: int) -> None:
    """Refuses a schema that no grammar is made of.

    Args:
        text: JSON.
        max_bytes: longest accepted text, in UTF-8.

    Raises:
        LimitError: too long, too deep or too large.
        RequestError: no JSON, not a schema, an unknown keyword, a recursive or foreign $ref.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > max_bytes:
        raise LimitError("the schema is too long", field="json_schema", value=f"{size} bytes", limit=max_bytes)
    if "\0" in text or "\\u0000" in text:
        raise RequestError("holds a NUL", field="json_schema")
    _check_depth(text)
    try:
        schema = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
        json.dumps(schema, ensure_ascii=False).encode()  # no half characters, escaped ones neither
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {str(error)[:120]}", field="json_schema") from None
    if not isinstance(schema, dict):
        raise RequestError("a schema is an object", field="json_schema", value=type(schema).__name__)
    definitions = schema.get("$defs", {})
    if not isinstance(definitions, dict):
        raise RequestError("must be an object", field="json_schema.$defs", value=type(definitions).__name__)
    sizes: dict[str, int] = {}
    for name in definitions:
        _size_of_definition(name, definitions, sizes, ())
    _size(schema, "json_schema", definitions, sizes, ())


def _check_depth(text: str) -> None:
    """Before the parser recurses: brackets outside strings."""
    depth, inside, escaped = 0, False, False
    for character in text:
        if inside:
            inside = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            inside = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise LimitError("nested too deeply", field="json_schema", value=depth, limit=MAX_DEPTH)
        elif character in "]}":
            depth -= 1


def _size_of_definition(name: str, definitions: dict[str, Any], sizes: dict[str, int], via: tuple[str, ...]) -> int:
    if name in via:
        raise RequestError(
            "recursive $ref", field=f"json_schema.$defs.{name[:40]}", value=" -> ".join((*via, name))[:200]
        )
    if len(via) > MAX_DEPTH:
        raise LimitError(
            "a chain of $ref too long", field=f"json_schema.$defs.{name[:40]}", value=len(via), limit=MAX_DEPTH
        )
    if name not in definitions:
        raise RequestError("no such definition", field="json_schema.$ref", value=name[:80], limit=_REF + "NAME")
    if name not in sizes:
        sizes[name] = _size(definitions[name], f"json_schema.$defs.{name[:40]}", definitions, sizes, (*via, name))
    return sizes[name]


def _size(schema: Any, where: str, definitions: dict[str, Any], sizes: dict[str, int], via: tuple[str, ...]) -> int:
    """Subschemas in `schema`, every $ref written out; refuses what it does not understand."""
    if not isinstance(schema, dict):
        raise RequestError("a schema is an object", field=where, value=type(schema).__name__)
    unknown = [name for name in schema if name not in KEYWORDS]
    if unknown:
        raise RequestError("unknown keyword", field=where, value=unknown[0][:80], limit="|".join(KEYWORDS))
    if "$defs" in schema and where != "json_schema":
        raise RequestError("$defs stand at the root", field=where, value="$defs")
    _check_values(schema, where)
    size = 1
    if "$ref" in schema:
        reference = schema["$ref"]
        if not isinstance(reference, str) or not reference.startswith(_REF):
            raise RequestError(
                "only references within the schema", field=where, value=str(reference)[:80], limit=_REF + "NAME"
            )
        if set(schema) - {"$ref", "title", "description", "$defs", "$schema"}:
            raise RequestError("$ref stands alone", field=where, value=sorted(schema))
        size += _size_of_definition(reference.removeprefix(_REF), definitions, sizes, via)
    for name, inner in _subschemas(schema, where):
        size += _size(inner, f"{where}.{name}", definitions, sizes, via)
    if size > MAX_NODES:
        raise LimitError("the schema is too large", field=where, value=size, limit=f"{MAX_NODES} subschemas")
    return size


def _subschemas(schema: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise RequestError("must be an object", field=f"{where}.properties", value=type(properties).__name__)
    yield from ((f"properties.{name[:40]}", inner) for name, inner in properties.items())
    for keyword in ("items", "additionalProperties"):
        if keyword in schema and not (keyword == "additionalProperties" and isinstance(schema[keyword], bool)):
            yield keyword, schema[keyword]
    for keyword in ("anyOf", "prefixItems"):
        listed = schema.get(keyword, [])
        if not isinstance(listed, list) or (keyword in schema and not listed):
            raise RequestError("must be a list of schemas", field=f"{where}.{keyword}", value=type(listed).__name__)
        yield from ((f"{keyword}[{number}]", inner) for number, inner in enumerate(listed))


def _check_values(schema: dict[str, Any], where: str) -> None:
    """Types and sizes of everything in a schema that is no schema."""
    kind = schema.get("type", [])
    if any(not isinstance(name, str) or name not in TYPES for name in (kind if isinstance(kind, list) else [kind])):
        raise RequestError("unknown type", field=f"{where}.type", value=str(kind)[:80], limit="|".join(TYPES))
    if kind == [] and "type" in schema:
        raise RequestError("no type", field=f"{where}.type")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise RequestError("must be a list of names", field=f"{where}.required")
    missing = [name for name in required if name not in (schema.get("properties") or {})]
    if missing:
        raise RequestError("required, but no property", field=f"{where}.required", value=missing[0][:80])
    if "enum" in schema and not (isinstance(schema["enum"], list) and 0 < len(schema["enum"]) <= MAX_NODES):
        raise RequestError("must be a list", field=f"{where}.enum", limit=f"1..{MAX_NODES} values")
    _check_ranges(schema, where)


def _check_ranges(schema: dict[str, Any], where: str) -> None:
    for names, most, whole in ((_COUNTS, MAX_COUNT, True), (_NUMBERS, MAX_NUMBER, False)):
        for name in names:
            value = schema.get(name, 0)
            number = isinstance(value, int) or (isinstance(value, float) and not whole and math.isfinite(value))
            if not number or isinstance(value, bool) or abs(value) > most or (whole and value < 0):
                limit = f"{0 if whole else -most}..{most}"
                raise RequestError("out of range", field=f"{where}.{name}", value=str(value)[:40], limit=limit)
    for low, high in (("minItems", "maxItems"), ("minLength", "maxLength"), ("minimum", "maximum")):
        if low in schema and high in schema and schema[low] > schema[high]:
            raise RequestError("an empty range", field=f"{where}.{low}", value=schema[low], limit=schema[high])


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
