"""What the operator of a teacher server can get wrong; each is one line and exit code 2."""

from __future__ import annotations

from teacher_wire.core.errors import DeadlineError, OverloadedError, UnavailableError

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing needs to be changed before the same command is tried again


def exit_code_of(error: BaseException) -> int:
    """Of the command that an error ends: 75 if the server is away, too busy or too slow; else 2, since something must be changed."""
    return TRY_AGAIN if isinstance(error, UnavailableError | OverloadedError | DeadlineError) else 2


class ServerConfigError(ValueError):
    """A setting is missing, misspelt, out of range or points nowhere; the text names it."""


class RayEndedError(RuntimeError):
    """A process of our own Ray cluster has ended: nothing is served any more, and nothing can be drained."""


class TakenOverError(RuntimeError):
    """Another `teacher-server up` has taken over the cluster that this one had left or seemed to have left."""
