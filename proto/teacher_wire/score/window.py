"""The reply bytes that one student is ready to hold, as its server sees them."""

from __future__ import annotations

import asyncio
from collections import deque

from teacher_wire.core.errors import LimitError


class Window:
    """Payload bytes the student is ready to hold; handed out first come, first served."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Waits until `size` bytes are free, and takes them.

        Raises:
            LimitError: they can never be.
        """
        if size > self.size:
            raise LimitError(
                "the reply is larger than the student's window", field="window_bytes", value=self.size, limit=size
            )
        if not self._waiting and size <= self.free:
            self.free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            raise

    def give_back(self, size: int) -> None:
        """Makes `size` bytes free again and wakes whoever now fits."""
        self.free = min(self.size, self.free + size)
        while self._waiting and (self._waiting[0][0] <= self.free or self._waiting[0][1].done()):
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= wanted
                turn.set_result(None)
