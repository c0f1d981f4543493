"""Who holds how much of an edge: calls, requests and bytes, counted per tenant and in all, against `StreamLimits`.

In: what is about to be held; out: nothing, an OverloadedError, or a wait until there is room. It never looks at a message.
A tenant that holds nothing leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from teacher_wire.core.errors import OverloadedError
from teacher_wire.transport.stream_limits import StreamLimits
from teacher_wire.transport.turns import Turns

_TAKEN_MEMORY_S = 2.0  # time constant of what a tenant took lately
_RETRY_S = 1.0
_RECEIVING = 8  # messages of Generate and Artifact that come at a time, of one tenant


@dataclass
class Account:
    """What one tenant holds.

    Attributes:
        calls, artifacts: open.
        requests, request_bytes: unanswered.
        reply_bytes: reserved or computed, and not yet taken by the peer.
        reading: held by the stream whose request is being read.
        receiving: held by a call of Generate or Artifact while its one message comes.
    """

    tenant: str
    calls: int = 0
    artifacts: int = 0
    requests: int = 0
    request_bytes: int = 0
    reply_bytes: int = 0
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    receiving: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_RECEIVING))
    waiting: Turns = field(default_factory=Turns)
    _taken: float = 0.0
    _taken_s: float = 0.0

    def took(self, size: int, now_s: float) -> None:
        """Counts bytes that the peer has taken."""
        self._taken = self.taken_lately(now_s) + size
        self._taken_s = now_s

    def taken_lately(self, now_s: float) -> float:
        """Bytes taken, each counted less with its age."""
        return self._taken * math.exp((self._taken_s - now_s) / _TAKEN_MEMORY_S)


class Accounts:
    """The accounts of all tenants at one edge.

    Args:
        limits: what may be held.
        clock: seconds, monotonic.
    """

    def __init__(self, limits: StreamLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._tenants: dict[str, Account] = {}
        self.total = Account("")

    def enter(self, tenant: str) -> Account:
        """Opens a call.

        Raises:
            OverloadedError: the tenant or the edge has as many as it may.
        """
        account = self._tenants.get(tenant) or Account(tenant)
        limits = self._limits
        _refuse_above("open calls of this tenant", "max_tenant_calls", account.calls + 1, limits.max_tenant_calls)
        _refuse_above("open calls of this server", "max_calls", self.total.calls + 1, limits.max_calls)
        self._tenants[tenant] = account
        account.calls += 1
        self.total.calls += 1
        return account

    def leave(self, account: Account) -> None:
        """Closes a call."""
        account.calls -= 1
        self.total.calls -= 1
        self._forget(account)

    def _forget(self, account: Account) -> None:
        """Drops the account of a tenant that holds nothing any more."""
        if not (account.calls or account.requests or account.reply_bytes):
            self._tenants.pop(account.tenant, None)

    def open_artifact(self, account: Account) -> None:
        """Counts a call of Artifact; raises OverloadedError if there are as many as may be."""
        limits = self._limits
        tenant, whole = account.artifacts + 1, self.total.artifacts + 1
        _refuse_above("open Artifact calls of this tenant", "max_tenant_artifacts", tenant, limits.max_tenant_artifacts)
        _refuse_above("open Artifact calls of this server", "max_artifacts", whole, limits.max_artifacts)
        account.artifacts += 1
        self.total.artifacts += 1

    def close_artifact(self, account: Account) -> None:
        account.artifacts -= 1
        self.total.artifacts -= 1

    def open_request(self, account: Account, size: int) -> None:
        """Counts an unanswered request of `size` bytes.

        Raises:
            OverloadedError: the tenant or the edge holds as much as it may. A tenant's only request passes.
        """
        limits = self._limits
        requests = account.requests + 1
        _refuse_above("open requests of this tenant", "max_tenant_requests", requests, limits.max_tenant_requests)
        if account.requests:
            _refuse_above(
                "bytes of unanswered requests of this tenant",
                "max_tenant_request_held_bytes",
                account.request_bytes + size,
                limits.max_tenant_request_held_bytes,
            )
        if self.total.requests:
            _refuse_above(
                "bytes of unanswered requests of this server",
                "max_request_held_bytes",
                self.total.request_bytes + size,
                limits.max_request_held_bytes,
            )
        for counts in (account, self.total):
            counts.requests += 1
            counts.request_bytes += size

    def close_request(self, account: Account, size: int) -> None:
        """Ends what `open_request` counted."""
        for counts in (account, self.total):
            counts.requests -= 1
            counts.request_bytes -= size
        self._forget(account)

    async def hold_reply(self, account: Account, size: int, *, first: bool = False) -> None:
        """Waits until the tenant and the edge may hold `size` more reply bytes, and counts them; `first` before what else of the tenant waits."""
        turn = account.waiting.join(size, first=first)
        self._let_in(account)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.drop_reply(account, size)
            else:
                self._wake()  # whoever stood behind us
            raise

    def reply_taken(self, account: Account, size: int) -> None:
        """The peer has taken `size` reply bytes."""
        account.took(size, self._clock())
        self.drop_reply(account, size)

    def drop_reply(self, account: Account, size: int) -> None:
        """`size` reply bytes are no longer held, although nobody took them."""
        for counts in (account, self.total):
            counts.reply_bytes -= size
        self._forget(account)
        self._wake()

    def _hold(self, account: Account, size: int) -> None:
        for counts in (account, self.total):
            counts.reply_bytes += size

    def _fits(self, account: Account, size: int) -> bool:
        limits = self._limits
        allowed = limits.unproven_reply_held_bytes + account.taken_lately(self._clock())
        allowed = min(limits.max_tenant_reply_held_bytes, allowed)
        if account.reply_bytes and account.reply_bytes + size > allowed:
            return False
        return not self.total.reply_bytes or self.total.reply_bytes + size <= limits.max_reply_held_bytes

    def _wake(self) -> None:
        """Lets in whoever fits now: of each tenant the first that waits, in turn."""
        woken = True
        while woken:
            woken = False
            for account in list(self._tenants.values()):
                woken = self._let_in(account) or woken

    def _let_in(self, account: Account) -> bool:
        """Lets the first that waits in if it fits; whether it did."""
        size = account.waiting.next_size
        if size is None or not self._fits(account, size):
            return False
        self._hold(account, size)
        account.waiting.let_in()
        return True


def _refuse_above(what: str, field: str, value: int, limit: int) -> None:
    if value > limit:
        raise OverloadedError(f"too many {what}", field=field, value=value, limit=limit, retry_after_s=_RETRY_S)
