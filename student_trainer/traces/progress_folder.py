"""A folder of files that only grow, and `progress.jsonl`, whose last whole line says how far they are whole.

In: lines for the files, and after each unit of work the figures so far; out: the same on resumption. Everything behind the last whole line
of progress is cut off, so that no line is there twice and none is missing. One process works in the folder at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from student_trainer.errors import ConfigError, RunError
from student_trainer.files import LOCK_NAME, FolderLock, read_object, write_whole

PROGRESS, IDENTITY, STATS = "progress.jsonl", "run.json", "stats.json"


class ProgressFolder:
    """See module.

    Args:
        folder: where; made here.
        identity: digests and settings that must not change over the work.
        names: of the files.
        resume: go on with what is there.
        units: what is counted, in the plural.
        read: takes the figures of the last line; raises ValueError, TypeError or KeyError if they are none.
        setting, go_on: for errors: the setting that names the folder, and how to go on with what is there.

    Raises:
        ConfigError: the folder holds such work, and `resume` is false; or files that are none's; or it cannot be written.
        RunError: the work there is another one, its files are damaged, or another process is at work in it.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        names: tuple[str, ...],
        *,
        resume: bool,
        units: str,
        read: Callable[[dict[str, Any]], int],
        setting: str = "output_dir",
        go_on: str = "--resume",
    ) -> None:
        self._folder = folder
        self._names = names
        self._units, self._read, self._setting, self._go_on = units, read, setting, go_on
        self._failed = False
        self._on_disk = 0
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{setting} {folder}: is a file")
        self._lock = FolderLock(folder)
        try:
            self._refuse_foreign(resume)
            self._lock.acquire()  # before anything is cut: the work there may still be going on
            self._open(identity)
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"{setting} {folder}: cannot be written: {error.strerror or error}") from error
        except BaseException:
            self._lock.release()
            raise

    def _refuse_foreign(self, resume: bool) -> None:
        """A folder is ours if it holds an identity; in any other that is not empty somebody's files would be written to."""
        ours = (IDENTITY, IDENTITY + ".partial", LOCK_NAME)
        there = sorted(path.name for path in self._folder.iterdir()) if self._folder.is_dir() else []
        if IDENTITY in there:
            if not resume:
                raise ConfigError(
                    f"{self._setting} {self._folder}: holds a run already; go on with {self._go_on}, or choose another folder"
                )
        elif foreign := [name for name in there if name not in ours]:
            raise ConfigError(
                f"{self._setting} {self._folder}: holds {foreign[0]} and no run ({IDENTITY} is not there); choose another folder"
            )

    def _open(self, identity: dict[str, Any]) -> None:
        known = self._folder / IDENTITY
        if known.is_file():
            try:
                before = read_object(known)
            except ValueError as error:
                raise RunError(f"{known}: {error}: nothing says what this run asked; start another one") from error
            self._compare(before, identity)
            self._take_up()
        else:
            write_whole(known, json.dumps(identity, indent=1))
        self._files = {name: (self._folder / name).open("ab", buffering=0) for name in (*self._names, PROGRESS)}

    def _take_up(self) -> None:
        """Cuts off what is behind the last whole line of progress."""
        whole = b""
        sizes = dict.fromkeys(self._names, 0)
        file = self._folder / PROGRESS
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.is_file() else [], 1):
            if not line.endswith(b"\n"):
                break
            whole += line
            try:
                last = json.loads(line)
                sizes = {name: int(last["bytes"][name]) for name in self._names}
                self._on_disk = self._read(last["stats"])
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(f"{file}:{number}: damaged; start another run") from error
        for name, size in {**sizes, PROGRESS: len(whole)}.items():
            path = self._folder / name
            if path.is_file():
                if path.stat().st_size < size:
                    raise RunError(f"{path}: shorter than when it was left; start another run")
                os.truncate(path, size)
            elif size:
                raise RunError(f"{path}: is gone; start another run")

    def append(self, name: str, fields: dict[str, Any]) -> None:
        """Writes a line of JSON behind a file; it counts once `done` has been called.

        Raises:
            RunError: the disk does not take it; what is done stays done.
        """
        line = memoryview(json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[self._files[name].write(line) :]
        except OSError as error:
            self._failed = True
            raise self._trouble(name, error) from error

    def done(self, source: str, stats: dict[str, Any], count: int) -> None:
        """Writes that the unit `source` is finished, `count` with it; `stats` are the figures so far.

        Raises:
            RunError: as `append`.
        """
        sizes = {name: self._files[name].tell() for name in self._names}
        self.append(PROGRESS, {"source": source, "bytes": sizes, "stats": stats})
        self._on_disk = count

    def _trouble(self, name: str, error: OSError) -> RunError:
        return RunError(
            f"{self._folder / name}: cannot be written: {error.strerror or error}; {self._on_disk:,} {self._units} are done: make room and "
            f"go on with {self._go_on}"
        )

    def close(self, figures: dict[str, Any]) -> None:
        """Ends; `figures` are in stats.json.

        Raises:
            RunError: the disk does not take them, and has not been complained of before.
        """
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
            write_whole(self._folder / STATS, json.dumps(figures, indent=1))
        except OSError as error:
            if not self._failed:
                raise self._trouble(STATS, error) from error
        finally:
            for file in self._files.values():
                file.close()
            self._lock.release()

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            told = ", ".join(
                f"{name}: {str(before.get(name))[:60]} -> {str(now.get(name))[:60]}" for name in changed[:4]
            )
            raise RunError(
                f"{self._setting} {self._folder}: the run in it was started with something else ({told}); go on with that, or choose "
                f"another {self._setting}"
            )
