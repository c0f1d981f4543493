"""Reading a configuration: a YAML file and `section.field=value` overrides, checked by a pydantic model, every fault named on one line.

In: a path, or plain data; out: plain data, or the model. Knows nothing of what is configured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from student_trainer.errors import ConfigError

Parsed = TypeVar("Parsed", bound=BaseModel)


def read_tree(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The plain data of a config file with its overrides.

    Raises:
        ConfigError: one line that names the file.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections, not {type(tree).__name__}")
    for override in overrides or []:
        _override(tree, override)
    return tree


def parse_as(kind: type[Parsed], tree: dict[str, Any], origin: str) -> Parsed:
    """A config of a kind from plain data.

    Raises:
        ConfigError: one line that names `origin` and every wrong key.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_describe(error, tree)}") from error


def _describe(error: ValidationError, tree: dict[str, Any]) -> str:
    """Every wrong key of `tree` on one line, with the complaints about it and its value."""
    complaints: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        key = ".".join(_own_keys(item["loc"], tree, is_missing=item["type"] == "missing")) or "config"
        said = {"extra_forbidden": "unknown key", "missing": "missing"}.get(item["type"])
        value = "" if said or isinstance(item["input"], dict) else f" (got {item['input']!r})"
        complaints.setdefault((key, value), []).append(said or item["msg"].removeprefix("Value error, "))
    deeper = [key for key, _ in complaints]
    return "; ".join(
        f"{key}: {', or '.join(said)}{value}"[:300]
        for (key, value), said in complaints.items()
        if not any(
            other.startswith(f"{key}.") for other in deeper
        )  # of a list all of whose items are wrong pydantic says it is empty
    )


def _own_keys(location: tuple[str | int, ...], tree: Any, *, is_missing: bool) -> Iterator[str]:
    """The parts of a location that a user has written: pydantic adds names of types where there are several."""
    for place, part in enumerate(location):
        there = isinstance(tree, dict | list | tuple) and (
            part in tree if isinstance(tree, dict) else isinstance(part, int)
        )
        if there:
            tree = tree[part]
        if there or (is_missing and place == len(location) - 1):
            yield str(part)


def _override(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted key; a number steps into a list."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r}: expected section.field=value")
    *parents, last = dotted.split(".")
    node: Any = tree
    for key in parents:
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[_index(node, key, dotted)] if isinstance(node, list) else node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {dotted}: {key} is not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {dotted}: not a YAML value: {text}") from error
    node[_index(node, last, dotted) if isinstance(node, list) else last] = value


def _index(node: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"override {dotted}: {key} is not an index below {len(node)}")
    return int(key)
