"""Artifacts of teachers as files: where each kind is kept, what is there, and what goes for the budget. Loads no torch.

In: a cache folder, a budget in bytes; out: entries, and what is gone. A file is named by the digest of what is in it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from teacher_wire.artifacts.kinds import KINDS
from teacher_wire.labels.budget import PARTIAL, File, unlink

_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
_PARTIAL_AGE_S = 3600.0
_FOLDERS = {"output_head": "heads"}  # a kind that is not here has a folder of its own name


def artifact_folders(cache_folder: Path) -> dict[str, Path]:
    """Where each kind of artifact is kept."""
    return {kind: cache_folder / _FOLDERS.get(kind, kind) for kind in KINDS}


def artifact_files(folder: Path) -> list[File]:
    """Every artifact in one folder, the longest unused first; what a killed process has left half-written is removed on the way.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if _FILE.fullmatch(path.name):
            found.append(File(str(path), status.st_size, status.st_mtime))
        elif path.name.endswith(PARTIAL) and time.time() - status.st_mtime > _PARTIAL_AGE_S:
            unlink(path)
    return sorted(found, key=lambda file: file.used_s)


def make_room(cache_folder: Path, size: int, max_bytes: int) -> bool:
    """Deletes the longest unused artifacts, of whatever kind, until `size` more bytes fit into the budget.

    Returns:
        False if they never will; then nothing is deleted.

    Raises:
        OSError: a file cannot be deleted.
    """
    if size > max_bytes:
        return False
    files = [file for folder in artifact_folders(cache_folder).values() for file in artifact_files(folder)]
    total = sum(file.size for file in files)
    for file in sorted(files, key=lambda file: file.used_s):
        if total + size <= max_bytes:
            break
        unlink(file.path)
        total -= file.size
    return True
