"""How long a call that fails is made again, and when a silent one has failed: the same for Generate and Artifact.

In: what a call raised; out: a pause before the next one, or the error. The clock starts with the first failure since anything came.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc

from teacher_wire.core.errors import TeacherWireError, UnavailableError
from teacher_wire.transport import status_table

Message = TypeVar("Message")


class Counts(Protocol):
    """What is counted of retries."""

    retries: int


@dataclass(frozen=True)
class Retry:
    """How a client makes a failed call again.

    Attributes:
        address, route: of the server, for errors.
        retry_for_s: how long it is tried.
        pause_s: before the next try, by the problem.
        on_trouble: called with the problem of every retry.
        answer_s: of silence, after which a call has failed.
        next_edge: called before the next try, if the client may turn to another address for it.
    """

    address: str
    retry_for_s: float
    pause_s: Callable[[TeacherWireError], float]
    on_trouble: Callable[[TeacherWireError], None]
    stats: Counts
    route: str = ""
    answer_s: float = math.inf
    next_edge: Callable[[], Awaitable[None]] | None = None

    def problem(self, error: grpc.RpcError) -> TeacherWireError:
        """The error of the language behind one of grpc."""
        return status_table.from_rpc(error, self.address, self.route)


class Patience:
    """The failures of one call so far, since anything came."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._failing_since_s = math.inf

    def progressed(self) -> None:
        """Something came: the clock starts anew with the next failure."""
        self._failing_since_s = math.inf

    async def after(self, problem: TeacherWireError) -> None:
        """Waits before the next try.

        Raises:
            TeacherWireError: `problem`, if it cannot be retried or time is up.
        """
        retry, now_s = self._retry, time.monotonic()
        pause_s = retry.pause_s(problem)
        self._failing_since_s = min(self._failing_since_s, now_s)
        if (
            not isinstance(problem, status_table.RETRYABLE)
            or now_s + pause_s - self._failing_since_s >= retry.retry_for_s
        ):
            raise problem
        retry.stats.retries += 1
        retry.on_trouble(problem)
        if retry.next_edge is not None:
            await retry.next_edge()
        await asyncio.sleep(pause_s)


async def within(stream: AsyncIterable[Message], answer_s: float, address: str) -> AsyncGenerator[Message, None]:
    """The messages of a stream.

    Raises:
        UnavailableError: none came for `answer_s` seconds.
    """
    messages = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(answer_s if answer_s < math.inf else None):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise silent(address, answer_s) from None
        yield message


def silent(address: str, answer_s: float) -> UnavailableError:
    """What is said of a server that has taken a call and does not answer it."""
    return UnavailableError(f"{address}: no answer came", field="teacher.answer_s", value=f"{answer_s:g}")
