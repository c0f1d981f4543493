"""Whether a watched file is still the one that was read: its content may be swapped with equal size and time."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[int, int, int, int]  # modification time in ns, size, inode, device


def stamp_of(path: Path) -> Stamp | None:
    """What changes when the file does: written, replaced, or a symbolic link turned to another one. None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev
