"""How many bytes a folder of labels may hold, kept by whoever writes to it, without anybody waiting for the folder to be counted.

In: the size of what is to be written; out: whether it may be, after the longest unused have gone if need be. The folder is counted by
listing it, which takes as long as it has files (a million: seconds); that is done aside, and writers wait for it only when
they have written so much meanwhile that the budget could be broken.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from teacher_wire.labels.files import PARTIAL as PARTIAL

SUFFIX = ".safetensors"
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_PARTIAL_AGE_S = 3600.0
# Of the budget: the fill at which the oldest go before anything is written, at which they go aside, what they are brought down
# to, and what one process writes unseen by its own last look. Three writers at once stay under the budget.
_FULL, _SOON, _LOW, _UNSEEN = 0.95, 0.93, 0.90, 0.02
_SHORT_LOOK_S = 0.05  # not worth a thread


class File(NamedTuple):
    """One entry of a folder; `used_s` is seconds since 1970."""

    path: str
    size: int
    used_s: float

    @property
    def key(self) -> str:
        return os.path.basename(self.path).removesuffix(SUFFIX)


def files_of(folder: Path) -> Iterator[File]:
    """Every entry; temporary files that nobody can be writing any more are removed on the way."""
    for shelf in _listed(folder):
        for item in _listed(shelf.path) if len(shelf.name) == 2 else ():
            try:
                status = item.stat()
            except FileNotFoundError:
                continue
            if _ENTRY.fullmatch(item.name):
                yield File(item.path, status.st_size, status.st_mtime)
            elif item.name.endswith(PARTIAL) and time.time() - status.st_mtime > _PARTIAL_AGE_S:
                unlink(item.path)


def unlink(path: str | Path) -> bool:
    """Whether it was there, and we have deleted it."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _listed(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except (FileNotFoundError, NotADirectoryError):
        return []


class Budget:
    """Of one folder, as one process sees it; for any number of threads.

    Args:
        folder: of labels.
        max_bytes: None for no limit; then nothing is ever counted.
        on_evicted: told the bytes of every file deleted for the budget.
    """

    def __init__(self, folder: Path, max_bytes: int | None, on_evicted: Callable[[int], None]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._on_evicted = on_evicted
        self._counting = threading.Lock()
        self._looking = threading.Lock()
        self._total: int | None = None  # bytes at the last look and our own since
        self._unseen = 0  # our own since the last look began
        self._look_s = float("inf")  # how long the last one took
        self._aside = False  # whether a thread is looking, or about to

    @property
    def used_bytes(self) -> int:
        """Bytes of the folder at the last look, and our own since; 0 before the first one or without a budget."""
        return self._total or 0

    @property
    def largest_bytes(self) -> float:
        """The largest file that it has room for; infinite without a limit."""
        return float("inf") if self._max_bytes is None else self._max_bytes * _LOW

    def look(self) -> None:
        """Counts what is in the folder; takes a while if that is much."""
        with self._looking:
            self._look(float("inf"), 0)

    def admit(self, size: int) -> None:
        """Counts `size` bytes in that are about to be written, and deletes the longest unused if the budget asks for it.

        Raises:
            OSError: the folder cannot be listed or its files not deleted.
        """
        if self._max_bytes is None:
            return
        if not self._counted(size):
            with self._looking:  # by another thread, maybe: then there may be room now
                if not self._counted(size):
                    self._look(self._max_bytes * _FULL, size)
                    with self._counting:
                        assert self._total is not None
                        self._total += size
                        self._unseen += size
        elif self._claim_aside():
            threading.Thread(target=self._look_aside, name="label-budget", daemon=True).start()

    def take_back(self, size: int) -> None:
        """Counts `size` admitted bytes out again: they were not written after all."""
        with self._counting:
            if self._total is not None:
                self._total = max(0, self._total - size)
            self._unseen = max(0, self._unseen - size)

    def _counted(self, size: int) -> bool:
        """Counts `size` bytes in, unless a look must come first."""
        assert self._max_bytes is not None
        with self._counting:
            total = None if self._total is None else self._total + size
            if self._unseen + size > self._max_bytes * _UNSEEN or (total or 0) > self._max_bytes * _FULL:
                return False
            self._total = total
            self._unseen += size
            return True

    def _claim_aside(self) -> bool:
        """Whether the caller is to have a look taken aside, so that nobody has to wait for it later."""
        assert self._max_bytes is not None
        with self._counting:
            near = self._unseen > self._max_bytes * _UNSEEN / 2 or self.used_bytes > self._max_bytes * _SOON
            due = self._total is None or (near and self._look_s > _SHORT_LOOK_S)
            claimed = due and not self._aside
            self._aside = self._aside or claimed
            return claimed

    def _look_aside(self) -> None:
        assert self._max_bytes is not None
        try:
            with self._looking, contextlib.suppress(OSError):  # writers meet the same error, and report it
                self._look(self._max_bytes * _SOON, 0)
        finally:
            self._aside = False

    def _look(self, most: float, size: int) -> None:
        """Counts the folder; if `size` more bytes made it more than `most`, the longest unused go until it is low again."""
        began_s = time.monotonic()
        with self._counting:
            before = self._unseen
        files = list(files_of(self._folder))
        total = sum(file.size for file in files)
        if total + size > most:
            assert self._max_bytes is not None
            total -= self._evict(files, total + size - self._max_bytes * _LOW)
        with self._counting:
            self._unseen -= before
            # What was written during the look may be in both: rather too much than too little.
            self._total = total + self._unseen
            self._look_s = time.monotonic() - began_s

    def _evict(self, files: list[File], excess: float) -> int:
        """Deletes the longest unused; the bytes that are gone, by us or by others."""
        gone = 0
        for file in sorted(files, key=lambda file: file.used_s):
            if gone >= excess:
                break
            if unlink(file.path):
                self._on_evicted(file.size)
            gone += file.size
        return gone
