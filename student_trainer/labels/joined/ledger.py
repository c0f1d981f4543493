"""`teachers.jsonl` in a run folder: one line a micro-batch that was learned from, with who has labelled which of its samples.

In: joined answers, as the trainer takes them; out: lines of JSON, appended, and how many samples had fewer teachers than they were to have. A
line is `{"step", "batch", "labelled": [{"by": [names], "samples": [keys]}, ...]}`; samples whose teachers were not all there are under an
entry that has `missing: [names]` too. A sample that nobody was to label is under `by: []`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from student_trainer.files import disk_trouble_named, write_whole
from student_trainer.labels.joined.answer import JoinedAnswer

TEACHERS_NAME = "teachers.jsonl"


class TeachersLedger:
    """See module.

    Args:
        folder: of the run; the file is made with the first line.
        accumulation: micro-batches of an optimizer step.
    """

    def __init__(self, folder: Path, accumulation: int) -> None:
        self._path = folder / TEACHERS_NAME
        self._accumulation = accumulation

    def cut(self, step: int) -> None:
        """Drops what was written at optimizer step `step` (from 0) and later: it is made again.

        Raises:
            RunError: the disk does not take it.
        """
        if not self._path.is_file():
            return
        kept = [entry for entry in self.entries() if entry["step"] < step]
        with disk_trouble_named(str(self._path)):
            write_whole(self._path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def add(self, batch: int, answer: JoinedAnswer) -> None:
        """Appends micro-batch number `batch`.

        Raises:
            RunError: the disk does not take it.
        """
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for b, key in enumerate(answer.names):
            groups.setdefault((answer.labelled_by(b), answer.missed_by(b)), []).append(key)
        labelled = [
            {"by": by, **({"missing": missing} if missing else {}), "samples": samples}
            for (by, missing), samples in groups.items()
        ]
        entry = {"step": batch // self._accumulation, "batch": batch, "labelled": labelled}
        with disk_trouble_named(str(self._path)), self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> Iterator[dict[str, Any]]:
        """Its lines, in order; one that was cut by a kill is left out."""
        if not self._path.is_file():
            return
        for line in self._path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                if isinstance(entry["step"], int) and isinstance(entry["labelled"], list):
                    yield entry
            except (ValueError, KeyError, TypeError):
                continue

    def told(self) -> str:
        """How many samples were learned from with fewer teachers than they were to have, and whom they lacked; empty if none."""
        samples, fewer = 0, 0
        lacked: dict[str, int] = {}
        for entry in self.entries():
            for group in entry["labelled"]:
                count = len(group["samples"])
                samples += count
                fewer += count if group.get("missing") else 0
                for name in group.get("missing", ()):
                    lacked[name] = lacked.get(name, 0) + count
        if not fewer:
            return ""
        whom = ", ".join(f"{count:,} without {name!r}" for name, count in lacked.items())
        return f"{fewer:,} of {samples:,} samples were learned from with fewer teachers: {whom} ({self._path.name} says which)"
