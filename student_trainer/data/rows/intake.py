"""What happens to rows on their way in: what each source was found to hold, and the rows that were refused or left out.

In: errors of single rows, facts of sources; out: a line to be told for each source, and `bad_rows.jsonl`.
Must never lose a row without counting it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from student_trainer.errors import DataError
from student_trainer.files import write_whole

BadRowPolicy = Literal["refuse", "skip"]
BAD_ROWS_NAME = "bad_rows.jsonl"


@dataclass(frozen=True)
class BadRow:
    """A row that was left out.

    Attributes:
        file, line: its place, as errors name it.
        reason: what is wrong with it, without the place.
        row: its fields, or the text of a line that is no JSON object.
    """

    file: str
    line: int
    reason: str
    row: Any


@dataclass(frozen=True)
class SourceFacts:
    """What one source was found to hold.

    Attributes:
        path: as the config names it.
        rows: how many rows are learned from, before traces become tasks and long rows are dropped.
        format: what they were recognised as.
        read_as: how the file was read where its name says otherwise, else "".
        unused: fields that are neither used nor change the meaning, sorted.
        fields: every field that a good row of it has, sorted.
    """

    path: str
    rows: int
    format: str
    read_as: str = ""
    unused: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """One line."""
        parts = [f"{self.path}: {self.rows:,} row{'' if self.rows == 1 else 's'}, {self.format}"]
        parts += [f"it holds {self.read_as}, which its name does not say, and is read as that"] * bool(self.read_as)
        shown = self.unused[:12]
        more = f" and {len(self.unused) - len(shown)} more" if len(self.unused) > len(shown) else ""
        parts += [f"not used: {', '.join(shown)}{more}"] * bool(shown)
        return "; ".join(parts)


class Intake:
    """Rows that cannot be used, by policy: the first one ends the reading, or they are kept aside.

    Attributes:
        policy: `refuse` or `skip`.
        bad: the rows left out so far, as they were found: source by source, unreadable lines first, then what the formats and at
            last what the template refuses; always empty under `refuse`.
        sources: what the sources hold, in order.
    """

    def __init__(self, policy: BadRowPolicy = "refuse") -> None:
        self.policy = policy
        self.bad: list[BadRow] = []
        self.sources: list[SourceFacts] = []
        self.read_as = ""  # of the source that is being read

    def leave_out(self, error: DataError, row: Any) -> None:
        """Keeps a row aside.

        Raises:
            DataError: `error` itself, under `refuse`.
        """
        if self.policy == "refuse":
            raise error
        last = self.bad[-1] if self.bad else None
        if last is None or (last.file, last.line) != (error.file, error.line):  # both tasks of a trace may fail
            self.bad.append(BadRow(error.file, error.line, _reason(error), row))

    def found(self, path: str, rows: Sequence[Any], format_name: str, unused: Iterable[str]) -> None:
        """Notes what a source holds that was read, from its good `Row`s."""
        fields = sorted({str(field) for row in rows for field in row.fields})
        self.sources.append(
            SourceFacts(path, len(rows), format_name, self.read_as, tuple(sorted(unused)), tuple(fields))
        )
        self.read_as = ""

    def all_bad(self, path: str, bad: Sequence[BadRow]) -> DataError:
        """The error to raise where a source has nothing but rows left out."""
        first = bad[0]
        said = f"all {len(bad):,} rows are bad; line {first.line}: {first.reason}"
        return DataError(f"{said}; nothing is left to learn from (data.bad_rows=skip)", file=path)


def write_bad_rows(folder: Path, bad: Sequence[BadRow]) -> None:
    """Writes `bad_rows.jsonl` into a run folder, one line for each row left out; nothing where there is none."""
    if not bad:
        return
    lines = [
        # Escaped to ASCII: a row may be bad for half a surrogate pair. Values that JSON does not know are shown as text.
        json.dumps({"file": row.file, "line": row.line, "reason": row.reason, "row": row.row}, default=str) + "\n"
        for row in bad
    ]
    write_whole(folder / BAD_ROWS_NAME, "".join(lines))


def _reason(error: DataError) -> str:
    """The error's text without the place, which has columns of its own."""
    return str(error).removeprefix(f"{error.file}:{error.line}: ").removeprefix(f"{error.file}: ")
