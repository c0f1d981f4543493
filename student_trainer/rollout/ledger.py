"""`rollouts.jsonl` in a run folder: one line for each rollout that was learned from, and for each prompt that got none.

In: the rollouts of a step, when the trainer takes them; out: lines of JSON, appended. The share of rollouts follows from it exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from student_trainer.files import disk_trouble_named, write_whole
from student_trainer.rollout.sample import Rollout, RolloutFailure

LEDGER_NAME = "rollouts.jsonl"


class Ledger:
    """See module.

    Args:
        folder: of the run; the file is made with the first line.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEDGER_NAME

    def cut(self, step: int) -> None:
        """Drops what was written at optimizer step `step` (from 0) and later: it is made again.

        Raises:
            RunError: the disk does not take it.
        """
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_bytes().split(b"\n"):
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line.decode())
            except (ValueError, KeyError, TypeError):  # the last may have been cut by a kill
                continue
        with disk_trouble_named(str(self._path)):
            write_whole(self._path, "".join(f"{line}\n" for line in kept))

    def add(self, written: Sequence[Rollout | RolloutFailure]) -> None:
        """Appends the rollouts of one step.

        Raises:
            RunError: the disk does not take it.
        """
        if not written:
            return
        with disk_trouble_named(str(self._path)), self._path.open("a") as file:
            file.write("".join(json.dumps(_entry(one)) + "\n" for one in written))


def _entry(one: Rollout | RolloutFailure) -> dict[str, object]:
    place = {"step": one.prompt.step, "slot": one.prompt.slot, "key": one.prompt.key}
    if isinstance(one, RolloutFailure):
        return place | {"skipped": one.why}
    return place | {"version": one.version, "tokens": int(one.token_ids.size), "finished": one.finished}
