"""What can go wrong in the student's house, as one tree.

    StudentError
    ├── ConfigError   a setting is wrong                              (ValueError)
    ├── DataError     a row, a file or a template breaks a rule       (ValueError)
    ├── ModelError    a model or tokenizer cannot be loaded or used
    └── RunError      a run cannot start, continue or be resumed
        ├── NonFiniteError  the numbers of a run are no numbers any more; exit code 1
        ├── RolloutError    the student's own samples cannot be written
        ├── TeacherAwayError  one of several teachers does not answer; exit code 75, and the run can be resumed
        └── OfflineError    what a run needs of a teacher that is not to be asked is not kept on this machine

The text of each is one clear line naming what and where; the CLI prints it and exits with its `exit_code`.
"""

from __future__ import annotations

from teacher_wire.core.errors import DeadlineError, OverloadedError, UnavailableError

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing needs to be changed before the same command is tried again


class StudentError(Exception):
    """Base of every error that a user of the student trainer can cause or mend.

    Args:
        message: one sentence for a person; line breaks in it (quoted causes) become spaces.

    Attributes:
        exit_code: of the command that it ends: 2, since the user can mend it before the same command is tried again.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(StudentError, ValueError):
    """A setting is wrong; names the field, its value and what it may be."""


class DataError(StudentError, ValueError):
    """A row, a file or a template breaks a rule.

    Args:
        message: what is wrong, without the place.
        file: the source as the config names it; empty where no file is to blame.
        line: its line (or row, in a source without lines) from 1; 0 for the file as a whole.
        field: the field at fault, such as `messages[1].content`.
        value: what it holds; long values are shown shortened.
    """

    def __init__(self, message: str, *, file: str = "", line: int = 0, field: str = "", value: object = None) -> None:
        place = file + (f":{line}" if line else "") + (": " if file else "")
        named = [f"field={field}"] * bool(field) + [f"value={_shown(value)}"] * (value is not None)
        super().__init__(place + message + (f" ({', '.join(named)})" if named else ""))
        self.file, self.line, self.field, self.value = file, line, field, value

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.__dict__))


class ModelError(StudentError):
    """A model, adapter or tokenizer cannot be loaded, or does not fit the task."""


class RunError(StudentError):
    """A run cannot start, continue or be resumed."""


class NonFiniteError(RunError):
    """A loss, a gradient, a weight or a held-out figure is NaN or infinite: the run as it was set up does not work."""

    exit_code = 1


class RolloutError(RunError):
    """The engine that writes the student's own samples is gone, has no memory, or does not fit the student."""


class TeacherAwayError(RunError):
    """A teacher of the list `teachers` does not answer, and its labels cannot be done without: the run goes on later, by --resume."""

    exit_code = TRY_AGAIN


class OfflineError(RunError):
    """Something that only the teacher can give is not on this machine's disk, and `teacher.offline` says that it is not to be asked."""


def exit_code_of(error: BaseException) -> int:
    """Of the command that an error ends: its own; 75 if the teacher is away, too busy or too slow; else 2, since something must be changed."""
    if isinstance(error, UnavailableError | OverloadedError | DeadlineError):
        return TRY_AGAIN
    return int(getattr(error, "exit_code", 2))


def _shown(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _rebuild(cls: type[DataError], text: str, state: dict[str, object]) -> DataError:
    error = cls(text)
    error.__dict__.update(state)
    return error
