"""What a teacher has said of itself, kept beside its labels, so that a run can be checked and trained while its server is gone.

In: a `TeacherInfo` and where it was met; out: one small JSON file per teacher and revision in `run.cache_dir/teachers`, and back. A file is
named by fingerprint and name, written whole, and believed only if its digest is right. Loads no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from student_trainer.config.run import cache_folder
from student_trainer.config.teachers import TeacherConfig
from student_trainer.errors import OfflineError
from student_trainer.files import read_object
from teacher_wire.core.info import ArtifactInfo, Limits, TeacherInfo
from teacher_wire.labels.files import PARTIAL, replacing

FOLDER = "teachers"  # in a cache folder
FORMAT = 1
_SUFFIX = ".json"
_SHOWN = 16  # characters of a fingerprint
_MOST_PLACES = 16
_PARTIAL_AGE_S = 3600.0


@dataclass(frozen=True)
class TeacherRecord:
    """One teacher, as it was last met.

    Attributes:
        info: its whole description: identity, digests of tokenizer, template and artifacts, transports, limits.
        places: addresses and embedded configs under which it was met, the newest last.
        kept_s: when it was last written, in seconds since 1970.
    """

    info: TeacherInfo
    places: tuple[str, ...]
    kept_s: float

    @property
    def day(self) -> str:
        """The day on which it was last met, in this machine's time."""
        return time.strftime("%Y-%m-%d", time.localtime(self.kept_s))

    @property
    def told(self) -> str:
        """The teacher in a few words, for errors and lists."""
        of = f" revision {self.info.revision}" if self.info.revision else ""
        return f"{self.info.name} ({self.info.model}{of}) {self.info.fingerprint[:_SHOWN]} met at {self.places[-1] if self.places else '?'}"


def records_folder(cache_dir: Path) -> Path:
    """Where records are kept."""
    return cache_folder(cache_dir) / FOLDER


def record_path(folder: Path, info: TeacherInfo) -> Path:
    """The file of one teacher: other weights, or another name for the same ones, are another file."""
    digest = hashlib.sha256(f"{info.fingerprint}\0{info.name}".encode()).hexdigest()
    return folder / f"{re.sub('[^0-9a-zA-Z]', '', info.fingerprint)[:_SHOWN]}-{digest[:_SHOWN]}{_SUFFIX}"


def keep_record(cache_dir: Path, info: TeacherInfo, place: str, on_trouble: Callable[[str], None]) -> None:
    """Writes down who a teacher is, unless that is on disk already.

    Args:
        cache_dir: shared by all runs of this machine.
        info: as it describes itself now.
        place: where it was met.
        on_trouble: called with a sentence if the disk does not take it.
    """
    folder = records_folder(cache_dir)
    before = read_record(record_path(folder, info))
    places = tuple(other for other in (before.places if before else ()) if other != place)
    record = TeacherRecord(info, (*places, *([place] if place else []))[-_MOST_PLACES:], time.time())
    if before is not None and (before.info, before.places) == (record.info, record.places):
        return
    try:
        write_record(folder, record)
    except OSError as error:
        on_trouble(
            f"{folder}: {error.strerror or error}; who teacher {info.name} is cannot be kept, and runs with teacher.offline=true will not know it"
        )


def write_record(folder: Path, record: TeacherRecord) -> Path:
    """Writes a record in its place, whole.

    Raises:
        OSError: the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(folder, record.info)
    content = {"format": FORMAT, "teacher": asdict(record.info), "places": list(record.places), "kept_s": record.kept_s}
    with replacing(path, shared=True) as partial:
        partial.write_text(json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n", encoding="utf-8")
    return path


def read_record(path: Path) -> TeacherRecord | None:
    """The record in a file; None if there is none, or it is not one that was written under this name."""
    try:
        found = read_object(path)
        written = found.pop("sha256")
        if found["format"] != FORMAT or written != _digest(found):
            return None
        record = TeacherRecord(_info(found["teacher"]), tuple(map(str, found["places"])), float(found["kept_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if record_path(path.parent, record.info).name == path.name else None


def record_files(folder: Path) -> list[Path]:
    """Every file of a record, damaged or not; what a killed process has left half-written is removed on the way."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith(_SUFFIX) and not path.name.startswith("."):
            found.append(path)
        elif path.name.endswith(PARTIAL):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _PARTIAL_AGE_S:
                    path.unlink()
    return found


def find_record(cache_dir: Path, settings: TeacherConfig) -> TeacherRecord:
    """The one record that a teacher section means: by its fingerprint if it gives one, else by where it was met, and by its name.

    Raises:
        OfflineError: none fits, several do, or the files are damaged; names those that are there and the way out.
    """
    folder = records_folder(cache_dir)
    files = record_files(folder)
    records = [record for path in files if (record := read_record(path)) is not None]
    called = f"teacher {settings.called!r}" if settings.called else "the teacher"
    fix = "fill the cache while the teacher is up: student-trainer label CONFIG with offline=false"
    if not records:
        damaged = f"; {len(files):,} records there are damaged" if files else ""
        raise OfflineError(f"teacher.offline=true: {folder} does not know {called}{damaged}; {fix}")
    fitting = [record for record in records if not settings.name or record.info.name == settings.name]
    if settings.fingerprint:
        fitting = [record for record in fitting if record.info.fingerprint.startswith(settings.fingerprint)]
    elif settings.place:
        fitting = [record for record in fitting if settings.place in record.places]
    if len(fitting) == 1:
        return fitting[0]
    meant = _meant(settings)
    if not fitting:
        raise OfflineError(
            f"teacher.offline=true: {folder} knows no teacher{meant}; there are: {_listed(records)}; {fix}, or choose one of them by "
            "its fingerprint (the setting beside offline)"
        )
    raise OfflineError(
        f"teacher.offline=true: {folder} knows {len(fitting)} teachers{meant}, whose labels must not be mixed: {_listed(fitting)}; "
        "choose one by its fingerprint (the setting beside offline)"
    )


def _meant(settings: TeacherConfig) -> str:
    said = [f" called {settings.name!r}"] * bool(settings.name)
    if settings.fingerprint:
        said.append(f" with fingerprint {settings.fingerprint[:_SHOWN]}")
    elif settings.place:
        said.append(f" met at {settings.place}")
    return "".join(said)


def _listed(records: Sequence[TeacherRecord], most: int = 5) -> str:
    return ", ".join(record.told for record in records[:most]) + (", ..." if len(records) > most else "")


def _info(found: dict[str, Any]) -> TeacherInfo:
    """
    Raises:
        KeyError, TypeError, ValueError: the entries are not those of a description.
    """
    told = dict(found)
    if told.keys() != {part.name for part in fields(TeacherInfo)}:
        raise ValueError("other entries than a teacher's description has")
    told["artifacts"] = tuple(ArtifactInfo(**one) for one in told["artifacts"])
    told["limits"] = Limits(**told["limits"])
    for name in ("transports", "generates", "basis_layers"):
        told[name] = tuple(told[name])
    return TeacherInfo(**told)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
