"""YAML as this house reads it: every key once, and scalars as a person means them.

In: the text of a file or of an override; out: plain data. Knows nothing of what is configured. The other house has the same reader,
since neither imports the other; `tests/cases/test_config_twice.py` holds both to the same answers.

Scalars follow YAML 1.2: only `true` and `false` are booleans, `010` is ten, `1:30` and `2024-01-01` are text, `1e-4` is a number. A container
remembers how its plain scalars were written, so that a field that takes text gets `1.50`, not `1.5`.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_KINDS = ("map", "seq", "str", "bool", "int", "float", "null", "merge")
_MAX_NODES = 100_000  # aliases counted as often as they are used: a file of 1 KB can otherwise unfold to gigabytes


class Section(dict[str, Any]):
    """A mapping; `written` has the source text of its plain scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str | int, str] = {}


class Listing(list[Any]):
    """A sequence; `written` has the source text of its plain scalars by index."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str | int, str] = {}


class YamlError(ValueError):
    """The text cannot be read; one line that says where and why."""


class _Resolver(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", "<<", "<"),
):  # fmt: skip
    _Resolver.add_implicit_resolver(
        _TAG + _kind, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )


def read_yaml(text: str) -> Any:
    """The plain data of a YAML text.

    Raises:
        YamlError: not YAML, a key twice in one mapping (both lines are named), or an alias inside what it names.
    """
    try:
        loader = _Resolver(text)
        node = loader.get_single_node()
        return None if node is None else _Builder().build(node)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlError(f"not YAML: {where}{', '.join(filter(None, (error.context, error.problem)))}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"not YAML: line {line}: the character U+{error.character:04X} is not allowed") from error
    except RecursionError as error:
        raise YamlError("not YAML: nested too deeply") from error


def read_override(text: str) -> tuple[Any, str | None]:
    """The value of an override, and how it was written if it is a plain scalar.

    What begins with a quote, `[` or `{` is YAML; all else is one plain scalar and kept whole, with every ` #` and `: ` in it.

    Raises:
        YamlError: not YAML, or something stands behind the closing quote or bracket.
    """
    text = text.strip()
    if text[:1] not in ('"', "'", "[", "{"):
        tag = _Resolver("").resolve(yaml.ScalarNode, text, (True, False))
        return _Builder().scalar(yaml.ScalarNode(tag, text)), text
    try:
        node = yaml.compose(text, _Resolver)
        end = len(text) if node is None else node.end_mark.index
    except yaml.YAMLError:
        end = len(text)  # read_yaml says what is wrong with it
    if text[end:].strip():
        raise YamlError(f"{text[end:].strip()[:60]!r} stands behind the value: put quotes around all of it")
    return read_yaml(text), None


class _Builder:
    """Plain data of nodes."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._nodes = 0

    def build(self, node: yaml.Node) -> Any:
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise YamlError(f"not a config: more than {_MAX_NODES:,} values")
        if node.tag.removeprefix(_TAG) not in _KINDS:
            raise YamlError(f"line {_line(node)}: the tag {node.tag.replace(_TAG, '!!')} is not read here")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if id(node) in self._open:
            raise YamlError(f"line {_line(node)}: an alias stands inside what it names")
        self._open.add(id(node))
        assert isinstance(node, yaml.MappingNode | yaml.SequenceNode)
        found = self._section(node) if isinstance(node, yaml.MappingNode) else self._listing(node)
        self._open.discard(id(node))
        return found

    def scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value.lower().replace("_", "")
        if kind == "null":
            return None
        if kind == "bool" and text in ("true", "false"):
            return text == "true"
        if kind not in ("int", "float"):
            return node.value
        try:
            if kind == "float":
                return float(text.replace(".inf", "inf").replace(".nan", "nan"))
            return int(text, 16 if text.startswith("0x") else 10)
        except (
            ValueError
        ):  # no number after all, or more digits than Python reads: whoever takes it says what it may be
            return node.value

    def _listing(self, node: yaml.SequenceNode) -> Listing:
        found = Listing()
        for place, item in enumerate(node.value):
            found.append(self.build(item))
            _remember(found.written, place, item, found[place])
        return found

    def _section(self, node: yaml.MappingNode) -> Section:
        lines: dict[str, int] = {}
        merged: list[Section] = []
        found = Section()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(f"line {_line(key)}: a key is a name, not a list or a section")
            name = key.value
            if name in lines:
                where = f"lines {lines[name]} and {_line(key)}" if lines[name] != _line(key) else f"line {_line(key)}"
                raise YamlError(f"{where}: the key {name!r} is there twice; keep one of them")
            lines[name] = _line(key)
            built = self.build(value)
            if key.tag == _TAG + "merge":
                merged += built if isinstance(built, list) else [built]
                continue
            found[name] = built
            _remember(found.written, name, value, built)
        for section in merged:  # what stands in the mapping itself wins, then the first that is merged
            if not isinstance(section, Section):
                raise YamlError(f"line {_line(node)}: << takes a section, or a list of them")
            for name, value in section.items():
                if name not in found:
                    found[name] = value
                    if name in section.written:
                        found.written[name] = section.written[name]
        return found


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _remember(written: dict[str | int, str], place: str | int, node: yaml.Node, built: Any) -> None:
    if isinstance(node, yaml.ScalarNode) and isinstance(built, bool | int | float):
        written[place] = node.value
