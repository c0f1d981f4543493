"""Which sequences are written next: a policy over ints, without torch, ray or clocks of its own.

In: calls of tenants; out: sequences that begin, within the rows and the KV cache of a replica. Tenants share by weight, by
start-time fair queueing over tokens as in `batcher`: a sequence is charged prompt and `max_new_tokens` when it begins, and what
it did not write is given back when it ends. Calls wait as calls: their sequences are made when they begin.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from teacher_server.config.server import GenerationConfig
from teacher_wire.core.errors import OverloadedError
from teacher_wire.generate.messages import SamplingSpec

_LEAST_BUCKET = 1024  # tokens; shorter sequences share one cache
_MOST_OVER = 2.0  # as in `batcher`: how far newcomers may fill the queue beyond its limit
_RESERVED = 8  # one of so many rows and slots is kept for tenants that come with nothing running


@dataclass(frozen=True, eq=False)
class Sequence:
    """One sample to be written.

    Attributes:
        number: unique in this process; rises in the order in which sequences were made.
        call: number of the call it belongs to.
        prompt, index: which sample of that call.
        prompt_ids: int32 [T].
    """

    number: int
    call: int
    prompt: int
    index: int
    prompt_ids: np.ndarray
    spec: SamplingSpec

    @property
    def tokens(self) -> int:
        """What it may come to hold."""
        return len(self.prompt_ids) + self.spec.max_new_tokens

    @property
    def bucket(self) -> int:
        """Sequences of one bucket share a padded cache: their lengths differ by less than 2x, or are below 1024."""
        return max(_LEAST_BUCKET, 1 << (self.tokens - 1).bit_length())


class Layout:
    """Slots of KV cache that sequences take, as they are laid out.

    Args:
        paged: every sequence takes its own tokens (vLLM's blocks); else all sequences of a bucket are padded to the
            longest among them (`backends.stepper`).
    """

    def __init__(self, sequences: Iterable[Sequence], *, paged: bool) -> None:
        self._paged = paged
        self._buckets: dict[int, tuple[int, int]] = {}  # rows, tokens of the longest
        self.slots = 0
        for sequence in sequences:
            self.add(sequence)

    def added(self, sequence: Sequence) -> int:
        """Slots in all if `sequence` joined."""
        if self._paged:
            return self.slots + sequence.tokens
        rows, longest = self._buckets.get(sequence.bucket, (0, 0))
        return self.slots - rows * longest + (rows + 1) * max(longest, sequence.tokens)

    def add(self, sequence: Sequence) -> None:
        self.slots = self.added(sequence)
        rows, longest = self._buckets.get(sequence.bucket, (0, 0))
        self._buckets[sequence.bucket] = (rows + 1, max(longest, sequence.tokens))


@dataclass(eq=False)
class _Waiting:
    """What of a call has not begun.

    Attributes:
        rest: makes its sequences, one by one.
        count, tokens: of all of them.
    """

    call: int
    rest: Iterator[Sequence]
    count: int
    tokens: int
    made: Sequence | None = None

    def first(self) -> Sequence:
        self.made = self.made or next(self.rest)
        return self.made

    def take(self) -> Sequence:
        sequence = self.first()
        self.made = None
        self.count -= 1
        self.tokens -= sequence.tokens
        return sequence


@dataclass(eq=False)
class _Tenant:
    """What waits and runs for one tenant; `start` and `served` as in `batcher`."""

    calls: deque[_Waiting] = field(default_factory=deque)
    start: float = 0.0
    served: int = -1
    tokens: int = 0
    running: int = 0


class SequenceQueue:
    """Which sequences run.

    Args:
        limits: of this replica.
        exclusive: only sequences of one call run together (deterministic serving).
        paged: see `Layout`.

    Attributes:
        weights: shares of tenants under contention; `default_weight` for a tenant not listed. Both may change at any time.
        running: sequences under way, by number.
        waiting, waiting_tokens: sequences that have not begun, and what they may come to hold.
    """

    def __init__(self, limits: GenerationConfig, *, exclusive: bool = False, paged: bool = False) -> None:
        self._limits = limits
        self._exclusive = exclusive
        self._paged = paged
        self.weights: Mapping[str, float] = {}
        self.default_weight = 1.0
        self._tenants: dict[str, _Tenant] = {}
        self._owner: dict[int, str] = {}  # call -> tenant, until it is dropped
        self._clock = 0.0
        self._services = itertools.count()
        self._first_tenant: str | None = None
        self._shared = False  # a second tenant has asked since the start
        self._rows: float = limits.max_running  # may run now; fewer for a while after a failed step
        self._slots: float = limits.max_cache_tokens
        self._again: deque[Sequence] = deque()  # that began before a failed step
        self._suspected: set[int] = set()  # numbers of what the last failed step held and has not ended since
        self._by_steps = False  # each step that succeeds lets more in
        self.running: dict[int, Sequence] = {}
        self.waiting = 0
        self.waiting_tokens = 0

    # ------------------------------------------------------------------ calls

    def add(self, tenant: str, call: int, sequences: Iterable[Sequence], count: int, tokens: int) -> None:
        """Queues all sequences of a call, or none.

        Args:
            call: its number.
            sequences: made one by one as they begin.
            count, tokens: of all of them.

        Raises:
            OverloadedError: the tenant has more waiting than its share of the queue; or too many tenants wait.
        """
        entry = self._tenants.get(tenant)
        waiting = entry.tokens if entry else 0
        limit = self._limits.max_queue_tokens * self._share(tenant)
        most = self._limits.max_queue_tokens * _MOST_OVER
        if waiting and waiting + tokens > limit:
            raise self._full("the tenant's share of the teacher's queue is full", waiting + tokens, limit)
        if not waiting and self.waiting_tokens and self.waiting_tokens + tokens > most:
            raise self._full("the teacher's queue is full", self.waiting_tokens + tokens, most)
        if entry is None:
            entry = self._tenants[tenant] = _Tenant()
        if not entry.calls:
            entry.start = max(entry.start, self._clock)
        if self._first_tenant is None:
            self._first_tenant = tenant
        self._shared = self._shared or tenant != self._first_tenant
        entry.calls.append(_Waiting(call, iter(sequences), count, tokens))
        self._owner[call] = tenant
        self._count(entry, count, tokens)

    def _full(self, message: str, value: int, limit: float) -> OverloadedError:
        return OverloadedError(
            message, field="generation.max_queue_tokens", value=value, limit=int(limit), retry_after_s=1.0
        )

    def _share(self, name: str) -> float:
        active = {waiting for waiting, tenant in self._tenants.items() if tenant.calls} | {name}
        return self._weight(name) / sum(map(self._weight, active))

    def _weight(self, name: str) -> float:
        return self.weights.get(name, self.default_weight)

    def _count(self, tenant: _Tenant, count: int, tokens: int) -> None:
        tenant.tokens += tokens
        self.waiting += count
        self.waiting_tokens += tokens

    def drop(self, call: int) -> list[int]:
        """Takes a call back; the numbers of its sequences that run."""
        tenant = self._tenants.get(self._owner.pop(call, ""))
        if tenant is None:  # all of it has ended
            return []
        for waiting in [waiting for waiting in tenant.calls if waiting.call == call]:
            tenant.calls.remove(waiting)
            self._count(tenant, -waiting.count, -waiting.tokens)
        leaving = [number for number, sequence in self.running.items() if sequence.call == call]
        for number in leaving:
            del self.running[number]
        again = len(self._again)
        self._suspected.difference_update(leaving, (other.number for other in self._again if other.call == call))
        self._again = deque(sequence for sequence in self._again if sequence.call != call)
        tenant.running -= len(leaving) + again - len(self._again)
        self._widen()
        self._forget_idle()
        return leaving

    @property
    def begin_again(self) -> int:
        """Sequences that had begun before a failed step and wait to begin again."""
        return len(self._again)

    def queued_tokens_of(self) -> dict[str, int]:
        """Waiting tokens by tenant."""
        return {name: tenant.tokens for name, tenant in self._tenants.items() if tenant.calls}

    # -------------------------------------------------------------- sequences

    def admit(self) -> list[Sequence]:
        """Those that begin now. One larger than the whole cache runs alone.

        A tenant's turn waits until its next sequence fits, so that small ones of others do not overtake it for ever; only
        what is reserved for newcomers is passed over.
        """
        joining: list[Sequence] = []
        layout = Layout(self.running.values(), paged=self._paged)
        while (sequence := self._next(layout)) is not None:
            layout.add(sequence)
            self.running[sequence.number] = sequence
            joining.append(sequence)
        return joining

    def _next(self, layout: Layout) -> Sequence | None:
        """The sequence that begins next, taken from where it waited; None if all have to wait."""
        if len(self.running) >= int(self._rows):
            return None
        if self._again:  # in their order, and before anything new: they were charged when they first began
            return self._again.popleft() if self._fits(self._again[0], layout) else None
        waiting = ((name, tenant) for name, tenant in self._tenants.items() if tenant.calls)
        for name, tenant in sorted(waiting, key=lambda item: (item[1].start, item[1].served)):
            first = tenant.calls[0].first()
            if not self._fits(first, layout):
                return None
            newcomer = not tenant.running and tenant.start <= self._clock  # who is behind its share waits its turn
            if self.running and self._shared and not newcomer and not self._fits_beside_reserve(first, layout):
                continue
            return self._begin(name, tenant)
        return None

    def _fits(self, sequence: Sequence, layout: Layout) -> bool:
        if not self.running:
            return True
        if self._exclusive and any(other.call != sequence.call for other in self.running.values()):
            return False
        return layout.added(sequence) <= self._slots

    def _fits_beside_reserve(self, sequence: Sequence, layout: Layout) -> bool:
        rows = int(self._rows) // _RESERVED
        if rows == 0:
            return True  # too few for any to be kept
        slots = self._slots / _RESERVED
        return len(self.running) < int(self._rows) - rows and layout.added(sequence) <= self._slots - slots

    def _begin(self, name: str, tenant: _Tenant) -> Sequence:
        waiting = tenant.calls[0]
        sequence = waiting.take()
        self._count(tenant, -1, -sequence.tokens)
        if not waiting.count:
            tenant.calls.popleft()
        self._clock = max(self._clock, tenant.start)
        tenant.start += sequence.tokens / self._weight(name)
        tenant.served = next(self._services)
        tenant.running += 1
        return sequence

    def end(self, number: int, written: int = 0) -> Sequence | None:
        """A sequence has ended with that many tokens: what it did not use is given back to its tenant.

        None if it was taken back meanwhile.
        """
        sequence = self.running.pop(number, None)
        if sequence is None:
            return None
        name = self._owner[sequence.call]
        tenant = self._tenants[name]
        tenant.running -= 1
        tenant.start -= max(0, sequence.spec.max_new_tokens - written) / self._weight(name)
        self._suspected.discard(number)
        self._widen()
        self._slots = min(self._limits.max_cache_tokens, 1.01 * self._slots)
        self._forget_idle()
        return sequence

    # --------------------------------------------------------------- failures

    def stepped(self) -> None:
        """A step has succeeded. After one that failed as sequences joined, the others are let in again at once."""
        if self._by_steps:
            self._rows = min(self._limits.max_running, 2 * self._rows)

    def _widen(self) -> None:
        """All rows may be used again once everything that a failed step held has ended."""
        if not self._suspected:
            self._rows, self._by_steps = self._limits.max_running, False

    def narrow(self, joining: list[Sequence], *, memory: bool) -> None:
        """After a failed step: all that ran begins again, half as many at a time and, for want of memory, in half the cache.

        Those that had just joined go first. Where nothing was under suspicion, they are held to be the cause: they begin
        alone, and each step that succeeds lets twice as many in. If that fails too, no more than half of what failed
        together runs at a time until all of it has ended. Halved again and again, a step that fails holds one sequence in the
        end, and that one is to blame: so `n` sequences take log2(n) + 2 failed steps at most, whichever of its tokens a
        sequence fails at.
        """
        if not self.running:  # all of it has been taken back meanwhile
            return
        just = {sequence.number for sequence in joining}
        held = sorted(self.running.values(), key=lambda sequence: (sequence.number not in just, sequence.number))
        self._by_steps = not memory and not self._suspected and 0 < len(just & self.running.keys()) < len(held)
        self._suspected = set(self.running)
        if memory:
            self._slots = Layout(held, paged=self._paged).slots / 2
        self._rows = 1 if self._by_steps else max(1.0, len(held) / 2)
        self.running.clear()
        self._again.extendleft(reversed(held))

    def _forget_idle(self) -> None:
        """Drops tenants that want nothing and owe nothing; when nobody wants anything, all debts are void."""
        if not any(tenant.calls or tenant.running for tenant in self._tenants.values()):
            self._tenants.clear()
            return
        idle = [
            name
            for name, tenant in self._tenants.items()
            if not tenant.calls and not tenant.running and tenant.start <= self._clock
        ]
        for name in idle:
            del self._tenants[name]
