"""The grpc.aio server students talk to: contract, health.v1, TLS, tokens, drain. No Ray here.

In: an EdgeConfig and a TeacherService; out: an open port. It refuses new work while draining and lets old work end.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from teacher_server import __version__
from teacher_server.config.server import EdgeConfig, TenantConfig
from teacher_server.edge import memory
from teacher_server.edge.admission import Admission
from teacher_server.edge.auth import TokenFile, TokenInterceptor, tenant_of
from teacher_server.edge.label_sharing import LabelSharing
from teacher_server.edge.publishing import Publishing
from teacher_server.edge.tls import server_credentials
from teacher_server.errors import ServerConfigError
from teacher_wire.artifacts.messages import ArtifactCall, ArtifactHeader
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import UnavailableError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.core.status import ServerStatus
from teacher_wire.endpoint.servicer import SERVICE, TeacherService, TeacherServicer
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.labels.store import LabelStore
from teacher_wire.tokenizing.messages import TokenizeCall, TokenizedRow
from teacher_wire.transport.channel import server_options
from teacher_wire.transport.offload import Offload
from teacher_wire.transport.stream_limits import StreamLimits, with_message_limit

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_LAST_WORDS_S = 0.3  # for statuses to leave, once nothing else has to
_SWITCH_S = 5e-4  # how long a thread may keep the interpreter from the event loop
_HTTP2_OPTIONS = [("grpc.max_concurrent_streams", 1024)]


class EdgeServer:
    """A listening edge.

    Args:
        config: where and how to listen.
        service: what answers.
        status_for: how the server is doing, as a tenant may see it.

    Attributes:
        publishing: takes revisions; hears the news.
    """

    def __init__(
        self,
        config: EdgeConfig,
        service: TeacherService,
        status_for: Callable[[str], Awaitable[ServerStatus]] | None = None,
    ) -> None:
        memory.set_up_allocator()
        self._config = config
        self._admission = Admission()
        kept = config.store
        self._store = LabelStore(kept.folder, round(kept.disk_gb * 2**30)) if kept.folder else None
        self._offload = Offload()
        self._sharing = LabelSharing(
            service,
            self._admission,
            memory_bytes=kept.memory_mb << 20,
            store=self._store,
            offload=self._offload,
        )
        self._gate = _Gate(self._sharing)
        self.publishing = Publishing()
        tokens = TokenFile(config.tokens_file) if config.tokens_file else None
        self._servicer = TeacherServicer(
            self._gate,
            server_version=__version__,
            limits=_stream_limits(config),
            tenant_of=tenant_of(tokens, config.tls),
            status_for=status_for,
            charge=self._admission.send,
            offload=self._offload,
            publisher=self.publishing,
        )
        self._trimming: asyncio.Task[None] | None = None
        self._health = health_aio.HealthServicer()
        self._healthy: dict[str, bool] | None = None  # by teacher; None while nobody has said
        self._listening = False
        self._telling: asyncio.Task[None] | None = None
        interceptors = [TokenInterceptor(tokens)] if tokens else []
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                *with_message_limit(server_options(config.keepalive_s, config.keepalive_timeout_s)),
                *_HTTP2_OPTIONS,
            ],
        )
        self._servicer.add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            from grpc_reflection.v1alpha import reflection

            reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), self._server)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._config.address

    async def start(self) -> None:
        """Opens the port and says which services are SERVING; see `set_healthy`.

        Raises:
            ServerConfigError: the port is taken, or a certificate cannot be read.
        """
        await self._say()
        try:
            if self._config.tls:
                self._server.add_secure_port(self._config.address, server_credentials(self._config.tls))
            else:
                self._server.add_insecure_port(self._config.address)
        except RuntimeError as error:
            raise ServerConfigError(f"edge.port: cannot listen on {self._config.address} (is it taken?)") from error
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        await self._server.start()
        if self._store is not None:
            self._looking = asyncio.create_task(asyncio.to_thread(self._store.look))
        self._trimming = asyncio.create_task(memory.give_back(self._held_bytes))
        self._listening = True
        await self._say()

    async def drain(self) -> None:
        """Says NOT_SERVING, refuses new requests as unavailable, and closes the port once all that was taken is sent.

        What is not sent `drain_s` later is broken off as unavailable; students ask for it again elsewhere.
        """
        self._listening = False
        await self._say()
        self._gate.closed = self.publishing.closed = True
        await self._servicer.drain(self._config.drain_s)
        await self._server.stop(grace=_LAST_WORDS_S)
        if self._trimming is not None:
            self._trimming.cancel()

    def set_healthy(self, teachers: Mapping[str, bool]) -> None:
        """Which teachers have a replica that can answer, for `grpc.health.v1`.

        "" is the edge itself. The contract's service is SERVING while any teacher is, `SERVICE/NAME` while that one is.
        """
        if self._healthy == teachers:
            return
        gone = set(self._healthy or ()) - set(teachers)
        self._healthy = dict(teachers)
        self._telling = asyncio.create_task(self._say(gone))

    async def _say(self, gone: Iterable[str] = ()) -> None:
        said = health_pb2.HealthCheckResponse
        healthy = {"": True, SERVICE: self._healthy is None or any(self._healthy.values())}
        healthy |= {f"{SERVICE}/{name}": ok for name, ok in (self._healthy or {}).items()}
        for service, ok in healthy.items():
            await self._health.set(service, said.SERVING if self._listening and ok else said.NOT_SERVING)
        for name in gone:
            await self._health.set(f"{SERVICE}/{name}", said.SERVICE_UNKNOWN)

    def set_tenants(self, tenants: Mapping[str, TenantConfig], edges: int = 1) -> None:
        """Quotas from now on, of which this edge grants its part.

        Args:
            tenants: by name; DEFAULT_TENANT for those not listed.
            edges: that share the students.
        """
        self._admission.configure(tenants, edges)

    def _held_bytes(self) -> int:
        """What is held on purpose, and would not come of giving memory back."""
        held = self._servicer.held
        return held["request_bytes"] + held["reply_bytes"] + held["kept_reply_bytes"] + self._sharing.memory_bytes

    def counters(self) -> dict[str, Any]:
        """Open streams and requests, what was shared, and what each tenant took."""
        return {
            "open_streams": self._servicer.open_streams,
            "open_requests": self._servicer.open_requests,
            "held": self._servicer.held,
            "store": self._sharing.counters(),
            "tenants": self._admission.counters(),
        }


def _stream_limits(config: EdgeConfig) -> StreamLimits:
    """What the edge holds for its peers at most."""
    limits = config.limits
    return StreamLimits(
        max_window_bytes=config.window_mb << 20,
        max_request_bytes=limits.request_mb << 20,
        stall_s=limits.stall_s,
        max_calls=limits.calls,
        max_tenant_calls=limits.tenant_calls,
        max_artifacts=limits.heads,
        max_tenant_artifacts=limits.tenant_heads,
        max_tenant_requests=limits.tenant_requests,
        max_request_held_bytes=limits.requests_held_mb << 20,
        max_tenant_request_held_bytes=limits.tenant_requests_held_mb << 20,
        max_reply_held_bytes=limits.replies_held_mb << 20,
        max_tenant_reply_held_bytes=limits.tenant_replies_held_mb << 20,
        unproven_reply_held_bytes=limits.unproven_replies_held_mb << 20,
        kept_reply_bytes=limits.kept_replies_mb << 20,
    )


class _Gate:
    """The service, until it closes: then new requests are refused and old ones go on."""

    def __init__(self, service: TeacherService) -> None:
        self._service = service
        self.closed = False

    async def describe(self) -> list[TeacherInfo]:
        self._check()
        return await self._service.describe()

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        return await self._service.info(teacher, fingerprint)

    async def score(self, call: ScoreCall) -> TeacherSignals:
        self._check()
        return await self._service.score(call)

    def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        self._check()
        return self._service.generate(call)

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        self._check()
        return await self._service.artifact_header(call)

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        return await self._service.artifact_bytes(call, offset, size)

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        self._check()
        return await self._service.tokenize(call)

    def _check(self) -> None:
        if self.closed:
            raise UnavailableError("the server is going down")
