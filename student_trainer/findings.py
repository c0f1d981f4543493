"""What the checks before step 0 find: one `Finding` per check, whether it passed or not.

In: checks that yield findings, or that raise the errors of this house; out: the first bad one as its error (`train`), or all of them
(`plan`, `doctor`). The floor of the house: it knows no setting and loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from student_trainer.errors import ConfigError, StudentError
from teacher_wire.core.errors import TeacherWireError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        ok: whether the run can start as far as this check can tell.
        setting: dotted name of the setting, or of the section, that decides it.
        what: what was found, in one sentence.
        fix: what to change; empty where there is nothing to mend, or where `what` says it. With `ok` it is advice.
        error: what a command that stops here raises; None if `ok`.
    """

    ok: bool
    setting: str
    what: str
    fix: str = ""
    error: Exception | None = None

    @classmethod
    def good(cls, setting: str, what: str, advice: str = "") -> Finding:
        """A check that passed; with `advice` where the setting is legal but probably not meant."""
        return cls(True, setting, what, advice)

    @classmethod
    def bad(
        cls, setting: str, what: str, fix: str = "", *, joint: str = "; ", kind: type[Exception] = ConfigError
    ) -> Finding:
        """A check that failed; the error's text is `what` and `fix`, joined by `joint`."""
        return cls(False, setting, what, fix, kind(what + (joint + fix if fix else "")))

    @classmethod
    def of(cls, setting: str, error: Exception, fix: str = "") -> Finding:
        """A check that failed with an error of its own."""
        return cls(False, setting, str(error), fix, error)

    def require(self) -> None:
        """Raises the error of a check that failed."""
        if self.error is not None:
            raise self.error


class Findings:
    """Findings in the order in which they are made.

    Args:
        stops: raise the first bad one as its error; without it every check that still can is made.
        on_advice: called with the advice of a check that passed.

    Attributes:
        all: every finding so far.
    """

    def __init__(self, *, stops: bool = True, on_advice: Callable[[str], None] = lambda _: None) -> None:
        self.all: list[Finding] = []
        self._stops = stops
        self._on_advice = on_advice

    def add(self, found: Iterable[Finding]) -> bool:
        """Takes findings as they are made, which ends with the first bad one if it stops there; True if all are good.

        Raises:
            Exception: the error of the first bad one, if it stops there.
        """
        all_good = True
        for finding in found:
            self.all.append(finding)
            all_good = all_good and finding.ok
            if self._stops:
                finding.require()
            if finding.ok and finding.fix:
                self._on_advice(finding.fix)
        return all_good

    def attempt(self, setting: str, make: Callable[[], Made], what: str) -> Made | None:
        """What `make` returns; None where it raises an error of the user's and the findings do not stop there.

        Args:
            setting: that decides whether it works.
            make: loads, connects or checks.
            what: what has been found once it has worked.
        """
        made: list[Made] = []
        found = checked(setting, lambda: made.append(make()), what)
        self.add([found])
        return made[0] if found.ok else None


def checked(setting: str, check: Callable[[], object], what: str) -> Finding:
    """The finding of a check that raises what is wrong.

    Args:
        setting: that decides it.
        check: raises an error of the user's, or nothing.
        what: what has been found if it raises nothing.
    """
    try:
        check()
    except (StudentError, TeacherWireError) as error:
        return Finding.of(setting, error)
    return Finding.good(setting, what)
