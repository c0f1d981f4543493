"""Who may call: bearer tokens to tenants, checked by an interceptor before any handler runs.

The file has lines of `TENANT TOKEN`; it is read again when it changes, so tokens rotate without a restart.
A token never appears in a log, an error or a metric.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from teacher_server.errors import ServerConfigError
from teacher_wire import status
from teacher_wire.channel import TENANT_KEY
from teacher_wire.errors import AuthenticationError, ForbiddenError, RequestError, TeacherWireError

MIN_TOKEN_CHARS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_OPEN_SERVICES = ("/grpc.health.v1.Health/",)


class TokenFile:
    """The tokens of a file.

    Raises:
        ServerConfigError: from the constructor: unreadable, empty, or a malformed line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = -1
        self._tenants: dict[bytes, str] = {}
        self._read()

    def tenant(self, token: str) -> str | None:
        """The tenant of a token, or None."""
        try:
            if self._path.stat().st_mtime_ns != self._stamp:
                self._read()
        except (OSError, ServerConfigError):  # keep what we have: a half-written file must not lock everybody out
            pass
        digest = _digest(token)
        found = None
        for known, name in self._tenants.items():  # every entry, so that timing tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _read(self) -> None:
        try:
            stamp = self._path.stat().st_mtime_ns
            lines = self._path.read_text().splitlines()
        except OSError as error:
            raise ServerConfigError(f"edge.tokens_file {self._path}: {error.strerror}") from error
        tenants = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            parts = line.split()
            if len(parts) != 2 or len(parts[1]) < MIN_TOKEN_CHARS:
                raise ServerConfigError(
                    f"edge.tokens_file {self._path}:{number}: expected TENANT TOKEN, the token of {MIN_TOKEN_CHARS} characters or more"
                )
            tenants[_digest(parts[1])] = parts[0]
        if not tenants:
            raise ServerConfigError(f"edge.tokens_file {self._path}: holds no token")
        self._tenants, self._stamp = tenants, stamp


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def tenant_of(tokens: TokenFile | None) -> Callable[[grpc.aio.ServicerContext], str]:
    """A function from a call's context to its tenant: the token's, or without tokens the one the caller names.

    The function raises RequestError for a name that is none.
    """

    def find(context: grpc.aio.ServicerContext) -> str:
        metadata = context.invocation_metadata()
        if tokens is not None:
            return tokens.tenant(_bearer(metadata)) or ""
        name = _value(metadata, TENANT_KEY)
        if name and not _NAME.fullmatch(name):
            raise RequestError("not a tenant's name", field="tenant", value=name, limit=_NAME.pattern)
        return name

    return find


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token; health checks stay open."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN_SERVICES):
            return handler
        token = _bearer(details.invocation_metadata)
        tenant = self._tokens.tenant(token)
        if tenant is None:
            said = "the token is not known here" if token else "this server needs a token"
            return _refusal(handler, AuthenticationError(said, field="authorization"))
        named = _value(details.invocation_metadata, TENANT_KEY)
        if named not in ("", tenant):
            return _refusal(handler, ForbiddenError("the token is another tenant's", field="tenant", value=named))
        return handler


def _value(metadata: Any, wanted: str) -> str:
    return next((value for key, value in metadata or () if key == wanted and isinstance(value, str)), "")


def _bearer(metadata: Any) -> str:
    value = _value(metadata, "authorization")
    return value[7:].strip() if value.lower().startswith("bearer ") else ""


def _refusal(handler: grpc.RpcMethodHandler, error: TeacherWireError) -> grpc.RpcMethodHandler:
    """A handler of the same kind that only refuses."""
    trailing = ((status.DETAIL_KEY, status.to_detail(error).SerializeToString()),)

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(status.code_of(error), str(error), trailing)

    async def refuse_stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await refuse(request, context)
        yield

    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, refuse),
        (False, True): (grpc.unary_stream_rpc_method_handler, refuse_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, refuse),
        (True, True): (grpc.stream_stream_rpc_method_handler, refuse_stream),
    }
    make, behaviour = kinds[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
