"""Who waits for bytes, in what order: first come, first served, but for those that may overtake, within a bound.

In: sizes; out: a future each, resolved by whoever has the bytes. It knows no limit and counts no byte.
"""

from __future__ import annotations

import asyncio
from collections import deque

_MOST_OVERTAKEN = 8  # of those who may not overtake, the first waits for at most so many who came later


class Turns:
    """Those who wait; of two that may overtake, the one who came first is first."""

    def __init__(self) -> None:
        self._first: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._later: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._overtaken = 0

    def join(self, size: int, *, first: bool) -> asyncio.Future[None]:
        """Waits from now on; with `first`, before those who wait without."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._first if first else self._later).append((size, turn))
        return turn

    @property
    def next_size(self) -> int | None:
        """Bytes that the next one waits for; None if nobody waits."""
        queue = self._queue()
        return queue[0][0] if queue else None

    def let_in(self) -> None:
        """Resolves the next one's turn."""
        queue = self._queue()
        self._overtaken = self._overtaken + 1 if queue is self._first and self._later else 0
        queue.popleft()[1].set_result(None)

    def _queue(self) -> deque[tuple[int, asyncio.Future[None]]]:
        for queue in (self._first, self._later):
            while queue and queue[0][1].done():  # taken back
                queue.popleft()
        if self._later and (not self._first or self._overtaken >= _MOST_OVERTAKEN):
            return self._later
        return self._first
