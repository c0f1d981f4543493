"""A real gRPC server for a `TeacherService` in this process, on a loopback port, in its own thread.

For tests, benches and notebooks; the product's edge (teacher_server.edge) adds TLS, health and metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import grpc

from teacher_wire.core.errors import UnavailableError
from teacher_wire.endpoint.servicer import TeacherService, TeacherServicer
from teacher_wire.transport.channel import server_options
from teacher_wire.transport.stream_limits import StreamLimits, with_message_limit


class LoopbackServer:
    """A running server: `address`, `stop()`, `servicer`; `start()` again on the same port."""

    def __init__(self, service: TeacherService, *, limits: StreamLimits | None = None, port: int = 0) -> None:
        self.port = port
        self._service = service
        self._limits = limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: grpc.aio.Server | None = None
        self._thread: threading.Thread | None = None
        self.servicer: TeacherServicer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> LoopbackServer:
        """Starts serving; returns when the port is open.

        Raises:
            UnavailableError: the port is taken.
        """
        ready = threading.Event()
        problem: list[Exception] = []

        def run() -> None:
            loop = asyncio.new_event_loop()
            self._loop = loop
            try:
                loop.run_until_complete(self._bind())
            except Exception as error:
                problem.append(error)
                return
            finally:
                ready.set()
            loop.run_forever()  # and never closed: grpc's poller may still have word for it

        self._thread = threading.Thread(target=run, name="loopback-teacher", daemon=True)
        self._thread.start()
        ready.wait()
        if problem:
            raise UnavailableError(f"cannot listen: {problem[0]}", field="port", value=self.port) from problem[0]
        return self

    async def _bind(self) -> None:
        limits = self._limits or StreamLimits()
        self.servicer = TeacherServicer(self._service, server_version="loopback", limits=limits)
        self._server = grpc.aio.server(options=with_message_limit(server_options()))
        self.servicer.add_to(self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    def stop(self, grace_s: float = 0.0) -> None:
        """Stops serving; streams still open after `grace_s` break."""
        loop, server = self._loop, self._server
        if loop is None or server is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(server.stop(grace_s), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        self._loop = self._server = self._thread = None


@contextlib.contextmanager
def serve(service: TeacherService, *, limits: StreamLimits | None = None) -> Iterator[LoopbackServer]:
    """Serves on a free loopback port until the block ends."""
    server = LoopbackServer(service, limits=limits).start()
    try:
        yield server
    finally:
        server.stop()
