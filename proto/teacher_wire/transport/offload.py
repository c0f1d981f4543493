"""Work that must not hold up an event loop: decoding, checking, hashing and encoding of anything that is not small.

In: a function over bytes and how many they are; out: its result. A tenant has one piece of work at a time, so that no
tenant's pile stands before another's; the pool is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

SMALL_BYTES = 64 << 10  # done at once: takes less than handing it to a thread and back
_TINY_BYTES = 1 << 10  # credits, acknowledgements: not even a turn is waited for

Result = TypeVar("Result")


@dataclass
class _Turn:
    """One tenant's turn; `users` have it or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Offload:
    """A small pool of threads that tenants share fairly.

    Args:
        threads: of the pool. More than two only wait for the interpreter's lock.
    """

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="offload")
        self._turns: dict[str, _Turn] = {}

    async def run(self, tenant: str, size: int, work: Callable[..., Result], *arguments: object) -> Result:
        """The result of `work(*arguments)`, which walks `size` bytes or so.

        It is computed here and now if that is little, else in a thread; a tenant's pieces one after another. Where the
        waiting call is cancelled, the tenant's next piece still waits for this one to end.
        """
        if size <= _TINY_BYTES:
            return work(*arguments)
        turn = self._turns.setdefault(tenant, _Turn())
        turn.users += 1
        try:
            await turn.lock.acquire()
        except asyncio.CancelledError:
            self._left(tenant, turn)
            raise
        if size <= SMALL_BYTES:
            try:
                return work(*arguments)
            finally:
                self._done(tenant, turn)
        try:
            under_way = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        except BaseException:
            self._done(tenant, turn)
            raise
        under_way.add_done_callback(lambda ended: self._ended(tenant, turn, ended))
        return await asyncio.shield(under_way)

    def close(self) -> None:
        """Ends the threads once they have nothing to do."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self, tenant: str, turn: _Turn, ended: asyncio.Future[Result]) -> None:
        if not ended.cancelled():
            ended.exception()  # whoever waited may be gone: no complaint about an error nobody took
        self._done(tenant, turn)

    def _done(self, tenant: str, turn: _Turn) -> None:
        turn.lock.release()
        self._left(tenant, turn)

    def _left(self, tenant: str, turn: _Turn) -> None:
        turn.users -= 1
        if not turn.users:
            self._turns.pop(tenant, None)
