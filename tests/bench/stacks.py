"""Where the threads of a process spend their time: their stacks, looked at every few milliseconds, counted by the functions of this house.

In: nothing; out: of each thread, shares of the looks by the last functions of ours and the one of others that they wait in. For benches of
seconds a step: a look takes the interpreter's lock for some microseconds, and says nothing about what a device does meanwhile.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

_OURS = ("student_trainer", "teacher_server", "teacher_wire")
_DEPTH = 4  # functions of ours that are told, the innermost last


class Stacks:
    """Looks at all threads but its own from `begin` to `end`.

    Args:
        every_s: between two looks.
    """

    def __init__(self, every_s: float = 0.02) -> None:
        self._every_s = every_s
        self._seen: dict[str, Counter[str]] = {}
        self._looks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stacks", daemon=True)
        self._began_s = self._took_s = 0.0

    def begin(self) -> None:
        """Starts to look."""
        self._began_s = time.perf_counter()
        self._thread.start()

    def end(self, least: float = 0.01) -> dict[str, dict[str, float]]:
        """Seconds by thread and place, the longest first; those of less than `least` of the whole time are left out."""
        self._took_s = time.perf_counter() - self._began_s
        self._ended.set()
        self._thread.join()
        each_s = self._took_s / max(1, self._looks)
        return {
            name: {
                place: round(count * each_s, 2) for place, count in seen.most_common() if count >= least * self._looks
            }
            for name, seen in self._seen.items()
        }

    def _look(self) -> None:
        while not self._ended.wait(self._every_s):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            self._looks += 1
            for ident, frame in sys._current_frames().items():
                name = names.get(ident, "")
                if name not in ("", "stacks"):
                    self._seen.setdefault(name, Counter())[_place(frame)] += 1


def _place(frame: FrameType | None) -> str:
    """Of a stack."""
    ours: list[str] = []
    innermost = ""
    while frame is not None and len(ours) < _DEPTH:
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        told = f"{file.stem}.{name}:{frame.f_lineno}"
        if any(part in _OURS for part in file.parts):
            ours.append(told)
        elif not innermost and not ours:
            innermost = told
        frame = frame.f_back
    return " > ".join([*reversed(ours), *([innermost] if innermost else [])])
