"""The reference pages of settings, from the config models alone: names, kinds, defaults and bounds from their fields, meanings from the
`Attributes` of their docstrings, which the JSON schemas read too.

In: a pydantic model; out: Markdown. A setting without a meaning is an error, so that none can be added without one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from student_trainer.config.run import TrainConfig
from student_trainer.config.schema.json_schema import fields_of
from student_trainer.config.traces import TracesConfig
from teacher_server.config.server import ServerConfig

MADE = "<!-- Made by `make reference` from the config models; edit their docstrings instead. -->\n"


@dataclass(frozen=True)
class Page:
    """One page of settings.

    Attributes:
        kind: the model of the whole file.
        title: of the page.
        intro: Markdown below it.
    """

    kind: type[BaseModel]
    title: str
    intro: str


_HABITS = (
    "Every setting can also be given behind the file as `section.field=value`; see [commands](commands.md). An unknown key is refused with the "
    "nearest known one, a value out of bounds with the field and its limit.\n"
)
PAGES: dict[str, Page] = {
    "run_settings": Page(
        TrainConfig,
        "Settings of a run",
        "The file that `student-trainer train`, `plan`, `label`, `check`, `compare` and `doctor` read. Only `run.output_dir`, `model.path` and "
        "`data.train` must be written, and `teacher` or `teachers` unless `loss.output` is null.\n\n" + _HABITS,
    ),
    "server_settings": Page(
        ServerConfig,
        "Settings of a server",
        "The file that `teacher-server up`, `check` and `doctor` read. `tenants` and `teachers` are followed while the server runs; `edge` and "
        "`ray` take a restart ([operating](../operate/operating.md)).\n\n" + _HABITS,
    ),
    "traces_settings": Page(
        TracesConfig,
        "Settings of traces",
        "The file that `student-trainer traces` reads ([reasoning traces](../train/traces.md)).\n\n" + _HABITS,
    ),
}  # fmt: skip


class UndescribedError(Exception):
    """A setting has no meaning in its model's docstring."""


def settings_page(page: Page) -> str:
    """The page as Markdown.

    Raises:
        UndescribedError: naming the settings that no docstring describes.
    """
    written: dict[type[BaseModel], str] = {}
    for path, model in sorted(_sections(page.kind, ""), key=lambda one: one[0].count(".")):
        written.setdefault(model, path or "The file")
    missing: list[str] = []
    parts = [f"# {page.title}\n\n{MADE}\n{page.intro}"]
    for path, model in _sections(page.kind, ""):
        heading = f"## {path or 'The file'}\n" if "." not in path else f"### {path}\n"
        if written[model] != (path or "The file"):
            parts.append(f"{heading}\nAs [{written[model]}](#{_slug(written[model])}).\n")
            continue
        told = meanings(model)
        missing += [f"{model.__name__}.{name}" for name in model.model_fields if name not in told]
        rows = "".join(_entry(path, name, field, told.get(name, "")) for name, field in model.model_fields.items())
        parts.append(f"{heading}\n{_first_paragraph(model)}\n\n{rows}")
    if missing:
        raise UndescribedError(f"no docstring says what these mean: {', '.join(missing)}")
    return _linked("\n".join(parts))


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a model, and of those it extends, say of each setting; of a section that has none, its own first paragraph."""
    told: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel and base.__doc__:
            told |= fields_of(inspect.cleandoc(base.__doc__))
    for name, field in model.model_fields.items():
        inner = next(models_in(field.annotation), None)
        if name not in told and inner is not None:
            told[name] = _first_paragraph(inner)
    return told


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field may hold."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from models_in(inner)


def _sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and all sections below it, in the order of their fields, with their dotted names."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = list(models_in(field.annotation))
        below = f"{path}.{name}" if path else name
        below += "[]" if _holds(field.annotation, tuple) else ".NAME" if _holds(field.annotation, dict) else ""
        for one in inner:
            kind = one.model_fields["kind"].default if len(inner) > 1 and "kind" in one.model_fields else ""
            yield from _sections(
                one, f"{below} ({kind})" if kind and isinstance(kind, str) and len(inner) > 1 else below
            )


def _holds(annotation: Any, container: type) -> bool:
    if get_origin(annotation) is container:
        return True
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return any(_holds(inner, container) for inner in get_args(annotation))
    return False


def _entry(path: str, name: str, field: FieldInfo, meaning: str) -> str:
    dotted = f"{path}.{name}" if path else name
    default = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    kind = _kind(field.annotation, field.metadata)
    if next(models_in(field.annotation), None) is not None:
        kind = re.sub(r"a section|sections", lambda found: f"[{found[0]}](#{_slug(_below(path, name, field))})", kind)
    said = "**required**" if default is PydanticUndefined else f"default {_value(default)}"
    if isinstance(default, BaseModel):
        said = "its own defaults if left out"
    return f'- <a id="key-{_anchor(dotted)}"></a>**`{name}`** ({kind}; {said}): {_sentence(meaning)}\n'


def _below(path: str, name: str, field: FieldInfo) -> str:
    """The heading of the first section that a field holds."""
    below = f"{path}.{name}" if path else name
    below += "[]" if _holds(field.annotation, tuple) else ".NAME" if _holds(field.annotation, dict) else ""
    inner = list(models_in(field.annotation))
    kinds = [one.model_fields["kind"].default for one in inner if "kind" in one.model_fields]
    return f"{below} ({kinds[0]})" if len(inner) > 1 and kinds else below


def _slug(heading: str) -> str:
    """The anchor that Markdown gives a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def _sentence(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", ":")) else f"{text}."


def _first_paragraph(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        changed = {
            name: getattr(value, name)
            for name in type(value).model_fields
            if value.model_fields_set and name in value.model_fields_set
        }
        return "its own" if not changed else f"`{changed}`"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, Path):
        return f"`{str(value).replace(str(Path.home()), '~')}`"
    if isinstance(value, tuple | list):
        return "`[" + ", ".join(_value(item).strip("`") for item in value) + "]`"
    if isinstance(value, dict):
        return "`{}`" if not value else "`" + str(value) + "`"
    if value == "":
        return "empty"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


_PLAIN = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "`true` or `false`",
    Path: "path",
    NoneType: "`null`",
    Any: "any value",
}


def _kind(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type as a person says it, with its bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], (*inner[1:], *metadata))
    bounds = _bounds(metadata)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        sections = [one for one in inner if inspect.isclass(one) and issubclass(one, BaseModel)]
        others = [_kind(one, metadata) for one in inner if one not in sections and one is not NoneType]
        none = ["`null`"] if NoneType in inner else []
        return " or ".join(dict.fromkeys([*others, *(["a section"] if sections else []), *none]))
    if origin is tuple:
        if inner[-1] is ...:
            return f"list of {_many(_kind(inner[0]))}{bounds}"
        return f"[{', '.join(_kind(one) for one in inner)}]"
    if origin is dict or annotation is dict:
        return f"names to {_many(_kind(inner[1]))}" if inner else "names to values"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "a section"
    if annotation in _PLAIN:
        return _PLAIN[annotation] + bounds
    return getattr(annotation, "__name__", str(annotation)) + bounds


def _many(kind: str) -> str:
    return {"integer": "integers", "number": "numbers", "text": "texts", "path": "paths", "a section": "sections"}.get(
        kind, kind
    )


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> str:
    flat: list[Any] = []
    for one in metadata:
        flat += list(one.metadata) if isinstance(one, FieldInfo) else [one]
    said = []
    for one in flat:
        for name, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if getattr(one, name, None) is not None:
                said.append(f"{word} {getattr(one, name):,}".replace(",", "\N{NO-BREAK SPACE}"))
        if getattr(one, "min_length", None):
            said.append("not empty")
    return f", {', '.join(dict.fromkeys(said))}" if said else ""


def _anchor(path: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", path.lower()).strip("-")


def _linked(text: str) -> str:
    """Names of pages as links, relative to docs/reference."""
    return re.sub(
        r"(?<![\w/`])docs/([\w/-]+)\.md",
        lambda found: f"[{found[1].rpartition('/')[2]}](../{found[1]}.md)".replace("_", " ", 0),
        text,
    )
