"""Rows in the tokens of a teacher, asked for once and kept on disk.

In: texts with what was said before them; out: ids and byte ends, in order. A file holds `CHUNK` rows and is named by the teacher's tokenizer,
its template and the rows, so that a run that was interrupted, or that has more rows than the last, asks for the rest alone. Weights do
not matter: revisions of a teacher share the files.

Axes: T tokens of a file's rows one behind another, C those of them behind the prompts, R rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from teacher_wire.core.info import BYTE_TABLE, TeacherInfo
from teacher_wire.labels.files import replacing
from teacher_wire.tokenizing.messages import TextRow, TokenizedRow

CHUNK = 512
_FORMAT = "bridged rows 1"

Ask = Callable[[Sequence[TextRow]], Awaitable[list[TokenizedRow]]]


async def tokenised(
    ask: Ask,
    info: TeacherInfo,
    rows: Sequence[TextRow],
    folder: Path,
    progress: Callable[[int], None],
    on_trouble: Callable[[str], None],
) -> list[TokenizedRow]:
    """The rows in the teacher's tokens.

    Args:
        ask: asks the teacher.
        info: the teacher.
        rows: texts.
        folder: of tokenised rows.
        progress: called with the rows that are there.
        on_trouble: called with a sentence if they cannot be kept.

    Raises:
        TeacherWireError: as `ask`; what came is kept.
    """
    tokenizer = info.tokenizer_sha256, info.chat_template_sha256, info.artifact(BYTE_TABLE).sha256
    found: list[TokenizedRow] = []
    for start in range(0, len(rows), CHUNK):
        some = rows[start : start + CHUNK]
        key = _key(tokenizer, some)
        path = folder / f"{key}.safetensors"
        kept = _read(path, key, len(some))
        if kept is None:
            kept = await ask(some)
            if not any(row.refused for row in kept):  # it may have been refused for being slow
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    with replacing(path, durable=False, shared=True) as partial:
                        _save(partial, key, kept)
                except (OSError, SafetensorError) as error:
                    on_trouble(f"{folder}: the teacher's tokens of the rows cannot be kept: {error}")
        found += kept
        progress(len(found))
    return found


def _key(tokenizer: tuple[str, ...], rows: Sequence[TextRow]) -> str:
    digest = hashlib.sha256(repr((_FORMAT, tokenizer)).encode())
    for row in rows:
        for part in (row.conversation, row.text, repr(row.marks).encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _save(path: Path, key: str, rows: Sequence[TokenizedRow]) -> None:
    tensors: dict[str, np.ndarray] = {
        "ids_T": np.concatenate([row.token_ids_T for row in rows]).astype(np.int32),
        "tokens_R": np.array([row.token_ids_T.size for row in rows], np.int64),
        "prompt_tokens_R": np.array([row.prompt_tokens for row in rows], np.int64),
        "byte_ends_C": np.concatenate([row.byte_ends_C for row in rows]).astype(np.int32),
        "ended_R": np.array([row.ended for row in rows], np.bool_),
    }
    save_file(tensors, path, {"key": key, "sha256": _digest(tensors)})


def _read(path: Path, key: str, count: int) -> list[TokenizedRow] | None:
    """The rows of a file; None if there is none, or it is not what was written under this key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            told = file.metadata() or {}
            tensors: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if told.get("key") != key or told.get("sha256") != _digest(tensors) or len(tensors["tokens_R"]) != count:
            return None
        tokens_R, prompts_R = tensors["tokens_R"], tensors["prompt_tokens_R"]
        ids = np.split(tensors["ids_T"], np.cumsum(tokens_R)[:-1])
        ends = np.split(tensors["byte_ends_C"], np.cumsum(tokens_R - prompts_R)[:-1])
    except (OSError, ValueError, LookupError, SafetensorError):
        return None
    with contextlib.suppress(OSError):  # a disk that is only read
        os.utime(path)
    return [TokenizedRow(*row) for row in zip(ids, prompts_R.tolist(), ends, tensors["ended_R"].tolist(), strict=True)]


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\0".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
