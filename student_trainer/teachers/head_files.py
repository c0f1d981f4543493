"""The folder of output heads as files: what is there, when it was used, and what goes for the budget. Loads no torch.

In: a folder, a budget in bytes; out: entries, and what is gone. The name of a file is the digest of the head in it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from teacher_wire.labels.budget import PARTIAL, File, unlink

_HEAD = re.compile(r"[0-9a-f]{64}\.safetensors")
_PARTIAL_AGE_S = 3600.0


def heads_folder(cache_folder: Path) -> Path:
    """Where output heads are kept."""
    return cache_folder / "heads"


def head_files(folder: Path) -> list[File]:
    """Every head, the longest unused first; what a killed process has left half-written is removed on the way.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if _HEAD.fullmatch(path.name):
            found.append(File(str(path), status.st_size, status.st_mtime))
        elif path.name.endswith(PARTIAL) and time.time() - status.st_mtime > _PARTIAL_AGE_S:
            unlink(path)
    return sorted(found, key=lambda file: file.used_s)


def make_room(folder: Path, size: int, max_bytes: int) -> bool:
    """Deletes the longest unused heads until `size` more bytes fit into the budget; False if they never will, and nothing is deleted.

    Raises:
        OSError: a file cannot be deleted.
    """
    if size > max_bytes:
        return False
    files = head_files(folder)
    total = sum(file.size for file in files)
    for file in files:
        if total + size <= max_bytes:
            break
        unlink(file.path)
        total -= file.size
    return True
