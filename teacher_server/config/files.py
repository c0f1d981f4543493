"""Reading a configuration: a YAML file and `section.field=value` overrides, checked by a pydantic model, every fault named on one line.

In: a path, or plain data; out: plain data, or the model. Knows nothing of what is configured.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from teacher_server.config.yaml_scalars import Listing, Section, YamlError, read_override, read_yaml
from teacher_server.errors import ServerConfigError

Parsed = TypeVar("Parsed", bound=BaseModel)


class Settings(BaseModel):
    """A section of a config: frozen, no unknown keys, numbers are finite unless the field says otherwise.

    A field of several values takes a single one as a list of one; a field of text takes a number, or `true`, as it was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        written = given.written if isinstance(given, Section) else {}
        meant = dict(given)
        for name, field in cls.model_fields.items():
            if name in meant:
                meant[name] = _meant(field.annotation, meant[name], written.get(name))
        return meant


def _meant(annotation: Any, value: Any, written: str | None) -> Any:
    kinds = list(_alternatives(annotation))
    if written is not None and {str, Path} & set(kinds) and not {bool, int, float} & set(kinds):
        return written
    several = [kind for kind in kinds if get_origin(kind) is tuple]
    if not several:
        return value
    if isinstance(value, Listing) and str in _alternatives(get_args(several[0])[0]):
        return [value.written.get(place, item) for place, item in enumerate(value)]
    open_ended = get_args(several[0])[-1] is ...
    if value is None or isinstance(value, list | tuple) or str in kinds or not open_ended:
        return value
    return [written if written is not None and str in _alternatives(get_args(several[0])[0]) else value]


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The kinds of a union, without what is only said about them."""
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for kind in get_args(annotation):
            yield from _alternatives(kind)
    else:
        yield annotation


def read_tree(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The plain data of a config file with its overrides; of an override given twice the last counts.

    Raises:
        ServerConfigError: one line that names the file, and the lines of a key that is there twice.
    """
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServerConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ServerConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except YamlError as error:
        raise ServerConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ServerConfigError(
            f"{path}: must hold sections, not {type(tree).__name__ if tree is not None else 'nothing'}"
        )
    return override_tree(tree, overrides or [])


def override_tree(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`tree` with `section.field=value` overrides, which change it; of one given twice the last counts.

    Raises:
        ServerConfigError: one line that names the override.
    """
    for override in overrides:
        _override(tree, override)
    return tree


def parse_as(kind: type[Parsed], tree: dict[str, Any], origin: str) -> Parsed:
    """A config of a kind from plain data.

    Raises:
        ServerConfigError: one line that names `origin` and every wrong key.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ServerConfigError(f"{origin}: {_describe(error, tree, kind)}") from error


def _describe(error: ValidationError, tree: dict[str, Any], kind: type[BaseModel]) -> str:
    """Every wrong key of `tree` on one line, with the complaints about it and its value; nothing that only follows from another."""
    complaints: dict[tuple[str, str], list[str]] = {}
    meant: set[str] = set()  # keys that are missing since they are misspelt
    for item in error.errors(include_url=False):
        key = ".".join(_own_keys(item["loc"], tree, is_missing=item["type"] == "missing")) or "config"
        said = "missing" if item["type"] == "missing" else None
        if item["type"] == "extra_forbidden":
            near = _nearest(kind, item["loc"])
            said = "unknown key" + (f"; did you mean {near}?" if near else "")
            meant.add(f"{key.rpartition('.')[0]}.{near}".strip("."))
        if item["type"] == "union_tag_not_found":  # which section it is, is said by a key of it
            tag = item["ctx"]["discriminator"].strip("'")
            near = next(iter(difflib.get_close_matches(tag, map(str, item["input"]), n=1, cutoff=0.7)), "")
            key, said = (f"{key}.{near}", f"unknown key; did you mean {tag}?") if near else (f"{key}.{tag}", "missing")
        value = "" if said or isinstance(item["input"], dict) else f" (got {_shown(item['input'])})"
        complaints.setdefault((key, value), []).append(said or item["msg"].removeprefix("Value error, "))
    keys = [key for key, _ in complaints]
    return "; ".join(
        f"{key}: {', or '.join(said)}{value}"[:300]
        for (key, value), said in complaints.items()
        # of a list all of whose items are wrong pydantic says it is empty
        if not any(other.startswith(f"{key}.") for other in keys) and not (said == ["missing"] and key in meant)
    )


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def _own_keys(location: tuple[str | int, ...], tree: Any, *, is_missing: bool) -> Iterator[str]:
    """The parts of a location that a user has written: pydantic adds names of types where there are several."""
    for place, part in enumerate(location):
        one_of_one = isinstance(part, int) and not isinstance(tree, list | tuple)  # a scalar that was taken as a list
        there = isinstance(tree, dict | list | tuple) and (
            part in tree if isinstance(tree, dict) else isinstance(part, int) and part < len(tree)
        )
        if there and not one_of_one:
            tree = tree[part]
        if (there or (is_missing and place == len(location) - 1)) and not one_of_one:
            yield str(part)


def _nearest(kind: type[BaseModel], location: tuple[str | int, ...]) -> str:
    """What an unknown key was probably meant to be: a key of its section, else the same key in another section; or ""."""
    sections: list[Any] = [kind]
    for part in location[:-1]:
        inner = [
            field.annotation
            for section in sections
            for name, field in section.model_fields.items()
            if name == part  # else an index, or the name of a type, which leaves the sections as they are
        ]
        sections = [found for annotation in inner for found in _models(annotation)] or sections
    known = {name for section in sections for name in section.model_fields}
    unknown = str(location[-1])
    close = difflib.get_close_matches(unknown, sorted(known), n=1, cutoff=0.7)
    if close:
        return close[0]
    elsewhere = sorted(set(_paths(kind, unknown)))
    return elsewhere[0] if len(elsewhere) == 1 else ""


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold, alone or several."""
    for found in _alternatives(annotation):
        if isinstance(found, type) and issubclass(found, BaseModel):
            yield found
        else:
            for inner in get_args(found):
                yield from _models(inner)


def _paths(kind: type[BaseModel], leaf: str, before: str = "") -> Iterator[str]:
    """Dotted names of every field called `leaf`."""
    for name, field in kind.model_fields.items():
        if name == leaf:
            yield f"{before}{name}"
        for inner in _models(field.annotation):
            yield from _paths(inner, leaf, f"{before}{name}.")


def _override(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted key; a number steps into a list."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        raise ServerConfigError(
            f"override {override!r}: expected section.field=value (one config file is read, which stands first or behind --config)"
        )
    *parents, last = dotted.split(".")
    node: Any = tree
    for key in parents:
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = Section()
        node = node[_index(node, key, dotted)] if isinstance(node, list) else node[key]
        if not isinstance(node, dict | list):
            raise ServerConfigError(f"override {dotted}: {key} is not a section")
    try:
        value, written = read_override(text)
    except YamlError as error:
        raise ServerConfigError(
            f"override {dotted}: {error} (got {text[:60]!r}); text that YAML would read otherwise needs quotes"
        ) from error
    place = _index(node, last, dotted) if isinstance(node, list) else last
    node[place] = value
    if isinstance(node, Section | Listing):
        node.written.pop(place, None)
        if written is not None and (value is not None or not written) and not isinstance(value, str):
            node.written[place] = written


def _index(node: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ServerConfigError(f"override {dotted}: {key} is not an index below {len(node)}")
    return int(key)
