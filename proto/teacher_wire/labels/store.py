"""Labels on disk, computed once: one file per sequence, named by the digest of what was asked. For students and servers.

In: keys of `label_keys`; out: labels, verified on every read. It never raises for a disk that is full, read-only or damaged:
labels can always be asked for again.

The file system is the index: `folder/<first 2 hex>/<key>.safetensors`. There is no lock and no database, so any number of
processes share a folder, there is nothing to corrupt, and a SIGKILL leaves at most a temporary file. Nothing is synced: what
a power cut tears is found by its checksum.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.labels.amounts import Amount, Shelf, StoreStats
from teacher_wire.labels.blob import (
    LabelEntry,
    LabelSummary,
    decode_labels,
    encode_labels,
    label_keys,
    read_figures,
    read_summary,
    whole_size,
)
from teacher_wire.labels.budget import SUFFIX, Budget, File, files_of, unlink
from teacher_wire.labels.files import write_first

__all__ = ["Amount", "LabelStore", "Shelf", "StoreStats", "label_keys"]

log = logging.getLogger(__name__)

_TRIES = 3

Progress = Callable[[int, int], None]


class LabelStore:
    """A folder of labels; every method may be called from any thread and any number of processes.

    Args:
        folder: made when first written to.
        max_bytes: budget of the folder; the longest unused go first. None for no limit.
        on_trouble: told once, in a sentence, when the disk refuses to be written to; the store then only reads.
    """

    def __init__(
        self, folder: Path, max_bytes: int | None = None, on_trouble: Callable[[str], None] | None = None
    ) -> None:
        self.folder = folder.expanduser()
        self.stats = StoreStats()
        self._max_bytes = max_bytes
        self._budget = Budget(self.folder, max_bytes, lambda size: self._count(evicted=1, evicted_bytes=size))
        self._on_trouble = on_trouble or log.warning
        self._counting = threading.Lock()
        self._writable = True
        self._refusal = ""

    # ------------------------------------------------------------ read, write

    @property
    def writable(self) -> bool:
        """Whether labels are still kept."""
        return self._writable

    @property
    def trouble(self) -> str:
        """Why no more labels are kept, or which files were passed over; empty while all is well."""
        return self._refusal or self.stats.trouble

    def get(self, key: str, instead: str = "") -> TeacherSignals | None:
        """The labels under `key`, or else those under `instead`, which serve as well; marked as used. None if they are not there.

        A damaged file is deleted and counted.
        """
        found = self._read(key)
        if found is None and instead:
            found = self._read(instead)
        self._count(hits=1) if found is not None else self._count(misses=1)
        return found

    def held(self, key: str, instead: str = "") -> int:
        """Bytes of the file under `key`, or else of that under `instead`; 0 if neither is there in its whole length.

        Of its content nothing is read but the header: `get` verifies the rest. Not marked as used.
        """
        for one in (key, instead):
            if one and (size := whole_size(self._path(one))):
                return size
        return 0

    def figures(self, key: str, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """Those of the named tensors that the labels under `key` have, read alone and not verified; None if there are no such labels."""
        return read_figures(self._path(key), key, names)

    def keep(
        self, key: str, fingerprint: str, spec: SignalSpec, sequence: TokenBatch, signals: TeacherSignals
    ) -> TeacherSignals:
        """Keeps labels and returns those that are on disk: another writer's, if it was first.

        Args:
            key: of `label_keys(fingerprint, spec, sequence)`.
            fingerprint: of the teacher that computed them.
            spec: which signal.
            sequence: one sequence with its wanted rows.
            signals: the answer about it.

        Raises:
            LabelError: they do not belong together.
        """
        data = encode_labels(key, LabelEntry(fingerprint, spec, sequence, signals))
        for _ in range(_TRIES):  # what another writer kept may be evicted or torn before it is read
            admitted = won = False
            try:
                if not self._writable or not self._fits(len(data)):
                    break
                admitted = True
                won = self._publish(key, data)
            except OSError as error:
                self._give_up(error.strerror or error)
                break
            finally:
                if admitted and not won:
                    self._budget.take_back(len(data))
            if won:
                self._count(written=1, written_bytes=len(data))
                return signals
            stored = self._read(key)
            if stored is not None:
                self._count(overtaken=1)
                return stored
        self._count(unwritten=1)
        return signals

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def _read(self, key: str) -> TeacherSignals | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            signals = decode_labels(key, data)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.debug("%s cannot be read: %s", path, error)
            return None
        except LabelError as error:
            log.info("%s: %s; deleted", path, error)
            self.drop_damaged(path)
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile, or a disk that is only read
            os.utime(path)
        self._count(read_bytes=len(data))
        return signals

    def drop_damaged(self, path: Path) -> None:
        """Deletes a file that is damaged, and counts it; if it cannot be deleted, that too."""
        self._count(damaged=1)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._count(undeletable=1)
            self._remember(error, path)

    def passed_over(self, path: str, error: OSError) -> None:
        """Counts a file that cannot be read."""
        self._count(unreadable=1)
        self._remember(error, path)

    def _remember(self, error: OSError, path: Path | str) -> None:
        with self._counting:
            self.stats.trouble = self.stats.trouble or f"{path}: {error.strerror or error}"

    def _publish(self, key: str, data: bytes) -> bool:
        """Puts a blob in its place, whole; False if one is there already."""
        return write_first(self._path(key), data)

    def _give_up(self, reason: object) -> None:
        with self._counting:
            told, self._writable = not self._writable, False
            self._refusal = (
                self._refusal or f"{self.folder}: {reason}; labels are read from there, but no more are kept"
            )
        if not told:
            self._on_trouble(self._refusal)

    def _count(self, **changes: int) -> None:
        with self._counting:
            for name, change in changes.items():
                setattr(self.stats, name, getattr(self.stats, name) + change)

    # ----------------------------------------------------------------- budget

    @property
    def used_bytes(self) -> int:
        """Bytes of the folder at the last look, and our own since; 0 before the first one or without a budget."""
        return self._budget.used_bytes

    def look(self) -> None:
        """Counts what is in the folder; takes a while if that is much."""
        self._budget.look()

    def _fits(self, size: int) -> bool:
        """Makes room for `size` bytes; False if the budget can never have it."""
        if size > self._budget.largest_bytes:
            self._give_up(
                f"the labels of one sequence ({size:,} bytes) are above the budget of {self._max_bytes:,} bytes"
            )
            return False
        self._budget.admit(size)
        return True

    # ----------------------------------------------------------------- upkeep

    def scan(self) -> tuple[list[Shelf], int]:
        """Totals by teacher and signals, by falling size, and how many files have no readable header."""
        shelves: dict[tuple[str, str], Shelf] = {}
        unreadable = 0
        for file in files_of(self.folder):
            summary = _summary(file.path)
            if summary is None:
                unreadable += 1
                continue
            name = (summary.fingerprint, summary.transport)
            before = shelves.get(name, Shelf(*name, sequences=0, tokens=0, rows=0, bytes=0, newest_use_s=0.0))
            shelves[name] = Shelf(
                *name,
                sequences=before.sequences + 1,
                tokens=before.tokens + summary.tokens,
                rows=before.rows + summary.rows,
                bytes=before.bytes + file.size,
                newest_use_s=max(before.newest_use_s, file.used_s),
            )
        return sorted(shelves.values(), key=lambda shelf: -shelf.bytes), unreadable

    def verify(self, progress: Progress = lambda done, total: None) -> tuple[Amount, Amount]:
        """Reads everything; what is there and whole, and what was damaged and is deleted now.

        What cannot be deleted, or not be read, is in `stats`.

        Args:
            progress: told the bytes read and the bytes in all.
        """
        files = list(files_of(self.folder))
        total, done = sum(file.size for file in files), 0
        whole, damaged = Amount(), Amount()
        for file in files:
            data = self._whole(file)
            if data is None:
                damaged = _plus(damaged, file.size)
            elif data:
                whole = _plus(whole, file.size)
            done += file.size
            progress(done, total)
        return whole, damaged

    def _whole(self, file: File) -> bytes | None:
        """A blob, verified; empty if it is gone or cannot be read, None if it was damaged and is deleted now."""
        try:
            data = Path(file.path).read_bytes()
            decode_labels(file.key, data)
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.passed_over(file.path, error)
            return b""
        except LabelError:
            self.drop_damaged(Path(file.path))
            return None
        return data

    def prune(
        self,
        *,
        max_bytes: int | None = None,
        teacher: str = "",
        unused_for_s: float = 0.0,
        used_since_s: float = 0.0,
        dry_run: bool = False,
        beside: Sequence[File] = (),
    ) -> Amount:
        """Deletes the labels that fit every condition, the longest unused first.

        Args:
            max_bytes: stop when the whole folder is down to it; None deletes all that fit.
            teacher: only those of teachers whose fingerprint begins so.
            unused_for_s: only those not used for so many seconds.
            used_since_s: only those used at or after this time (seconds since 1970).
            dry_run: only say what would go.
            beside: other files that count and go by the same rules, but are of no teacher.
        """
        files = sorted([*files_of(self.folder), *beside], key=lambda file: file.used_s)
        total = sum(file.size for file in files)
        latest_s = time.time() - unused_for_s if unused_for_s else float("inf")
        gone = Amount()
        for file in files:
            if max_bytes is not None and total - gone.bytes <= max_bytes:
                break
            if not used_since_s <= file.used_s <= latest_s or not _is_of(file.path, teacher):
                continue
            if dry_run or unlink(file.path):
                gone = _plus(gone, file.size)
        return gone

    def export(
        self, to: LabelStore, *, teacher: str = "", progress: Progress = lambda done, total: None
    ) -> tuple[Amount, Amount]:
        """Copies verified labels into another store; what was copied, and what was damaged here (and is deleted now).

        Files that cannot be read are passed over and counted in `stats`.

        Args:
            to: where labels that are there already stay as they are.
            teacher: only those of teachers whose fingerprint begins so.
            progress: told the bytes done and the bytes in all.

        Raises:
            OSError: the other folder cannot be written.
        """
        files = [
            file for file in files_of(self.folder) if _is_of(file.path, teacher) or not os.access(file.path, os.R_OK)
        ]
        total, done = sum(file.size for file in files), 0
        copied, damaged = Amount(), Amount()
        for file in files:
            data = self._whole(file)
            if data is None:
                damaged = _plus(damaged, file.size)
            elif data and to._read(file.key) is None and to._publish(file.key, data):
                copied = _plus(copied, file.size)
            done += file.size
            progress(done, total)
        return copied, damaged


def _summary(path: str) -> LabelSummary | None:
    """What the file's header says; None if it is gone or has none."""
    try:
        with open(path, "rb") as file:
            return read_summary(file)
    except (OSError, LabelError):
        return None  # `verify` says which of the two


def _is_of(path: str, teacher: str) -> bool:
    if not teacher:
        return True
    summary = _summary(path)
    return summary is not None and summary.fingerprint.startswith(teacher)


def _plus(amount: Amount, size: int) -> Amount:
    return Amount(amount.sequences + 1, amount.bytes + size)
