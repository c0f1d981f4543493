"""The connection of a client to one of a server's edges: its channel, and the next edge when one is gone.

In: an address, or several with commas, and credentials; out: stubs to call. It opens no stream and retries nothing itself.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import grpc

from teacher_wire.core.errors import OverloadedError, TeacherWireError
from teacher_wire.transport import status_table
from teacher_wire.transport.channel import Credentials, addresses_of, call_metadata, open_channel
from teacher_wire.transport.proxy import AUTO, route_to
from teacher_wire.v2 import teacher_pb2_grpc as pb_grpc

BACKOFF_S = (1.0, 2.0)


@dataclass
class ClientStats:
    """Counters of one client since it was made."""

    requests: int = 0
    replies: int = 0
    payload_bytes: int = 0
    reconnects: int = 0
    retries: int = 0
    resumed_chunks: int = 0


class Connection:
    """A connection to one of the edges at an address.

    Args:
        address: HOST:PORT, or several with commas.
        credentials: TLS files, token, tenant.
        backoff_s: shortest and longest pause before the next try.

    Attributes:
        address: as given, for errors.
        metadata: of every call.
        channel, stub, route: of the present edge.
        stats: counters of the client.

    Raises:
        RequestError: the address is none, or a file cannot be read.
    """

    def __init__(self, address: str, credentials: Credentials | None, backoff_s: tuple[float, float]) -> None:
        self.address = address
        self.stats = ClientStats()
        self._credentials = credentials
        self._backoff_s = backoff_s
        self._addresses = deque(addresses_of(address))
        self.channel = self._open()
        self.metadata = call_metadata(credentials)
        self.stub = pb_grpc.TeacherStub(self.channel)

    @property
    def edges(self) -> int:
        """How many addresses there are."""
        return len(self._addresses)

    async def close(self) -> None:
        await self.channel.close()

    async def next_edge(self) -> None:
        """Turns to the next address, if there are several."""
        if len(self._addresses) == 1:
            return
        self._addresses.rotate(-1)
        gone = self.channel
        self.channel = self._open()
        self.stub = pb_grpc.TeacherStub(self.channel)
        await gone.close()

    def problem(self, error: grpc.RpcError) -> TeacherWireError:
        """The error of the language behind one of grpc."""
        return status_table.from_rpc(error, self.address, self.route)

    def pause_s(self, problem: TeacherWireError) -> float:
        """The server's own delay if it gave one, else 1-2 s, never the same for all students at once."""
        if isinstance(problem, OverloadedError) and problem.retry_after_s > 0:
            return problem.retry_after_s * random.uniform(1.0, 1.1)
        return random.uniform(*self._backoff_s)

    def _open(self) -> grpc.aio.Channel:
        address, setting = self._addresses[0], self._credentials.proxy if self._credentials else AUTO
        self.route = str(route_to(address, setting))
        return open_channel(address, self._credentials)
