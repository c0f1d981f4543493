"""What every handler does first: bytes to a message of the protocol, and names that are names. Refusals are short.

In: bytes and messages of the other machine; out: messages, or a RequestError that repeats no long value.
"""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as AnyMessage

from teacher_wire.core.errors import RequestError

MAX_ID_CHARS = 64

Message = TypeVar("Message", bound=AnyMessage)


def check_request_id(text: str) -> None:
    """Refuses what is no id of a request. The refusal does not repeat it whole."""
    if not text:
        raise RequestError("missing", field="request_id")
    check_name("request_id", text)


def check_names(request: Any, *names: str) -> None:
    """Refuses a request in which a field of these is longer than a name may be, or not printable."""
    for field in names:
        check_name(field, getattr(request, field))


def check_name(field: str, text: str) -> None:
    """Refuses a text that is longer than a name may be, or not printable. The refusal does not repeat it whole."""
    if len(text) > MAX_ID_CHARS or not text.isprintable():
        raise RequestError(
            "not a printable name", field=field, value=ascii(text[:MAX_ID_CHARS]), limit=f"{MAX_ID_CHARS} characters"
        )


def parse(kind: type[Message], data: bytes | bytearray) -> Message:
    """The message of that kind in `data`.

    Raises:
        RequestError: there is none.
    """
    message = kind()
    try:
        message.ParseFromString(data)  # takes any bytes
    except DecodeError:
        raise RequestError(
            "not a message of this protocol", field=kind.DESCRIPTOR.name, value=f"{len(data)} bytes"
        ) from None
    return message
