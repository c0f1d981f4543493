"""Who may call: bearer tokens or client certificates to tenants. Tokens are checked by an interceptor before any handler runs.

The file has lines of `TENANT TOKEN`; it is read again when it changes, so tokens rotate without a restart, and the open calls of
a token that is taken out are ended. A token never appears in a log, an error or a metric.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import inspect
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from teacher_server.config.file_stamp import Stamp, stamp_of
from teacher_server.config.server import TlsConfig
from teacher_server.errors import ServerConfigError
from teacher_wire.core.errors import AuthenticationError, ForbiddenError, RequestError, TeacherWireError
from teacher_wire.transport import status_table
from teacher_wire.transport.channel import TENANT_KEY

log = logging.getLogger(__name__)

MIN_TOKEN_CHARS = 16
REVOKE_EVERY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SENT = "students send what $LYCEUM_TOKEN holds, or the variable that teacher.token_env names"
_UNKNOWN = (
    f"the token is not known here: it must be one of this server's edge.tokens_file, without the tenant's name; {_SENT}"
)
_NONE = f"this server needs a token, and none was sent; {_SENT}"
_OPEN_SERVICES = ("/grpc.health.v1.Health/",)


class TokenFile:
    """The tokens of a file.

    Raises:
        ServerConfigError: from the constructor: unreadable, empty, or a malformed line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser()
        self._stamp: Stamp | None = None
        self._refused: Stamp | None = None
        self._tenants: dict[bytes, str] = {}
        self._read()

    def tenant(self, token: str) -> str | None:
        """The tenant of a token, or None."""
        self.follow()
        digest = _digest(token)
        found = None
        for known, name in self._tenants.items():  # every entry, so that timing tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def follow(self) -> str:
        """Reads the file if it has changed. What it says is not taken while it is malformed or away, so that a half-written file
        locks nobody out; the reason is returned, and logged, once for each content."""
        found = stamp_of(self._path)
        if found in (self._stamp, self._refused):
            return ""
        try:
            self._read()
        except ServerConfigError as error:
            self._refused = found
            log.warning("%s; the tokens before stay in force", error)
            return str(error)
        return ""

    def _read(self) -> None:
        field = f"edge.tokens_file {self._path}"
        stamp = stamp_of(self._path)
        try:
            text = self._path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file by a mark
        except OSError as error:
            raise ServerConfigError(f"{field}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            place = error.object[: error.start].count(b"\n") + 1
            raise ServerConfigError(f"{field}:{place}: not UTF-8: save it as plain text") from error
        tenants: dict[bytes, str] = {}
        lines: dict[bytes, int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, token = _entry(line, f"{field}:{number}")
            digest = _digest(token)
            if digest in tenants:
                raise ServerConfigError(
                    f"{field}:{number}: the token of {name} is that of {tenants[digest]} on line {lines[digest]}: a token is one tenant's, given once"
                )
            tenants[digest], lines[digest] = name, number
        if not tenants:
            raise ServerConfigError(f"{field}: holds no token")
        self._tenants, self._stamp = tenants, stamp


def _entry(line: str, where: str) -> tuple[str, str]:
    """Tenant and token of a line; an error never holds the token."""
    parts = line.split()
    if len(parts) != 2 or len(parts[1]) < MIN_TOKEN_CHARS:
        raise ServerConfigError(f"{where}: expected TENANT TOKEN, the token of {MIN_TOKEN_CHARS} characters or more")
    name, token = parts
    if not _NAME.fullmatch(name):
        raise ServerConfigError(
            f"{where}: {name!a} is no tenant's name: letters, digits, dots, dashes and underscores, at most 63"
        )
    if not all("!" <= character <= "~" for character in token):
        raise ServerConfigError(f"{where}: the token of {name} holds a character that no header may hold: use ASCII")
    return name, token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def tenant_of(
    tokens: TokenFile | None, certificates: TlsConfig | None = None
) -> Callable[[grpc.aio.ServicerContext], str]:
    """A function from a call's context to its tenant.

    Args:
        tokens: decide, where there are any.
        certificates: else a client certificate does, where they demand one; else the caller names itself.

    The function raises RequestError for a name that is none, AuthenticationError for a token or certificate that names nobody,
    ForbiddenError for a caller that names somebody else.
    """

    def find(context: grpc.aio.ServicerContext) -> str:
        metadata = context.invocation_metadata()
        if tokens is not None:
            found = tokens.tenant(_bearer(metadata))
            if found is None:  # taken out after the interceptor had looked
                raise AuthenticationError(_UNKNOWN, field="authorization")
            return found
        named = _value(metadata, TENANT_KEY)
        if certificates is not None and certificates.client_ca_file is not None:
            shown = _certified(context.auth_context(), certificates.tenant)
            if named not in ("", shown):
                raise ForbiddenError(
                    "the certificate is another tenant's", field="tenant", value=named[:100], limit=shown
                )
            return shown
        if named and not _NAME.fullmatch(named):
            raise RequestError("not a tenant's name", field="tenant", value=named[:100], limit=_NAME.pattern)
        return named

    return find


def _certified(shown: Mapping[str, Sequence[bytes]], kind: str) -> str:
    """The tenant whom a verified client certificate names."""
    values = shown.get({"dns": "peer_dns", "uri": "peer_uri", "common_name": "x509_common_name"}[kind], ())
    name = values[0].decode("utf-8", "replace") if values else ""
    if kind == "uri":
        name = name.rstrip("/").rpartition("/")[2]
    if not _NAME.fullmatch(name):
        raise AuthenticationError(
            f"the certificate names no tenant by its {kind} (edge.tls.tenant of this server)",
            field="certificate", value=ascii(name)[:100] if name else "none", limit=_NAME.pattern,
        )  # fmt: skip
    return name


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token, and ends those whose token is taken out; health checks stay open."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        self._calls: dict[asyncio.Task[Any], str] = {}
        self._watch: asyncio.Task[None] | None = None

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
            said = _UNKNOWN if token else _NONE
            return _refusal(handler, AuthenticationError(said, field="authorization"))
        named = _value(details.invocation_metadata, TENANT_KEY)
        if named not in ("", tenant):
            return _refusal(handler, ForbiddenError("the token is another tenant's", field="tenant", value=named[:100]))
        return self._revocable(handler, token) if handler.response_streaming else handler

    def _revocable(self, handler: grpc.RpcMethodHandler, token: str) -> grpc.RpcMethodHandler:
        """The same handler, ended as unauthenticated once its token is taken out."""
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def writes(request: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._open(token, context):
                await inner(request, context)

        async def yields(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._open(token, context), contextlib.aclosing(inner(request, context)) as answers:
                async for answer in answers:
                    yield answer

        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        behaviour = yields if inspect.isasyncgenfunction(inner) else writes
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _open(self, token: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """A call of a token, while it is open."""
        call = asyncio.current_task()
        assert call is not None
        self._calls[call] = token
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look())
        try:
            yield
        except asyncio.CancelledError:
            if call in self._calls:
                raise
            call.uncancel()
            error = AuthenticationError("the token was taken back", field="authorization")
            await context.abort(status_table.code_of(error), str(error), _trailing(error))
        finally:
            self._calls.pop(call, None)

    async def _look(self) -> None:
        """Looks for tokens that are gone as long as calls are open."""
        while self._calls:
            await asyncio.sleep(REVOKE_EVERY_S)
            for call, token in list(self._calls.items()):
                if self._tokens.tenant(token) is None:
                    del self._calls[call]
                    call.cancel()


def _value(metadata: Any, wanted: str) -> str:
    return next((value for key, value in metadata or () if key == wanted and isinstance(value, str)), "")


def _bearer(metadata: Any) -> str:
    value = _value(metadata, "authorization")
    return value[7:].strip() if value.lower().startswith("bearer ") else ""


def _trailing(error: TeacherWireError) -> tuple[tuple[str, bytes]]:
    return ((status_table.DETAIL_KEY, status_table.to_detail(error).SerializeToString()),)


def _refusal(handler: grpc.RpcMethodHandler, error: TeacherWireError) -> grpc.RpcMethodHandler:
    """A handler of the same kind that only refuses."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(status_table.code_of(error), str(error), _trailing(error))

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
