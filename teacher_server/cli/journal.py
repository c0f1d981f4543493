"""What a running server says on standard error: a line with time and level each, for people, or as JSON for programs.

In: sentences; out: lines. Must never raise for a text, nor hold one back.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]
_NAME = "teacher-server"
# What the parts of the server say of trouble, all of which they survive.
_TROUBLE = (
    "not followed", "cannot", "could not", "did not stop", "was killed", "given up", "stays in force", "stay in force",
    "Ray ended", "has ended", "is not used",
)  # fmt: skip


class Journal:
    """Writes what it is told.

    Args:
        form: `text`, with the local time, or `json`, one object a line with the time in UTC.
    """

    def __init__(self, form: LogFormat = "text") -> None:
        self.form = form
        self._in_colour = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """A sentence; `warning` if it is about trouble, else `info`."""
        self.write(logging.WARNING if any(word in text for word in _TROUBLE) else logging.INFO, text)

    def error(self, text: str) -> None:
        """Why the server ends, or did not start."""
        self.write(logging.ERROR, text)

    def write(self, level: int, text: str) -> None:
        """A line of a level of `logging`."""
        name, now = logging.getLevelName(level), datetime.now(UTC)
        if self.form == "json":
            line = json.dumps(
                {
                    "time": now.isoformat(timespec="milliseconds"),
                    "level": name.lower(),
                    "source": _NAME,
                    "message": text,
                },
                ensure_ascii=False,
            )
        else:
            line = f"{now.astimezone():%Y-%m-%d %H:%M:%S} {self._shown(level, name)} {_NAME} {text}"
        print(line, file=sys.stderr, flush=True)

    def _shown(self, level: int, name: str) -> str:
        colour = {logging.WARNING: "33", logging.ERROR: "31"}.get(level, "2")
        return f"\033[{colour}m{name:<7}\033[0m" if self._in_colour else f"{name:<7}"
