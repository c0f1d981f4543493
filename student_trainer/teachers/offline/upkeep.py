"""Looking after records of teachers: what there are, whether they are whole, which have lost their labels, and how they travel with them.

In: a cache folder; out: records, counts, copies. Loads torch only to verify artifacts that are copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from student_trainer.config.run import TOKENS, cache_folder
from student_trainer.teachers.artifact_files import artifact_folders
from student_trainer.teachers.offline.record import (
    TeacherRecord,
    read_record,
    record_files,
    record_path,
    records_folder,
    write_record,
)
from teacher_wire.core.info import BYTE_TABLE
from teacher_wire.labels.files import write_first

_OF_DATASETS = (
    "facts"  # a tensor that the student's own tokenised datasets have, alone of all files there (`data/token_cache.py`)
)


@dataclass(frozen=True)
class Copied:
    """What went along with labels.

    Attributes:
        records, artifacts, others: files that are now in the other folder and were not before; `others` are rows in a teacher's own tokens and
            classes of vocabularies.
        lacking: artifacts that a record names and that are not here, or damaged.
    """

    records: int
    artifacts: int
    others: int
    lacking: tuple[str, ...]


def records_of(cache_dir: Path) -> list[TeacherRecord]:
    """The teachers that a cache folder knows, damaged records left out (`count_damaged` tells how many)."""
    return [record for path in record_files(records_folder(cache_dir)) if (record := read_record(path)) is not None]


def count_damaged(cache_dir: Path) -> int:
    """How many records of teachers are damaged; nothing is deleted."""
    return verify_records(cache_dir, lambda path: None)[1]


def verify_records(cache_dir: Path, on_damaged: Callable[[Path], None]) -> tuple[int, int]:
    """How many records are whole, and how many are not, each of which is handed to `on_damaged`."""
    whole = damaged = 0
    for path in record_files(records_folder(cache_dir)):
        if read_record(path) is not None:
            whole += 1
        else:
            damaged += 1
            on_damaged(path)
    return whole, damaged


def drop_unlabelled(cache_dir: Path, labelled: set[str], teacher: str) -> int:
    """Deletes the records of teachers that have no labels here any more; how many.

    Args:
        labelled: fingerprints of which there are labels.
        teacher: only of teachers whose fingerprint begins so.
    """
    gone = 0
    folder = records_folder(cache_dir)
    for record in records_of(cache_dir):
        fingerprint = record.info.fingerprint
        if fingerprint.startswith(teacher) and fingerprint not in labelled:
            with contextlib.suppress(OSError):
                record_path(folder, record.info).unlink()
                gone += 1
    return gone


def export_records(cache_dir: Path, to: Path, teacher: str) -> Copied:
    """Copies what a run without its teacher needs beside labels: records, their artifacts, and what joins another tokenizer.

    Args:
        to: a cache folder, where what is there stays; of two records of one teacher the newer one stays, with the places of both.
        teacher: only of teachers whose fingerprint begins so.

    Raises:
        OSError: the other folder cannot be written.
    """
    chosen = [record for record in records_of(cache_dir) if record.info.fingerprint.startswith(teacher)]
    copied, artifacts, others = 0, 0, 0
    lacking: list[str] = []
    for record in chosen:
        copied += _merge(records_folder(to), record)
        for wanted in record.info.artifacts:
            name = f"{wanted.sha256}.safetensors"
            source = artifact_folders(cache_folder(cache_dir)).get(wanted.kind, Path("/nowhere")) / name
            if not _is_whole(source, wanted.kind, wanted.sha256):
                lacking.append(f"{wanted.kind.replace('_', ' ')} of {record.info.name}")
                continue
            artifacts += write_first(artifact_folders(cache_folder(to))[wanted.kind] / name, source.read_bytes())
    if any(artifact.kind == BYTE_TABLE for record in chosen for artifact in record.info.artifacts):
        others = _copy_bridges(cache_folder(cache_dir), cache_folder(to))
    return Copied(copied, artifacts, others, tuple(lacking))


def _merge(folder: Path, record: TeacherRecord) -> bool:
    """Whether a record was written that was not there as it is."""
    there = read_record(record_path(folder, record.info))
    if there is None:
        write_record(folder, record)
        return True
    newer = max(there, record, key=lambda one: one.kept_s)
    places = (*there.places, *(place for place in record.places if place not in there.places))
    merged = replace(newer, places=places)
    if merged == there:
        return False
    write_record(folder, merged)
    return True


def _is_whole(path: Path, kind: str, sha256: str) -> bool:
    if not path.is_file():
        return False
    from student_trainer.teachers.artifact_cache import read_artifact

    artifact = read_artifact(path)
    return artifact is not None and (artifact.header.kind, artifact.header.sha256) == (kind, sha256)


def _copy_bridges(cache: Path, to: Path) -> int:
    """Rows in teachers' own tokens, and classes of vocabularies; both are verified when they are read."""
    files = [path for path in sorted((cache / TOKENS).glob("*.safetensors")) if not _is_dataset(path)]
    return sum(write_first(to / TOKENS / path.name, path.read_bytes()) for path in files)


def _is_dataset(path: Path) -> bool:
    """Whether it holds rows in the student's tokens, which are made anew where they are needed; also if it cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            return _OF_DATASETS in file.keys()  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError):
        return True
