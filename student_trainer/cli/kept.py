"""What the commands of `student-trainer cache` do and print, apart from their options (`cli/cache.py`), so that help loads none of it.

In: a cache folder; out: text or one JSON object on standard output. Loads no torch, but to verify output heads.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from student_trainer.cli.asking import print_json
from student_trainer.config.run import TOKENS, cache_folder, labels_folder
from student_trainer.errors import ConfigError
from student_trainer.progress import ProgressBar
from student_trainer.teachers.artifact_files import artifact_files, artifact_folders
from student_trainer.teachers.offline.record import TeacherRecord
from student_trainer.teachers.offline.upkeep import (
    count_damaged,
    drop_unlabelled,
    export_records,
    records_of,
    verify_records,
)
from teacher_wire.labels.budget import File
from teacher_wire.labels.store import Amount, LabelStore, StoreStats

_DAY_S = 86_400.0


def stats(cache_dir: Path, *, as_json: bool) -> None:
    """Prints the labels by teacher and transport, and what lies beside them."""
    with _named(cache_dir) as store:
        shelves, unreadable = store.scan()
        kept = _beside_labels(cache_dir)
        records, damaged_records = records_of(cache_dir), count_damaged(cache_dir)
    if as_json:
        print_json(
            {
                "folder": store.folder,
                "labels": [asdict(shelf) for shelf in shelves],
                "unreadable_files": unreadable,
                "teachers": [
                    {
                        "name": record.info.name,
                        "model": record.info.model,
                        "revision": record.info.revision,
                        "fingerprint": record.info.fingerprint,
                        "met_at": list(record.places),
                        "kept_s": record.kept_s,
                        "artifacts": _artifacts_here(cache_dir, record),
                    }
                    for record in records
                ],
                "damaged_teacher_records": damaged_records,
                "beside": {
                    _plural(kind).replace(" ", "_"): {
                        "files": len(files),
                        "bytes": sum(file.size for file in files),
                        "newest_use_s": files[-1].used_s,
                    }
                    for kind, files in kept.items()
                },
            }
        )
        return
    console = Console(highlight=False, soft_wrap=True)
    for kind, files in kept.items():
        newest = datetime.fromtimestamp(files[-1].used_s).strftime("%Y-%m-%d %H:%M")
        console.print(
            f"{len(files):,} {_plural(kind)} in {Path(files[-1].path).parent}: {_mb(sum(file.size for file in files))} MB, "
            f"last used {newest}",
            markup=False,
        )
    for record in records:
        console.print(f"teacher {_told(cache_dir, record)}", markup=False)
    if damaged_records:
        console.print(f"damaged teacher records: {damaged_records:,}; `student-trainer cache verify` deletes them")
    if not shelves and not unreadable:
        console.print(f"no labels in {store.folder}", markup=False)
        return
    table = Table(title=escape(f"labels in {store.folder}"), title_justify="left")
    table.add_column("teacher", no_wrap=True)
    table.add_column("transport")
    for name in ("sequences", "tokens", "rows", "MB", "last used"):
        table.add_column(name, justify="right", no_wrap=True)
    for shelf in shelves:
        used = datetime.fromtimestamp(shelf.newest_use_s).strftime("%Y-%m-%d %H:%M")
        counts = (f"{count:,}" for count in (shelf.sequences, shelf.tokens, shelf.rows))
        table.add_row(shelf.fingerprint[:16], shelf.transport, *counts, _mb(shelf.bytes), used)
    sums = [sum(getattr(shelf, name) for shelf in shelves) for name in ("sequences", "tokens", "rows")]
    table.add_section()
    table.add_row("all", "", *(f"{count:,}" for count in sums), _mb(sum(shelf.bytes for shelf in shelves)), "")
    console.print(table)
    if unreadable:
        console.print(
            f"{unreadable:,} files are damaged or cannot be read; `student-trainer cache verify` says which, and deletes the damaged"
        )


def verify(cache_dir: Path, *, as_json: bool) -> None:
    """Reads everything; deletes what is damaged.

    Raises:
        typer.Exit: with code 1, if something was damaged or could not be read.
    """
    with _named(cache_dir) as store, _bar("verifying") as progress:
        whole, damaged = store.verify(progress)
        verified = _verify_artifacts(cache_dir, store)
        verified["teacher_record"] = verify_records(cache_dir, store.drop_damaged)
    if as_json:
        beside = {_plural(kind).replace(" ", "_"): {"whole": w, "damaged": d} for kind, (w, d) in verified.items()}
        print_json(
            {
                "folder": store.folder,
                "whole": asdict(whole),
                "damaged": asdict(damaged),
                "beside": beside,
                **_trouble(store.stats),
            }
        )
    else:
        print(f"{_amount(whole)} are whole; {_damage(damaged, store.stats)}")
        for kind, (whole_files, damaged_files) in verified.items():
            if whole_files or damaged_files:
                print(f"{whole_files:,} {_plural(kind)} are whole; {damaged_files:,} were damaged")
        _complain(store.stats)
    if damaged.sequences or any(damaged_files for _, damaged_files in verified.values()) or store.stats.unreadable:
        raise typer.Exit(1)


def _verify_artifacts(cache_dir: Path, store: LabelStore) -> dict[str, tuple[int, int]]:
    """How many artifacts of each kind are whole, and how many were damaged; what cannot be deleted or read is counted with the labels."""
    found = {}
    for kind, files in _artifacts(cache_dir).items():
        whole = damaged = 0
        for file in files:
            from student_trainer.teachers.artifact_cache import read_artifact

            if not os.access(file.path, os.R_OK):
                store.passed_over(file.path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
                continue
            artifact = read_artifact(Path(file.path))
            if artifact is not None and (artifact.header.kind, artifact.header.sha256) == (kind, file.key):
                whole += 1
                continue
            damaged += 1
            store.drop_damaged(Path(file.path))
        found[kind] = whole, damaged
    return found


def prune(
    cache_dir: Path, *, max_gb: float | None, teacher: str, older_than_days: float | None, dry_run: bool, as_json: bool
) -> None:
    """Deletes what fits every option given.

    Raises:
        ConfigError: no option, or one that is no number.
    """
    for name, value in (("--max-gb", max_gb), ("--older-than-days", older_than_days)):
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"cache prune: {name} {value}: must be a number")
    if max_gb is None and not teacher and older_than_days is None:
        raise ConfigError("cache prune: say what may go with --max-gb, --teacher or --older-than-days")
    with _named(cache_dir) as store:
        _check_teacher(store, teacher)
        kept = _beside_labels(cache_dir)
        freed = store.prune(
            max_bytes=None if max_gb is None else round(max_gb * 2**30),
            teacher=teacher,
            unused_for_s=(older_than_days or 0.0) * _DAY_S,
            dry_run=dry_run,
            beside=[file for files in kept.values() for file in files],
        )
        forgotten = 0
        if not dry_run:
            shelves, unreadable = store.scan()
            labelled = {shelf.fingerprint for shelf in shelves}
            forgotten = 0 if unreadable else drop_unlabelled(cache_dir, labelled, teacher)
        left = {file.path for files in _beside_labels(cache_dir).values() for file in files}
    gone = {kind: sum(file.path not in left for file in files) for kind, files in kept.items()}
    if as_json:
        print_json(
            {
                "folder": store.folder,
                "dry_run": dry_run,
                "freed": asdict(freed),
                "beside": {_plural(kind).replace(" ", "_"): count for kind, count in gone.items()},
                "forgotten_teachers": forgotten,
            }
        )
        return
    told = "".join(f", {count:,} of them {_plural(kind)}" for kind, count in gone.items() if count)
    print(f"{'would free' if dry_run else 'freed'} {_mb(freed.bytes)} MB: {freed.sequences:,} sequences{told}")
    if forgotten:
        print(f"{forgotten:,} teachers have no labels left here and are forgotten")


def export(to: Path, cache_dir: Path, *, teacher: str, as_json: bool) -> None:
    """Copies labels, each verified, with what training without their teacher needs.

    Raises:
        ConfigError: a folder that is the cache itself, or that cannot be written.
        typer.Exit: with code 1, if something was damaged or could not be read.
    """
    if labels_folder(to).absolute() == labels_folder(cache_dir).absolute():
        raise ConfigError(f"cache export: {to} is the cache itself")
    with _named(cache_dir) as store:
        _check_teacher(store, teacher)
        try:
            with _bar("copying") as progress:
                copied, damaged = store.export(LabelStore(labels_folder(to)), teacher=teacher, progress=progress)
            beside = export_records(cache_dir, to, teacher)
        except OSError as error:  # what cannot be read here has been passed over
            raise ConfigError(
                f"cache export: {error.filename or to}: cannot be written: {error.strerror or error}"
            ) from error
    if as_json:
        print_json(
            {
                "folder": labels_folder(to),
                "copied": asdict(copied),
                "damaged": asdict(damaged),
                "beside": asdict(beside),
                **_trouble(store.stats),
            }
        )
    else:
        print(f"copied {_amount(copied)} to {labels_folder(to)}")
        parts = (
            (beside.records, "teacher records"),
            (beside.artifacts, "artifacts"),
            (beside.others, "files that join tokenizers"),
        )
        if told := ", ".join(f"{count:,} {what}" for count, what in parts if count):
            print(f"copied with them {told}")
        if beside.lacking:
            print(f"not here, and not copied: {', '.join(beside.lacking)}")
        if damaged.sequences:
            print(_damage(damaged, store.stats))
        _complain(store.stats)
    if damaged.sequences or store.stats.unreadable:
        raise typer.Exit(1)


def _told(cache_dir: Path, record: TeacherRecord) -> str:
    """A record in one line, with which of its teacher's artifacts are here."""
    here = [kind.replace("_", " ") for kind in _artifacts_here(cache_dir, record)]
    return f"{record.told} on {record.day}, with its {', '.join(here)}" if here else f"{record.told} on {record.day}"


def _artifacts_here(cache_dir: Path, record: TeacherRecord) -> list[str]:
    """The kinds of a teacher's artifacts that are on this machine."""
    folders = artifact_folders(cache_folder(cache_dir))
    return [
        artifact.kind
        for artifact in record.info.artifacts
        if artifact.kind in folders and (folders[artifact.kind] / f"{artifact.sha256}.safetensors").is_file()
    ]


def _trouble(stats: StoreStats) -> dict[str, object]:
    """What the disk refused, for `--json`."""
    return {"undeletable": stats.undeletable, "unreadable": stats.unreadable, "trouble": stats.trouble or None}


def _damage(damaged: Amount, stats: StoreStats) -> str:
    if not damaged.sequences:
        return f"{_amount(damaged)} were damaged"
    if not stats.undeletable:
        return f"{_amount(damaged)} were damaged and are deleted"
    return f"{_amount(damaged)} were damaged, of which {stats.undeletable:,} could not be deleted"


def _complain(stats: StoreStats) -> None:
    """Names the first file that could not be read or deleted."""
    if stats.unreadable:
        print(f"{stats.unreadable:,} files could not be read and were passed over")
    if stats.trouble:
        print(f"the first of them: {stats.trouble}")


def _artifacts(cache_dir: Path) -> dict[str, list[File]]:
    """The teachers' artifacts on disk by kind, the longest unused first; only kinds of which there are some."""
    listed = {kind: artifact_files(folder) for kind, folder in artifact_folders(cache_folder(cache_dir)).items()}
    return {kind: files for kind, files in listed.items() if files}


def _beside_labels(cache_dir: Path) -> dict[str, list[File]]:
    """What else is kept in a cache folder: artifacts, and tokenised datasets, which are verified whenever they are read."""
    datasets = artifact_files(cache_folder(cache_dir) / TOKENS)
    return _artifacts(cache_dir) | ({"tokenised_dataset": datasets} if datasets else {})


def _plural(kind: str) -> str:
    return f"{kind.replace('_', ' ')}s"


@contextlib.contextmanager
def _named(cache_dir: Path) -> Iterator[LabelStore]:
    """The store of a cache folder; what the disk refuses becomes one line that names it."""
    folder = labels_folder(cache_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--cache-dir {cache_dir}: {folder} is not a folder")
    try:
        yield LabelStore(folder)
    except OSError as error:
        raise ConfigError(f"--cache-dir {cache_dir}: {error.filename or folder}: {error.strerror or error}") from error


def _check_teacher(store: LabelStore, teacher: str) -> None:
    """Refuses a fingerprint that no label has: a slip of the hand must not look like success."""
    if not teacher:
        return
    known = {shelf.fingerprint for shelf in store.scan()[0]}
    if not any(fingerprint.startswith(teacher) for fingerprint in known):
        told = ", ".join(sorted(fingerprint[:16] for fingerprint in known)) or "none"
        raise ConfigError(f"--teacher {teacher}: no labels of such a teacher in {store.folder}; there are: {told}")


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes on stderr."""
    with ProgressBar(Console(file=sys.stderr), title, in_units=False) as bar:
        yield lambda done, total: bar.update(done, total=total)


def _amount(amount: Amount) -> str:
    return f"{amount.sequences:,} sequences ({_mb(amount.bytes)} MB)"


def _mb(count: int) -> str:
    return f"{count / 2**20:,.1f}"
