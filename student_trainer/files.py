"""What is written to a disk that others read: whole files, durable folders, and a lock on a folder.

In: paths and text; out: files that are there whole or not at all. Knows no run and no setting; loads nothing heavy.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from student_trainer.errors import RunError
from teacher_wire.labels.files import replacing
from teacher_wire.labels.files import sync as sync

LOCK_NAME = "run.lock"
_UNLOCKABLE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by `text`, all or nothing, and returns once it is on disk.

    Raises:
        OSError: the disk does not take it; what was there before is still there.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it holds none; says what it looks like.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if not data.strip(b"\0 \r\n\t"):
        raise ValueError("it is empty" if not data else f"its {len(data)} bytes are blank")
    try:
        found = json.loads(data.decode("utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"it is no JSON ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def sync_tree(folder: Path) -> None:
    """Makes every file below a folder durable, and all entries."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            sync(path)


def move_into(source: Path, target: Path) -> None:
    """Moves the files of `source` to `target`, one by one in place of those of the same name; others there are left alone."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            move_into(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    shutil.rmtree(source)
    sync(target)


class FolderLock:
    """That one process works in a folder, from `acquire` to the end of the block or of the process, however it ends.

    The kernel holds it (filelock: flock), so nothing is left by a crash but a file that locks nothing. Reading the folder needs no lock.

    Args:
        folder: need not exist before `acquire`, which makes it.
        tell: called with a sentence if the file system knows no locks; the work then goes on without one.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = print) -> None:
        self._folder = folder
        self._path = folder / LOCK_NAME
        self._tell = tell
        # One lock for all threads of the process: a run may be begun in one and ended in another.
        self._lock = FileLock(self._path, blocking=False, thread_local=False, fallback_to_soft=False)
        self._unlockable = False

    def acquire(self) -> None:
        """Takes the lock; again is nothing.

        Raises:
            RunError: another process has it; names pid, host and since when.
            OSError: the folder cannot be made or written to.
        """
        if self._lock.is_locked or self._unlockable:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        while not self._lock.is_locked:
            try:
                self._lock.acquire()
            except Timeout as error:
                if not self._path.exists():  # its last holder took it away meanwhile
                    continue
                raise RunError(
                    f"{self._folder}: {self._holder()} is at work in it; wait for its end, stop it, or choose another folder"
                ) from error
            except OSError as error:
                if error.errno not in _UNLOCKABLE:
                    raise
                self._unlockable = True
                self._tell(
                    f"{self._folder}: this file system knows no locks ({error.strerror}); nothing keeps a second "
                    "process out of it"
                )
                return
        said = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._path.write_text(json.dumps(said) + "\n")

    def release(self) -> None:
        """Gives it back and takes its file away."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._lock.release()

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = read_object(self._path)
            return f"process {said['pid']} on {said['host']} (since {said['since']})"
        return "another process"

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)  # room would not help


@contextlib.contextmanager
def disk_trouble_named(what: str, way_out: Callable[[], str] = lambda: "make room on the disk") -> Iterator[None]:
    """Turns what a disk refuses into one line.

    Args:
        what: is written, with its place.
        way_out: says what to do about it, once there is trouble.

    Raises:
        RunError: in place of OSError, and of what safetensors makes of one.
    """
    try:
        yield
    except OSError as error:
        advice = "choose another folder, or make this one writable" if error.errno in _NOT_OURS else way_out()
        raise RunError(f"{what}: cannot be written: {error.strerror or error}; {advice}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # it loads no torch here
            raise
        reason = str(error).removeprefix("Error while serializing: ")
        raise RunError(f"{what}: cannot be written: {reason}; {way_out()}") from error


def free_bytes(folder: Path) -> int:
    """Bytes that a process may still write below `folder`, which need not exist."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(nearest).free
