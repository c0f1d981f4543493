"""The day that chat templates print: one for a whole run, so that all its rows and every resume read the same.

In: a template's source; out: the variables by which it gets to know the day. Must never read the machine's clock twice.
"""

from __future__ import annotations

import re
from datetime import date, datetime, time
from typing import Any

# What templates of published models call the day they print, and how they write it; set by an explicit date only, since
# inference leaves them to the template's own default.
_DATE_VARIABLES = {"date_string": "%d %b %Y", "current_date": "%Y-%m-%d", "datetime": "%Y-%m-%d", "today": "%Y-%m-%d"}


class Clock:
    """The day that chat templates print: one for the whole run.

    Attributes:
        day: it.
        explicit: whether the config names it.
        asked: whether a template has printed it so far.
    """

    def __init__(self, day: date | None = None, *, explicit: bool = False) -> None:
        self.day = day or date.today()
        self.explicit = explicit
        self.asked = False

    def strftime_now(self, form: str) -> str:
        """In the place of the function of this name that transformers gives to templates."""
        self.asked = True
        return datetime.combine(self.day, time()).strftime(form)

    def variables(self, source: str) -> dict[str, Any]:
        """What a template of this source gets to know of the day."""
        found: dict[str, Any] = {"strftime_now": self.strftime_now}
        for name, form in _DATE_VARIABLES.items() if self.explicit else ():
            if reads(source, name):
                self.asked = True
                found[name] = self.day.strftime(form)
        return found

    def may_be_asked(self, source: str) -> bool:
        """Whether what a template of this source renders can depend on the day."""
        return reads(source, "strftime_now") or (self.explicit and any(reads(source, name) for name in _DATE_VARIABLES))


def reads(source: str, name: str) -> bool:
    """Whether a template's source names a variable."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None
