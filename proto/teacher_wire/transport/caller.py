"""The peer of one call as a server meets it: messages in and out as bytes, a status at the end whatever happens.

In: a gRPC context; out: bytes. A peer that takes nothing for `stall_s` is given up, so that it holds memory no longer.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, TypeAlias

import grpc

from teacher_wire.core.errors import RequestError, ServerError, TeacherWireError, UnavailableError
from teacher_wire.transport import status_table

log = logging.getLogger(__name__)

Context: TypeAlias = Any  # grpc.aio.ServicerContext, which ships no types

_ABORT_S = 1.0  # the status waits behind what the peer has not read; it is sent even if we do not wait for it


class Caller:
    """Whoever called.

    Args:
        context: of the call.
        stall_s: longest time for one message to be taken.
    """

    def __init__(self, context: Context, stall_s: float) -> None:
        self._context = context
        self._stall_s = stall_s

    async def read(self) -> bytes | None:
        """The next message; None once the peer has closed its side."""
        data = await self._context.read()
        return None if data is grpc.aio.EOF else data

    async def read_only(self) -> bytes:
        """The one message of a call that has one.

        Raises:
            RequestError: there is none, or it did not come in time.
        """
        try:
            async with asyncio.timeout(self._stall_s):
                data = await self.read()
        except TimeoutError:
            raise RequestError("the request did not come in time", field="stall_s", limit=self._stall_s) from None
        if data is None:
            raise RequestError("the call has no request")
        return data

    async def send(self, data: bytes) -> None:
        """Sends a message; returns once it has left this process, or is the only one that has not.

        Raises:
            UnavailableError: the peer has not taken it in time.
        """
        try:
            async with asyncio.timeout(self._stall_s):
                await self._context.write(data)
        except TimeoutError:
            raise UnavailableError(
                "given up: the peer takes nothing", field="stall_s", value=len(data), limit=self._stall_s
            ) from None
        except grpc.aio.BaseError as error:  # gRPC's word for a call that has ended under us
            raise UnavailableError("the peer is gone") from error


async def abort(context: Context, error: BaseException) -> None:
    """Ends a call with the error's code and detail; raises, unless the peer is gone."""
    found = bare(known(error))
    detail = status_table.to_detail(found).SerializeToString()
    try:
        async with asyncio.timeout(_ABORT_S):
            await context.abort(
                status_table.code_of(found), status_table.cut(str(found)), ((status_table.DETAIL_KEY, detail),)
            )
    except TimeoutError:
        raise found from None
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError:  # the peer is gone: nobody is told
        return


def known(error: BaseException) -> TeacherWireError:
    """The error as one of the wire: faults of our own become a ServerError, and are logged with their trace."""
    if isinstance(error, TeacherWireError):
        return error
    if isinstance(error, asyncio.CancelledError):  # not ours: the service gave up by itself
        return UnavailableError("the server dropped the request")
    log.error("unexpected %s while answering", type(error).__name__, exc_info=error)
    return ServerError(f"{type(error).__name__}: {error}")


def bare(error: TeacherWireError) -> TeacherWireError:
    """The error without the frames it came through: they hold the message that was refused, in a circle at that."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def cancelled_from_outside() -> bool:
    """Whether a CancelledError just caught means this very task: the peer is gone, or the server is stopping."""
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())
