"""What can go wrong between a student and a teacher, as one tree.

    TeacherWireError
    ├── RequestError        the request breaks a rule of the contract  (ValueError)
    │   ├── TensorError     a tensor breaks the format
    │   └── LimitError      a value is above what this server allows
    ├── NotFoundError       no teacher of that name
    ├── MismatchError       the teacher is not the one that was asked for
    ├── CapabilityError     this teacher cannot give that signal
    ├── AuthenticationError no credentials, or wrong ones
    ├── ForbiddenError      good credentials, but not for this
    ├── OverloadedError     over a queue limit or quota; try after `retry_after_s`
    ├── UnavailableError    the teacher cannot be reached or is going away
    ├── DeadlineError       not answered in the time the student gave
    ├── CancelledRequestError  taken back by the student
    ├── LabelError          an answer that must not be learned from (raised by the student)
    └── ServerError         a fault of the server

Everything here names field, value and limit where there is one. `status.py` is
the only place that turns these into gRPC codes and back.
"""

from __future__ import annotations


class TeacherWireError(Exception):
    """Base of every error of the wire.

    Args:
        message: one sentence for a person.
        field: what was wrong, as the contract or the config calls it.
        value: what it was.
        limit: what it may be.
        retry_after_s: seconds to wait before the same request makes sense again.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        value: object = "",
        limit: object = "",
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.value = str(value)
        self.limit = str(limit)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        parts = [f"{name}={text}" for name, text in self._named() if text]
        return self.message + (f" ({', '.join(parts)})" if parts else "")

    def _named(self) -> list[tuple[str, str]]:
        return [("field", self.field), ("value", self.value), ("limit", self.limit)]

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


def _rebuild(cls: type[TeacherWireError], message: str, state: dict[str, object]) -> TeacherWireError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class RequestError(TeacherWireError, ValueError):
    """The request breaks a rule of the contract; sending it again cannot help."""


class TensorError(RequestError):
    """A tensor's dtype, shape or byte count does not fit."""


class LimitError(RequestError):
    """A value is above what this server allows."""


class NotFoundError(TeacherWireError):
    """No teacher of that name lives here."""


class MismatchError(TeacherWireError):
    """Fingerprint, tokenizer, vocabulary or head is not the expected one."""


class CapabilityError(TeacherWireError):
    """The teacher's backend cannot give this signal."""


class AuthenticationError(TeacherWireError):
    """Credentials are missing or wrong."""


class ForbiddenError(TeacherWireError):
    """The credentials do not cover this."""


class OverloadedError(TeacherWireError):
    """A queue limit or quota is reached; `retry_after_s` says when to come back."""


class UnavailableError(TeacherWireError):
    """The teacher cannot be reached, is starting, draining or has just died."""


class DeadlineError(TeacherWireError):
    """The answer did not come in time."""


class CancelledRequestError(TeacherWireError):
    """The student took the request back."""


class LabelError(TeacherWireError):
    """An answer breaks the contract (shifted, truncated, NaN, foreign): never learned from."""


class ServerError(TeacherWireError):
    """A fault of the server; the text says what it saw."""
