"""What waits to be sent on one Score stream: messages of interactive answers first, and of each answer in its order.

In: serialised messages; out: the same, one at a time, and None once all have left and the stream is to end.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

_FIRST, _LATER, _END = range(3)


@dataclass(frozen=True)
class Item:
    """A message that waits to be sent.

    Attributes:
        reply_bytes: of payload; the tenant holds them until they are taken.
        refusal: nobody's window counts it.
    """

    data: bytes
    reply_bytes: int = 0
    refusal: bool = False


class Outbox:
    """A queue of two ranks; what waits is bounded by the student's window and the bound on refusals, not here."""

    def __init__(self) -> None:
        self._queue: asyncio.PriorityQueue[tuple[int, int, Item | None]] = asyncio.PriorityQueue()
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Messages that wait, and the end if it was told."""
        return self._queue.qsize()

    def put(self, item: Item, *, first: bool) -> None:
        """Adds a message; with `first` it leaves before all that were added without."""
        self._queue.put_nowait((_FIRST if first else _LATER, next(self._numbers), item))

    def end(self) -> None:
        """The stream ends once everything has left."""
        self._queue.put_nowait((_END, next(self._numbers), None))

    async def get(self) -> Item | None:
        """The next message, or None at the end."""
        return (await self._queue.get())[2]

    def unsent(self) -> Iterator[Item]:
        """Takes out what is left."""
        while not self._queue.empty():
            item = self._queue.get_nowait()[2]
            if item is not None:
                yield item
