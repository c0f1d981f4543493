"""The reply bytes that one student is ready to hold, as its server sees them."""

from __future__ import annotations

import asyncio

from teacher_wire import PROTOCOL
from teacher_wire.core.errors import CapabilityError, LimitError, RequestError
from teacher_wire.transport.turns import Turns
from teacher_wire.v2 import teacher_pb2 as pb


class Window:
    """Payload bytes the student is ready to hold; handed out in the order of `Turns`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._waiting = Turns()

    async def take(self, size: int, *, first: bool = False) -> None:
        """Waits until `size` bytes are free, and takes them; `first` before those who wait without.

        Raises:
            LimitError: they can never be.
        """
        if size > self.size:
            raise LimitError(
                "the reply is larger than the student's window", field="window_bytes", value=self.size, limit=size
            )
        turn = self._waiting.join(size, first=first)
        self.give_back(0)
        try:
            await turn
        except asyncio.CancelledError:
            self.give_back(size if turn.done() and not turn.cancelled() else 0)
            raise

    def give_back(self, size: int) -> None:
        """Makes `size` bytes free again and wakes whoever now fits."""
        self.free = min(self.size, self.free + size)
        while (wanted := self._waiting.next_size) is not None and wanted <= self.free:
            self.free -= wanted
            self._waiting.let_in()


def open_window(up: pb.ScoreUp, kind: str | None, max_bytes: int) -> Window:
    """The window that the first message of a stream opens.

    Raises:
        RequestError, CapabilityError, LimitError: it is no Open, of another protocol, or of a size that is not allowed.
    """
    if kind != "open":
        raise RequestError("the first message must be Open", field="message", value=kind or "empty", limit="open")
    if up.open.protocol != PROTOCOL:
        raise CapabilityError(
            "the student speaks another protocol version",
            field="protocol",
            value=up.open.protocol,
            limit=PROTOCOL,
        )
    if not 1 <= up.open.window_bytes <= max_bytes:
        raise LimitError("window", field="window_bytes", value=up.open.window_bytes, limit=f"1..{max_bytes}")
    return Window(up.open.window_bytes)
