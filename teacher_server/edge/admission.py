"""What each tenant may take: tokens per second, tokens in flight, bytes per second. A policy over numbers and a given clock.

In: who wants how much; out: nothing, or an OverloadedError that says when to come back. Of several edges each grants its
equal part, so a quota over edges is kept in all but reached only by a tenant that uses all of them.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from teacher_server.config.server import DEFAULT_TENANT, TenantConfig
from teacher_wire.core.errors import OverloadedError

FORGET_S = 600.0  # after which nothing is kept of a tenant that is gone
BURST_S = 0.5  # what a bucket holds: tokens of this time
_RETRY_S = (0.02, 30.0)
_INFLIGHT_RETRY_S = 0.5


@dataclass
class Bucket:
    """A token bucket that may be overdrawn by one request: then nothing passes until it is level again.

    Attributes:
        rate: refilled a second.
        level: what is in it; at most `rate * BURST_S`.
        filled_s: when it was last refilled.
    """

    rate: float
    level: float
    filled_s: float

    @classmethod
    def full(cls, rate: float, now_s: float) -> Bucket:
        return cls(rate, rate * BURST_S, now_s)

    def wait_s(self, now_s: float) -> float:
        """Seconds until something may pass."""
        self.level = min(self.rate * BURST_S, self.level + (now_s - self.filled_s) * self.rate)
        self.filled_s = now_s
        return 0.0 if self.level > 0 else -self.level / self.rate

    def change_rate(self, rate: float, now_s: float) -> None:
        """Another rate from now on: what is left, or owed, stays, so that no number of changes gives anything away."""
        self.wait_s(now_s)
        self.rate = rate
        self.level = min(self.level, rate * BURST_S)

    def take(self, amount: float) -> None:
        self.level -= amount


@dataclass
class Written:
    """What a call of Generate has computed so far: tokens of its prompts and of whole samples; `whole` at its end."""

    tokens: int = 0
    whole: bool = False


class Admission:
    """The quotas of all tenants at one edge.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: Mapping[str, TenantConfig] = {}
        self._edges = 1
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._inflight: Counter[str] = Counter()
        self._computed: Counter[str] = Counter()
        self._sent_bytes: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._seen_s: dict[str, float] = {}

    def configure(self, tenants: Mapping[str, TenantConfig], edges: int = 1) -> None:
        """Replaces all quotas. Buckets keep their levels: neither another rate nor another number of edges refills one."""
        self._tenants, self._edges = dict(tenants), max(1, edges)
        self._forget_idle()

    def _forget_idle(self) -> None:
        """Drops what is kept of tenants without an entry of their own that have asked for nothing for a while."""
        now_s = self._clock()
        for tenant in [name for name, seen_s in self._seen_s.items() if now_s - seen_s > FORGET_S]:
            if self._inflight[tenant] or tenant in self._tenants:
                continue
            del self._seen_s[tenant]
            for counts in (self._inflight, self._computed, self._sent_bytes, self._refused):
                counts.pop(tenant, None)
            for key in [key for key in self._buckets if key[0] == tenant]:
                del self._buckets[key]  # full again by now

    def of(self, tenant: str) -> TenantConfig:
        """The entry of a tenant, or the default one."""
        return self._tenants.get(tenant) or self._tenants.get(DEFAULT_TENANT) or TenantConfig()

    @contextlib.contextmanager
    def computing(self, tenant: str, tokens: int) -> Iterator[None]:
        """Holds `tokens` in flight for the tenant while the block runs.

        Raises:
            OverloadedError: a quota is reached. A request above a whole quota passes alone.
        """
        with self._in_flight(tenant, tokens):
            yield
            self._computed[tenant] += tokens

    @contextlib.contextmanager
    def writing(self, tenant: str, most: int) -> Iterator[Written]:
        """Charges a call of Generate for all that it may compute, and settles at its end for what it did.

        A call that ends early gets back what was not written, but for what its tenant's rate has given meanwhile: what
        was computed of unfinished samples is not known here.

        Args:
            tenant: who pays.
            most: prompt and new tokens of all its samples.

        Raises:
            OverloadedError: a quota is reached. A call above a whole quota passes alone.
        """
        written, started_s = Written(), self._clock()
        with self._in_flight(tenant, most):
            try:
                yield written
            finally:
                self._computed[tenant] += written.tokens
                bucket = self._buckets.get((tenant, "tokens_per_s"))
                if bucket is not None:
                    passed_s = 0.0 if written.whole else self._clock() - started_s
                    bucket.take(-max(0.0, most - written.tokens - passed_s * bucket.rate))

    @contextlib.contextmanager
    def _in_flight(self, tenant: str, tokens: int) -> Iterator[None]:
        limit = self.of(tenant).inflight_tokens
        if limit is not None and self._inflight[tenant] and self._inflight[tenant] + tokens > limit / self._edges:
            raise self._refusal(
                tenant, "inflight_tokens", self._inflight[tenant] + tokens, limit / self._edges, _INFLIGHT_RETRY_S
            )
        self._take(tenant, "tokens_per_s", tokens)
        self._inflight[tenant] += tokens
        try:
            yield
        finally:
            self._inflight[tenant] -= tokens
            if not self._inflight[tenant]:
                del self._inflight[tenant]

    @contextlib.contextmanager
    def sending(self, tenant: str, size_bytes: int) -> Iterator[None]:
        """Charges the tenant for a reply that the block makes. One that is not made is given back, and not counted as sent.

        Raises:
            OverloadedError: its bytes per second are used up.
        """
        self._take(tenant, "bytes_per_s", size_bytes)
        try:
            yield
        except BaseException:
            bucket = self._buckets.get((tenant, "bytes_per_s"))
            if bucket is not None:
                bucket.take(-size_bytes)
            raise
        self._sent_bytes[tenant] += size_bytes

    def send(self, tenant: str, size_bytes: int) -> None:
        """Charges the tenant for bytes that are there, and counts them as sent.

        Raises:
            OverloadedError: its bytes per second are used up.
        """
        self._take(tenant, "bytes_per_s", size_bytes)
        self._sent_bytes[tenant] += size_bytes

    def _take(self, tenant: str, quota: str, amount: float) -> None:
        self._seen_s[tenant] = self._clock()
        limit = getattr(self.of(tenant), quota)
        key = (tenant, quota)
        if limit is None:
            self._buckets.pop(key, None)
            return
        rate, now_s = limit / self._edges, self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket.full(rate, now_s)
        elif bucket.rate != rate:
            bucket.change_rate(rate, now_s)
        wait_s = bucket.wait_s(now_s)
        if wait_s > 0:
            raise self._refusal(tenant, quota, amount, rate, wait_s)
        bucket.take(amount)

    def _refusal(self, tenant: str, quota: str, value: float, limit: float, wait_s: float) -> OverloadedError:
        self._refused[tenant] += 1
        shortest, longest = _RETRY_S
        return OverloadedError(
            f"tenant {tenant or 'without a name'} is over its quota",
            field=f"tenants.{tenant or DEFAULT_TENANT}.{quota}", value=f"{value:g}", limit=f"{limit:g}",
            retry_after_s=min(longest, max(shortest, wait_s)),
        )  # fmt: skip

    def counters(self) -> dict[str, dict[str, Any]]:
        """By tenant: weight, tokens in flight, tokens computed and bytes sent since the start, refusals."""
        names = {*self._inflight, *self._computed, *self._sent_bytes, *self._refused}
        return {
            name: {
                "weight": self.of(name).weight,
                "inflight_tokens": self._inflight[name],
                "computed_tokens": self._computed[name],
                "sent_bytes": self._sent_bytes[name],
                "refused": self._refused[name],
            }
            for name in names
        }
