"""Where rows come from: JSONL and JSON files, and folders or hub ids through `datasets`.

In: a `DataSource`. Out: its rows, with their places, in file order.
Must never skip a row it cannot read, nor sample by a random state: the same source gives the same rows for ever.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from student_trainer.data.formats import Row
from student_trainer.errors import DataError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILE_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class DataSource:
    """Rows, or a sample of them.

    Attributes:
        path: a .jsonl or .json file, a folder, or a hub id.
        sample: how many rows to take; None for all. The sample of n is part of the sample of n + 1.
        format: a key of `formats.FORMATS`, or "auto".
        split: which split of a folder or hub id; files have none.
    """

    path: str
    sample: int | None = None
    format: str = "auto"
    split: str = "train"


def parse_source(text: str, format_name: str = "auto") -> DataSource:
    """`path` or `path#N` -> source.

    Raises:
        DataError: N is not a positive integer, or there is no path.
    """
    path, mark, count = text.rpartition("#") if "#" in text else (text, "", "")
    if not path:
        raise DataError("a source is written path or path#N", field="source", value=text)
    if mark and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise DataError("the sample after # must be a positive integer", field="source", value=text)
    return DataSource(path, int(count) if mark else None, format_name)


def read_source(source: DataSource) -> list[Row]:
    """The rows of `source`, in file order.

    Raises:
        DataError: a missing, unreadable or empty source, a line that is no JSON object, a sample above its rows.
    """
    path = Path(source.path)
    if path.is_file():
        rows = _read_file(source.path, path)
    elif path.is_dir() or (HUB_ID.fullmatch(source.path) and path.suffix not in FILE_SUFFIXES):
        rows = _read_datasets(source)
    else:
        raise DataError("no such file or folder", file=source.path)
    if not rows:
        raise DataError("the source is empty", file=source.path)
    return rows if source.sample is None else _sample(rows, source.sample)


def _sample(rows: list[Row], count: int) -> list[Row]:
    """`count` rows in file order: those whose hashed line number is smallest (counter-based, no state)."""
    if not 0 < count <= len(rows):
        raise DataError(f"cannot sample {count} of {len(rows)} rows", file=rows[0].file, field="sample", value=count)
    ranked = sorted(rows, key=lambda row: hashlib.blake2b(str(row.line).encode(), digest_size=16).digest())
    return sorted(ranked[:count], key=lambda row: row.line)


def _read_file(name: str, path: Path) -> list[Row]:
    if path.suffix not in FILE_SUFFIXES:
        raise DataError(f"unknown file type; known: {', '.join(FILE_SUFFIXES)}", file=name, value=path.suffix)
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=name) from error
    return _json_lines(name, data) if path.suffix == ".jsonl" else _json_list(name, data)


def _json_lines(name: str, data: bytes) -> list[Row]:
    # Split at newlines only: str.splitlines would also cut at U+2028 inside a string. Blank lines hold no row.
    lines = ((i, line) for i, line in enumerate(data.split(b"\n"), start=1) if line.strip())
    return [_row(_parse_json(line, name, i), name, i) for i, line in lines]


def _json_list(name: str, data: bytes) -> list[Row]:
    if not data.strip():
        return []
    values = _parse_json(data, name, 1)
    if not isinstance(values, list):
        raise DataError(f"a .json source must hold a list of objects, not {type(values).__name__}", file=name)
    return [_row(value, name, i) for i, value in enumerate(values, start=1)]


def _parse_json(data: bytes, name: str, line: int) -> object:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        broken = line + data[: error.start].count(b"\n")
        raise DataError(f"not UTF-8 at byte {error.start}", file=name, line=broken) from error
    except json.JSONDecodeError as error:
        message = f"invalid JSON: {error.msg} at column {error.colno}"
        raise DataError(message, file=name, line=line + error.lineno - 1) from error
    except RecursionError as error:
        raise DataError("JSON nested too deeply", file=name, line=line) from error


def _row(value: object, name: str, line: int) -> Row:
    if not isinstance(value, Mapping):
        raise DataError(f"a row must be an object, not {type(value).__name__}", file=name, line=line)
    return Row(value, name, line)


def _read_datasets(source: DataSource) -> list[Row]:
    import datasets  # slow to import, and needed only here

    try:
        rows: Iterable[object] = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the library raises anything from OSError to its own and the hub's errors
        message = f"neither a local file nor readable by datasets (split={source.split}): {error}"
        raise DataError(message, file=source.path) from error
    return [_row(value, source.path, i) for i, value in enumerate(rows, start=1)]
