"""The one table between our errors and gRPC status codes, both ways, and what may be retried.

A failed call carries the code, one sentence, and an `ErrorDetail` in its trailing metadata;
a failed request inside a stream carries the same `ErrorDetail` as a message.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf.message import DecodeError

from teacher_wire.core import errors
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.v2 import teacher_pb2 as pb

DETAIL_KEY = "lyceum-error-bin"
MAX_DETAIL_CHARS = 1000

_Code = grpc.StatusCode
CODE_OF: dict[type[TeacherWireError], grpc.StatusCode] = {
    errors.RequestError: _Code.INVALID_ARGUMENT,
    errors.TensorError: _Code.INVALID_ARGUMENT,
    errors.LimitError: _Code.INVALID_ARGUMENT,
    errors.NotFoundError: _Code.NOT_FOUND,
    errors.MismatchError: _Code.FAILED_PRECONDITION,
    errors.CapabilityError: _Code.UNIMPLEMENTED,
    errors.AuthenticationError: _Code.UNAUTHENTICATED,
    errors.ForbiddenError: _Code.PERMISSION_DENIED,
    errors.OverloadedError: _Code.RESOURCE_EXHAUSTED,
    errors.UnavailableError: _Code.UNAVAILABLE,
    errors.DeadlineError: _Code.DEADLINE_EXCEEDED,
    errors.CancelledRequestError: _Code.CANCELLED,
    errors.LabelError: _Code.DATA_LOSS,
    errors.ServerError: _Code.INTERNAL,
}
# For a peer that sends a bare code without detail: another implementation, a proxy, grpc itself.
ERROR_OF: dict[grpc.StatusCode, type[TeacherWireError]] = {
    _Code.INVALID_ARGUMENT: errors.RequestError,
    _Code.OUT_OF_RANGE: errors.RequestError,
    _Code.NOT_FOUND: errors.NotFoundError,
    _Code.FAILED_PRECONDITION: errors.MismatchError,
    _Code.UNIMPLEMENTED: errors.CapabilityError,
    _Code.UNAUTHENTICATED: errors.AuthenticationError,
    _Code.PERMISSION_DENIED: errors.ForbiddenError,
    _Code.RESOURCE_EXHAUSTED: errors.OverloadedError,
    _Code.UNAVAILABLE: errors.UnavailableError,
    _Code.DEADLINE_EXCEEDED: errors.DeadlineError,
    _Code.CANCELLED: errors.CancelledRequestError,
    _Code.DATA_LOSS: errors.LabelError,
    # Our server never ends a call so without a detail: a transport that broke does (RST_STREAM, a proxy, a dying peer).
    _Code.INTERNAL: errors.UnavailableError,
    _Code.UNKNOWN: errors.UnavailableError,
}
RETRYABLE = (errors.UnavailableError, errors.OverloadedError)

_BY_NAME = {cls.__name__: cls for cls in CODE_OF}


def code_of(error: TeacherWireError) -> grpc.StatusCode:
    """The gRPC code of an error."""
    return CODE_OF[type(error)]


def to_detail(error: TeacherWireError) -> pb.ErrorDetail:
    """The error as a message; long texts are cut and end in an ellipsis."""
    return pb.ErrorDetail(
        kind=type(error).__name__,
        message=cut(error.message),
        field=cut(error.field),
        value=cut(error.value),
        limit=cut(error.limit),
        retry_after_s=error.retry_after_s,
    )


def from_detail(detail: pb.ErrorDetail) -> TeacherWireError:
    """The error in a message; a kind this side does not know becomes a ServerError that names it."""
    cls = _BY_NAME.get(detail.kind)
    message = detail.message if cls else f"{detail.kind or 'unnamed error'}: {detail.message}"
    return (cls or errors.ServerError)(
        message, field=detail.field, value=detail.value, limit=detail.limit, retry_after_s=detail.retry_after_s
    )


def from_rpc(error: grpc.RpcError, address: str, route: str = "") -> TeacherWireError:
    """The error behind a failed call.

    Args:
        error: what grpc raised.
        address: who was called, for the text.
        route: by which way, for the text of a call that did not arrive.
    """
    for key, value in _trailing(error):
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                return from_detail(pb.ErrorDetail.FromString(value))
            except DecodeError:
                break
    code: grpc.StatusCode = error.code()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
        # gRPC's own word, of either side: the same message is too long however often it is sent
        return errors.LimitError(f"{address}: {error.details()}", field="message bytes")
    cls = ERROR_OF.get(code, errors.ServerError)
    way = f", {route}" if route else ""
    return cls(f"{address}: {error.details() or 'no details'} [{code.name}]{way}", field="address", value=address)


def _trailing(error: grpc.RpcError) -> Sequence[tuple[str, str | bytes]]:
    found = getattr(error, "trailing_metadata", lambda: None)()
    return list(found or ())


def cut(text: str) -> str:
    """A text that may travel: at most MAX_DETAIL_CHARS characters, and no halves of any."""
    text = text.encode("utf-8", "backslashreplace").decode()  # half characters cannot travel
    return text if len(text) <= MAX_DETAIL_CHARS else text[: MAX_DETAIL_CHARS - 1] + "…"
