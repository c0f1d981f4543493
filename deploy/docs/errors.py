"""The error index: every public error class with its cause and the way out.

Names, sentences, families, exit codes and gRPC codes come from the classes; causes and ways out from `errors.yaml`, which must name every class
and no other.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import NamedTuple

import yaml

from student_trainer import errors as student_errors
from student_trainer.errors import exit_code_of
from teacher_wire.core import errors as wire_errors
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.transport.status_table import CODE_OF, RETRYABLE

ROOT = Path(__file__).parents[2]
HOUSES = {
    "teacher_wire": ROOT / "proto" / "teacher_wire",
    "student_trainer": ROOT / "student_trainer",
    "teacher_server": ROOT / "teacher_server",
}
TOLD = Path(__file__).parent / "errors.yaml"
TITLES = {
    "teacher_wire": "Between student and teacher",
    "student_trainer": "At the student",
    "teacher_server": "At the server",
}


class ErrorClass(NamedTuple):
    """One exception class as its source says it: no module is imported for it, since some import torch."""

    name: str
    module: str
    bases: tuple[str, ...]
    sentence: str


@functools.cache
def error_classes() -> tuple[ErrorClass, ...]:
    """Every public exception class of the three packages, in the order of their files."""
    classes: list[ErrorClass] = []
    for house, folder in HOUSES.items():
        for path in sorted(folder.rglob("*.py")):
            module = ".".join((house, *path.relative_to(folder).with_suffix("").parts))
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    bases = tuple(
                        base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in node.bases
                    )
                    sentence = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
                    classes.append(ErrorClass(node.name, module, bases, sentence))
    by_name: dict[str, list[ErrorClass]] = {}
    for one in classes:
        by_name.setdefault(one.name, []).append(one)

    def is_error(name: str, seen: frozenset[str] = frozenset()) -> bool:
        if name in ("Exception", "BaseException") or (name.endswith("Error") and name not in by_name):
            return True
        return name not in seen and any(
            is_error(base, seen | {name}) for one in by_name.get(name, []) for base in one.bases
        )

    return tuple(one for one in classes if not one.name.startswith("_") and any(is_error(base) for base in one.bases))


def told() -> dict[str, dict[str, str]]:
    """`errors.yaml`: name of a class -> `cause` and `fix`, or `inside` for one that never reaches a user."""
    read: dict[str, dict[str, str]] = yaml.safe_load(TOLD.read_text())
    return read


def error_page() -> str:
    """The page as Markdown."""
    said, parts, inside = told(), [_HEAD], set[str]()
    for house, title in TITLES.items():
        parts.append(f"## {title}\n")
        for one in error_classes():
            if not one.module.startswith(f"{house}."):
                continue
            entry = said[one.name]
            if "inside" in entry:
                inside.add(f"| `{one.name}` | `{one.module}` | {entry['inside']} |")
                continue
            parts.append(
                f"### {one.name}\n\n{one.sentence}\n\n`{one.module}`; {'an' if one.bases[0][0] in 'AEIOU' else 'a'} {one.bases[0]}; {'; '.join(_facts(one, entry))}.\n\n"
                f"- **Cause**: {entry['cause']}\n- **Way out**: {entry['fix']}\n"
            )
    rows = "\n".join(sorted(inside))
    parts.append(
        "## Inside\n\nThese end nothing: the code that meets one turns it into what is said here.\n\n"
        f"| class | module | becomes |\n|---|---|---|\n{rows}\n"
    )
    return "\n".join(parts)


def _facts(one: ErrorClass, entry: dict[str, str]) -> list[str]:
    """gRPC code, whether a student retries, and exit code, of the class or of the nearest one above it that may be imported."""
    if "exit" in entry:
        return [f"exit code {entry['exit']}"]
    above = {other.name: other for other in error_classes()}
    while (cls := getattr(wire_errors, one.name, None) or getattr(student_errors, one.name, None)) is None:
        one = above[one.bases[0]]
    if not issubclass(cls, TeacherWireError):
        return [f"exit code {cls.exit_code}"]
    code = [f"gRPC {CODE_OF[cls].name}"] if cls in CODE_OF else []
    retried = ["retried by the student by itself"] if issubclass(cls, RETRYABLE) else []
    return [*code, *retried, f"exit code {exit_code_of(cls(''))}"]


_HEAD = """# Errors

<!-- Made by `make reference` from the error classes and deploy/docs/errors.yaml. -->

Whatever a user, an operator or the other machine can cause is one line that names field, value and limit, and one of these classes. A traceback is a
fault of ours: please report it. The commands print the sentence; the class is what Python code catches and what travels on the wire. What a command's exit code means is in [commands](commands.md#exit-codes); symptoms rather than names are in
[troubleshooting](../operate/troubleshooting.md).
"""
