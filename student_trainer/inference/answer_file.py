"""Answers to a file of prompts: kept line by line while they are written, and whole under their name at the end.

In: prompts and what writes; out: one JSON line per prompt, in the order of the prompts. What an interrupted command has left in `OUT.partial`
is not written again, if prompts, models and settings are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from student_trainer.errors import RunError
from student_trainer.files import disk_trouble_named, sync
from student_trainer.inference.prompt_file import FilePrompt


class AnswerFile:
    """See module; made by `answering`.

    Attributes:
        done: prompts that are answered.
    """

    def __init__(self, out: Path, partial: Path, done: int, lines: int) -> None:
        self.done = done
        self._out, self._partial, self._lines = out, partial, lines

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the answers to the next prompts; they are on disk when this returns.

        Raises:
            RunError: the disk does not take them.
        """
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with disk_trouble_named(str(self._partial)), self._partial.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.done += len(rows)

    def finish(self) -> None:
        """Gives all answers their name; all or nothing."""
        assert self.done == self._lines
        body = self._partial.with_name(self._partial.name + ".whole")
        with disk_trouble_named(str(self._out)):
            with self._partial.open("rb") as source, body.open("wb") as target:
                source.readline()  # the identity
                for line in source:
                    target.write(line)
                target.flush()
                os.fsync(target.fileno())
            os.replace(body, self._out)
            sync(self._out.parent)
            self._partial.unlink()


@contextlib.contextmanager
def answering(out: Path, prompts: Sequence[FilePrompt], identity: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """The file of answers, held by this process while the block runs.

    Args:
        out: where all of them go at the end.
        prompts: in order.
        identity: what the answers depend on beside the prompts: models and settings.

    Raises:
        RunError: `out` is there already, another process is at work on it, or what it left is of other prompts or settings.
    """
    out = out.expanduser().absolute()
    if out.exists():
        raise RunError(f"--out {out}: exists already; choose another file, or delete it")
    if not out.parent.is_dir():
        raise RunError(f"--out {out}: there is no folder {out.parent}")
    partial, lock = out.with_name(out.name + ".partial"), FileLock(f"{out}.lock", blocking=False)
    told = json.dumps({"answers of": _digest(prompts, identity)})
    try:
        with disk_trouble_named(f"--out {out}"):
            lock.acquire()
    except Timeout as error:
        raise RunError(
            f"--out {out}: another process is at work on it; wait for its end, or choose another file"
        ) from error
    try:
        with disk_trouble_named(str(partial)):
            done = _kept(out, partial, told)
        yield AnswerFile(out, partial, min(done, len(prompts)), len(prompts))
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            Path(f"{out}.lock").unlink()


def _kept(out: Path, partial: Path, told: str) -> int:
    """Answers that are in the partial file, which begins with `told` afterwards; a torn last line is cut off."""
    if not partial.is_file():
        partial.write_text(told + "\n", encoding="utf-8")
        return 0
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if not lines:
        partial.write_text(told + "\n", encoding="utf-8")
        return 0
    if lines[0].decode("utf-8", "replace") != told:
        raise RunError(
            f"{partial}: is left of other prompts, models or settings than these; delete it, or choose another --out than {out.name}"
        )
    if len(whole) < len(data):
        with partial.open("rb+") as file:
            file.truncate(len(whole))
    return len(lines) - 1


def _digest(prompts: Sequence[FilePrompt], identity: Mapping[str, Any]) -> str:
    said = json.dumps(identity, sort_keys=True, default=str) + "".join(
        repr((one.key, one.conversation)) for one in prompts
    )
    return hashlib.sha256(said.encode()).hexdigest()
