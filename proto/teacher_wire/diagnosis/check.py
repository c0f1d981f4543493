"""The result of a check, and how a check that breaks becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Check:
    """One line of a doctor.

    Attributes:
        state: `ok`; `note`: it works, but may not be meant so; `bad`: it will not work.
        subject: what was looked at.
        what: what was found, in one sentence.
        fix: what to do about it; empty where there is nothing to do.
    """

    state: State
    subject: str
    what: str
    fix: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "what", " ".join(self.what.split()))
        object.__setattr__(self, "fix", " ".join(self.fix.split()))


def surviving(subject: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks; if looking itself fails, one bad line says so, and those before it stand."""
    try:
        yield from checks()
    except Exception as error:  # a doctor must outlive every patient
        told = str(error) or type(error).__name__
        yield Check("bad", subject, f"{subject} could not be looked at: {told[:300]}")
