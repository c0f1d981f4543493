"""Where rows come from: files and folders of rows, and `save_to_disk` folders or hub ids through `datasets`.

In: a `DataSource`. Out: its rows, with their places, in file order.
Must never skip a row it cannot read without handing it to the `Intake`, nor sample by a random state: the same source gives the same
rows for ever.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from student_trainer.data.rows.files import READERS, arrow_row, read_file, suffix_of
from student_trainer.data.rows.formats import Row, known_fields
from student_trainer.data.rows.intake import Intake
from student_trainer.errors import DataError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What files are called that belong to one split, as `datasets` reads folders.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
           "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}  # fmt: skip
_ABOUT_DATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # files of `datasets` without rows
_OTHER_MEDIA = re.compile(r"\b(Image|Audio|Video|Pdf|Nifti|Mesh)\(")


@dataclass(frozen=True)
class DataSource:
    """Rows, or a sample of them.

    Attributes:
        path: a file, a folder, or a hub id; `~` is the home folder.
        sample: how many rows to take; None for all. The sample of n is part of the sample of n + 1.
        format: a key of `formats.FORMATS`, or "auto".
        split: which split of a folder or hub id; files have none.
        columns: name in the rows -> name that formats know; None: the field is left out on purpose.
        subset: which configuration of a hub id, for those that have several.
        tags: of all of its rows (`data.routing`).
    """

    path: str
    sample: int | None = None
    format: str = "auto"
    split: str = "train"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    subset: str | None = None
    tags: tuple[str, ...] = ()


def parse_source(text: str, format_name: str = "auto") -> DataSource:
    """`path` or `path#N` -> source; a file or folder whose own name has the # stands before a sample.

    Raises:
        DataError: N is not a positive integer, or there is no path.
    """
    path, mark, count = text.rpartition("#") if "#" in text else (text, "", "")
    if mark and local_path(text).exists():
        return DataSource(text, None, format_name)
    if not path:
        raise DataError("a source is written path or path#N", field="source", value=text)
    if mark and not (count.isascii() and count.isdigit() and int(count) > 0):
        message = "no such file or folder, and the sample after # must be a positive integer"
        raise DataError(message, field="source", value=text)
    return DataSource(path, int(count) if mark else None, format_name)


def read_source(source: DataSource, intake: Intake | None = None) -> list[Row]:
    """The rows of `source`, in file order.

    Args:
        intake: takes lines that are no rows; None refuses them.
    Raises:
        DataError: a missing, unreadable or empty source, a line that is no JSON object, a sample above its rows, or a wrong column.
    """
    intake = intake or Intake()
    before = len(intake.bad)
    path = local_path(source.path)
    if path.is_file():
        rows = read_file(source.path, path, intake)
    elif path.is_dir():
        rows = _read_folder(source, path, intake)
    elif HUB_ID.fullmatch(source.path) and suffix_of(path) not in READERS:
        rows = _read_datasets(source)
    else:
        several = "; several sources are written as a list: [a.jsonl, b.jsonl]" if "," in source.path else ""
        raise DataError(f"no such file or folder{several}", file=source.path)
    if not rows and len(intake.bad) > before:
        raise intake.all_bad(source.path, intake.bad[before:])
    if not rows:
        raise DataError("the source is empty", file=source.path)
    _check_columns(source, rows)
    if source.sample is not None:
        rows = _sample(source, rows, source.sample)
    return [_renamed(row, source.columns) for row in rows] if source.columns else rows


def local_path(text: str) -> Path:
    """Where a source's path points on this machine, whether or not anything is there.

    Raises:
        DataError: `~` of somebody who has no home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise DataError(f"no home folder: {error}", file=text) from error


def _sample(source: DataSource, rows: list[Row], count: int) -> list[Row]:
    """`count` rows in file order: those whose hashed number is smallest (counter-based, no state).

    The number is the line; in a folder, where several files have the same lines, the position in the whole.
    """
    if not 0 < count <= len(rows):
        raise DataError(f"cannot sample {count} of {len(rows)} rows", file=source.path, field="sample", value=count)
    one_file = rows[0].file == rows[-1].file
    numbers = [row.line for row in rows] if one_file else list(range(1, len(rows) + 1))
    ranked = sorted(range(len(rows)), key=lambda i: hashlib.blake2b(str(numbers[i]).encode(), digest_size=16).digest())
    return [rows[i] for i in sorted(ranked[:count])]


def _check_columns(source: DataSource, rows: list[Row]) -> None:
    """Refuses a mapping that cannot be meant: of a column that no row has, or to a name that no format knows."""
    targets = [target for target in source.columns.values() if target is not None]
    for column, target in source.columns.items():
        place = f"columns.{column}"
        if target is not None and target not in known_fields():
            known = ", ".join(sorted(known_fields()))
            raise DataError(f"no format has such a field; known: {known}", file=source.path, field=place, value=target)
        if target is not None and targets.count(target) > 1:
            raise DataError("two columns cannot be mapped to one field", file=source.path, field=place, value=target)
        if not any(column in row.fields for row in rows):
            found = ", ".join(sorted(map(str, rows[0].fields)))
            raise DataError(f"no row has this column; the first has: {found}", file=source.path, field=place)


def _renamed(row: Row, columns: Mapping[str, str | None]) -> Row:
    """The row under the names that formats know."""
    kept = {name: value for name, value in row.fields.items() if name not in columns}
    renamed = {target: name for name, target in columns.items() if target is not None and name in row.fields}
    for target, name in renamed.items():
        if kept.get(target) is not None:
            message = f"the row has a {target} already; leave that out with columns: {{{target}: null}}"
            raise DataError(message, file=row.file, line=row.line, field=f"columns.{name}", value=target)
    return replace(
        row, fields={**kept, **{target: row.fields[name] for target, name in renamed.items()}}, renamed=renamed
    )


def _read_folder(source: DataSource, path: Path, intake: Intake) -> list[Row]:
    """A `save_to_disk` folder, a folder that describes itself to `datasets`, or files of rows in the order of their names."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _read_datasets(source, saved=True)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    of_rows = [file for file in files if suffix_of(file) in READERS and file.name not in _ABOUT_DATA]
    if not of_rows:
        raise DataError(f"no file of rows in the folder; known: {', '.join(READERS)}", file=source.path)
    if describes_itself(path):
        return _read_datasets(source)
    by_split: dict[str, list[Path]] = {}
    for file in of_rows:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if by_split.keys() == {""}:
        chosen = of_rows
    else:
        if "" in by_split:
            named = ", ".join(sorted(by_split.keys() - {""}))
            stray = by_split[""][0].relative_to(path)
            message = (
                f"some files are named after splits ({named}), others are not ({stray}); name the files as sources"
            )
            raise DataError(message, file=source.path)
        wanted = _SPLITS.get(source.split, source.split)
        if wanted not in by_split:
            raise DataError(
                f"no such split; there are: {', '.join(sorted(by_split))}",
                file=source.path,
                field="split",
                value=source.split,
            )
        chosen = by_split[wanted]
    rows: list[Row] = []
    read_as: set[str] = set()
    for file in chosen:
        intake.read_as = ""
        rows += read_file(str(Path(source.path) / file.relative_to(path)), file, intake)
        read_as |= {intake.read_as} - {""}
    intake.read_as = " and ".join(sorted(read_as))
    return rows


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def describes_itself(path: Path) -> bool:
    """Whether a README of the folder tells `datasets` which files are which split."""
    readme = path / "README.md"
    if not readme.is_file():
        return False
    head = re.match(r"---\s*\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL)
    return head is not None and re.search(r"^configs:", head[1], re.MULTILINE) is not None


def _split_of(path: Path) -> str:
    """The split that a file's name, else a folder's, belongs to, or ""."""
    for part in reversed(path.parts):
        for word in re.split(r"[^A-Za-z]+", part):
            if word.lower() in _SPLITS:
                return _SPLITS[word.lower()]
    return ""


def _read_datasets(source: DataSource, *, saved: bool = False) -> list[Row]:
    import datasets  # slow to import, and needed only here

    try:
        loaded: Any
        if saved:
            loaded = datasets.load_from_disk(str(local_path(source.path)))
        else:
            local = local_path(source.path)
            name = {} if source.subset is None else {"name": source.subset}
            loaded = datasets.load_dataset(str(local) if local.is_dir() else source.path, split=source.split, **name)
    except Exception as error:  # the library raises anything from OSError to its own and the hub's errors
        message = f"neither a local file nor readable by datasets (split={source.split}): {error}"
        raise DataError(message, file=source.path) from error
    if isinstance(loaded, Mapping):  # a DatasetDict
        if source.split not in loaded:
            known = ", ".join(map(str, loaded))
            raise DataError(f"no such split; there are: {known}", file=source.path, field="split", value=source.split)
        loaded = loaded[source.split]
    left_out = _media_left_out(source, loaded)
    rows: Iterable[object] = loaded.remove_columns(left_out) if left_out else loaded
    try:
        found = [arrow_row(value, source.path, i) for i, value in enumerate(rows, start=1)]
        return [replace(row, fields={**row.fields, **dict.fromkeys(left_out)}) for row in found] if left_out else found
    except DataError:
        raise
    except Exception as error:  # reading what was downloaded half, or needs a decoder
        raise DataError(f"cannot be read by datasets: {error}", file=source.path) from error


def _media_left_out(source: DataSource, loaded: Any) -> list[str]:
    """Columns of images and sounds that the config leaves out; others are refused before anything tries to decode them."""
    columns = []
    for name, feature in (getattr(loaded, "features", None) or {}).items():
        if found := _OTHER_MEDIA.search(repr(feature)):
            if source.columns.get(name, "") is not None:
                message = (
                    f"the column holds {found[1]} values, and rows of text alone can be learned from; leave it out with"
                )
                raise DataError(f"{message} columns: {{{name}: null}}", file=source.path, field=name)
            columns.append(name)
    return columns
