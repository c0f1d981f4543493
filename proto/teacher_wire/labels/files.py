"""The one way in which both houses write a file: beside its place under another name, then renamed, so that it is there whole or not at all.

In: a path and what writes to a path; out: the file in its place. A killed process leaves at most a file named `*.partial`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """The path to write to while the block runs; at its end what is there takes the place of `path`.

    Args:
        path: of the file; its folder exists.
        durable: return only when it is on disk. Without it a power failure may lose the file, which whoever reads it must notice.
        shared: several processes may write it at the same time; the last one stays.

    Raises:
        OSError: the disk does not take it; what was there before is still there.
    """
    partial = _beside(path) if shared else path.with_name(path.name + PARTIAL)
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_first(path: Path, data: bytes) -> bool:
    """Writes a file that no process replaces once it is there; False if it is there already. Not durable.

    Raises:
        OSError: the disk does not take it.
    """
    partial = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("xb") as file:
            file.write(data)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if path.exists():  # without hard links two writers at the same instant may both win; the last one stays
                return False
            os.replace(partial, path)
        return True
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable.

    Raises:
        OSError: the disk does not take it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    """A name that no other process writes to."""
    return path.with_name(f".{path.name[:16]}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")
