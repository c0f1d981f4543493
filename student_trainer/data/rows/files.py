"""Files of rows: JSON Lines, JSON, CSV, TSV and Parquet, plain or gzipped, read with the place of every row.

In: a file; out: its rows in file order. The content decides between JSON Lines and a JSON list, and is told where the name says otherwise.
Must never skip a row it cannot read without handing it to the `Intake`.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from student_trainer.data.rows import json_text
from student_trainer.data.rows.formats import Row
from student_trainer.data.rows.intake import Intake
from student_trainer.errors import DataError

_MAX_CELL = 2**31 - 1


def suffix_of(path: Path) -> str:
    """The part of a file's name that says what it holds: ".jsonl", ".csv.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def read_file(name: str, path: Path, intake: Intake) -> list[Row]:
    """The rows of one file.

    Args:
        name: the file as errors call it.
    Raises:
        DataError: it cannot be read, is something else than its name says, or has a row that cannot be read and `intake` refuses it.
    """
    suffix = suffix_of(path)
    if suffix not in READERS:
        raise DataError(f"unknown file type; known: {', '.join(READERS)}", file=name, value=suffix)
    try:
        data = path.read_bytes()
        if suffix.endswith(".gz"):
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"is no whole gzip file: {error}", file=name) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=name) from error
    return READERS[suffix](name, data, intake)


def arrow_row(value: object, name: str, line: int) -> Row:
    """A row that comes from Arrow, without the nulls by which it fills up objects that other rows have more fields in."""
    if not isinstance(value, Mapping):
        raise DataError(f"a row must be an object, not {type(value).__name__}", file=name, line=line)
    return Row({key: _without_nulls(item) for key, item in value.items()}, name, line)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_json_lines(name: str, data: bytes, intake: Intake) -> list[Row]:
    _refuse_foreign(name, data)
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[" and (items := _whole_list(name, data)) is not None:
        intake.read_as = "a JSON list"
        return _rows_of(name, items, intake)
    return _lines(name, data, intake)


def _read_json(name: str, data: bytes, intake: Intake) -> list[Row]:
    _refuse_foreign(name, data)
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        return []
    if data.lstrip()[:1] == b"{" and _is_json_lines(data):
        intake.read_as = "JSON Lines"
        return _lines(name, data, intake)
    text = _decoded(data, name, 1)
    try:
        if text.lstrip()[:1] == "[":
            return _rows_of(name, json_text.parse_list(text), intake)
        value = json_text.parse(text)
    except json_text.JsonError as error:
        raise DataError(str(error), file=name, line=error.line) from error
    raise DataError(f"a .json source must hold a list of objects, not {_described(value)}", file=name)


def _read_csv(name: str, data: bytes, intake: Intake, *, delimiter: str = ",") -> list[Row]:
    """Every cell is text; a line break inside quotes belongs to its cell. Rows stand at the line where they begin."""
    _refuse_foreign(name, data)
    text = _decoded(data.removeprefix(b"\xef\xbb\xbf"), name, 1)
    before = csv.field_size_limit(_MAX_CELL)
    try:
        return list(_csv_rows(name, text, delimiter, intake))
    finally:
        csv.field_size_limit(before)


def _csv_rows(name: str, text: str, delimiter: str, intake: Intake) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"invalid CSV: {error}", file=name, line=line) from error
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header(name, cells, delimiter)
        elif len(cells) != len(header):
            found = f"the row has {len(cells)} cells, and the header {len(header)}; quote cells that hold the delimiter"
            intake.leave_out(DataError(found, file=name, line=line), cells)
        else:
            yield Row(dict(zip(header, cells, strict=True)), name, line)


def _header(name: str, cells: list[str], delimiter: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for other, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
        if len(header) == 1 and other != delimiter and other in header[0]:
            known = ".csv has commas, .tsv has tabs"
            raise DataError(f"looks separated by {word}; {known}", file=name, line=1, value=header[0])
    for i, column in enumerate(header):
        if not column or column in header[:i]:
            said = "stands twice in the header" if column else f"has no name in the header (column {i + 1})"
            raise DataError(f"a column {said}; the first line must name every column", file=name, line=1, value=column)
    return header


def _read_parquet(name: str, data: bytes, intake: Intake) -> list[Row]:
    import pyarrow.parquet  # slow to import, and needed only here

    del intake  # a row of a table can always be read
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        columns = table.schema.names
        values = table.to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"cannot be read as Parquet: {error}", file=name) from error
    if len(set(columns)) < len(columns):
        raise DataError("two columns have the same name", file=name, value=columns)
    return [arrow_row(value, name, i) for i, value in enumerate(values, start=1)]


def _lines(name: str, data: bytes, intake: Intake) -> list[Row]:
    """Rows of JSON Lines. Split at newlines only: str.splitlines would also cut at U+2028 inside a string. Blank lines hold no row."""
    rows = []
    for i, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json_text.parse(_decoded(line, name, i)), name, i))
        except json_text.JsonError as error:
            intake.leave_out(DataError(str(error), file=name, line=i), line.decode("utf-8", "replace"))
        except DataError as error:
            intake.leave_out(error, line.decode("utf-8", "replace"))
    return rows


def _rows_of(name: str, items: list[tuple[Any, int]], intake: Intake) -> list[Row]:
    rows = []
    for i, (value, _) in enumerate(items, start=1):
        try:
            rows.append(_row(value, name, i))
        except DataError as error:
            intake.leave_out(error, value)
    return rows


def _whole_list(name: str, data: bytes) -> list[tuple[Any, int]] | None:
    """The items if the data is one JSON list of more than lists, else None: then it is read line by line."""
    try:
        items = json_text.parse_list(_decoded(data, name, 1))
    except (json_text.JsonError, DataError):
        return None
    return items if any(isinstance(value, Mapping) for value, _ in items) else None


def _is_json_lines(data: bytes) -> bool:
    """Whether there are several lines and the first is an object by itself."""
    first, _, rest = data.strip().partition(b"\n")
    if not rest.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json_text.parse(first.decode()), dict)
    except (UnicodeDecodeError, json_text.JsonError):
        return False


def _described(value: object) -> str:
    if not isinstance(value, dict):
        return type(value).__name__
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if lists:
        return f"an object; the list under its key {lists[0]!r} may be meant: write that list alone"
    if value and all(isinstance(item, dict) for item in value.values()):
        return "an object of objects; it looks like pandas' to_json: write orient='records'"
    return "one object; write it in brackets, or as a line of a .jsonl file"


def _row(value: object, name: str, line: int) -> Row:
    if not isinstance(value, Mapping):
        raise DataError(f"a row must be an object, not {type(value).__name__}", file=name, line=line)
    return Row(value, name, line)


def _refuse_foreign(name: str, data: bytes) -> None:
    if found := json_text.foreign(data):
        raise DataError(f"looks like {found}", file=name)


def _decoded(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        broken = line + data[: error.start].count(b"\n")
        raise DataError(f"not UTF-8 at byte {error.start}", file=name, line=broken) from error


def _read_tsv(name: str, data: bytes, intake: Intake) -> list[Row]:
    return _read_csv(name, data, intake, delimiter="\t")


_PLAIN: dict[str, Callable[[str, bytes, Intake], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
READERS = {**_PLAIN, ".parquet": _read_parquet, **{f"{suffix}.gz": reader for suffix, reader in _PLAIN.items()}}
