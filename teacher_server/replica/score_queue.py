"""Which requests share the next forward pass: a policy over ints, without torch, ray or clocks of its own.

In: jobs with tenant, tokens and deadline; out: batches under a token budget, fair between tenants by start-time fair
queueing (Goyal, Vin & Cheng 1996). It never reorders one tenant's jobs of a lane, and cuts a job only as said below.

A clock of tokens runs with the service; a tenant's next job starts when its last one would have ended at the tenant's share,
or now if that is past, and the earliest start is served first. So a newcomer is next, whoever came back pays for what it
had, and shares are exact in tokens. (Deficit round robin gives the same shares, but lets a newcomer wait for what the others
had left of their turn: half a batch more on average.)

Interactive jobs go first, in batches of their own, and are charged like all others: a tenant's may go first while it is at most
a batch ahead of the clock, then they wait until the others have caught up. So marking everything interactive brings a tenant one
batch and no share. Within a tenant the same holds between its two lanes: where both wait, either gets half. While
interactive jobs come, batches of bulk jobs are small, and bulk jobs are cut between their pieces.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from teacher_wire.core.errors import OverloadedError

# Tenants that come when the queue is full still get their share; together they may exceed it by this factor.
_MOST_OVER = 2.0
_RETRY_S = (0.05, 5.0)  # shortest and longest delay that a refusal names
_RATE_MEMORY = 0.8  # of the measured tokens/s, a forward pass: about the last five count
_SPARE_DEADLINES = 64  # of ended jobs, before they are swept
_COMES_S = 10.0  # after the last interactive job, more are expected; a training step is about as long


@dataclass(frozen=True)
class Job:
    """One request in the queue, or the pieces of one that are left or go together.

    Attributes:
        job_id: unique.
        tenant: who asked.
        tokens: what it costs.
        deadline_s: on the caller's clock; infinite if none.
        answer_bytes: that its labels take; of pieces, those of the whole request.
        interactive: goes before bulk jobs.
        pieces: tokens of the parts between which it may be cut; empty if it may not.
        first: number of the first of them in the request.
    """

    job_id: int
    tenant: str
    tokens: int
    deadline_s: float = math.inf
    answer_bytes: int = 0
    interactive: bool = False
    pieces: tuple[int, ...] = ()
    first: int = 0

    def cut(self, room: int) -> tuple[Job, Job | None]:
        """As many pieces as `room` tokens hold, at least one; and the rest, if there is any."""
        if self.tokens <= room or len(self.pieces) < 2:
            return self, None
        ends = list(itertools.accumulate(self.pieces))
        count = max(1, sum(end <= room for end in ends))
        head, rest = self.pieces[:count], self.pieces[count:]
        return (
            replace(self, tokens=ends[count - 1], pieces=head),
            replace(self, tokens=self.tokens - ends[count - 1], pieces=rest, first=self.first + count),
        )


@dataclass
class _Lane:
    """A tenant's jobs of one kind; those taken back stay in `queue` until their turn. `jobs` counts those that wait."""

    queue: deque[Job] = field(default_factory=deque)
    jobs: int = 0


@dataclass
class _Tenant:
    """What waits for one tenant.

    Attributes:
        bulk, interactive: its jobs.
        start: of its next job, on the clock of tokens.
        served: number of its last service; of equal starts the longest unserved goes first.
        tokens: that wait.
        ahead: tokens that its interactive jobs had more than its bulk jobs while these waited.
    """

    bulk: _Lane = field(default_factory=_Lane)
    interactive: _Lane = field(default_factory=_Lane)
    start: float = 0.0
    served: int = -1
    tokens: int = 0
    ahead: float = 0.0

    @property
    def jobs(self) -> int:
        return self.bulk.jobs + self.interactive.jobs

    def lane(self, job: Job) -> _Lane:
        return self.interactive if job.interactive else self.bulk


class Batcher:
    """A queue that hands out batches.

    Args:
        max_tokens: budget of a batch; a job above it gets a batch of its own.
        max_queue_tokens: tokens that may wait; a tenant may fill what the others' shares leave.
        interactive_tokens: budget of a batch of interactive jobs, and of bulk jobs while interactive ones come; by default `max_tokens`.
        max_answer_bytes: budget of a batch in bytes of labels, which are all held at once; as for tokens, a job above it
            gets a batch of its own.
        weights: shares of tenants under contention; `default_weight` for a tenant not listed. Both may change at any time.
    """

    def __init__(
        self,
        max_tokens: int,
        max_queue_tokens: int,
        *,
        interactive_tokens: int | None = None,
        max_answer_bytes: float = math.inf,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.weights: Mapping[str, float] = weights or {}
        self.default_weight = 1.0
        self.tokens_per_s = 0.0  # see `measure`; 0 while unknown
        self._max_tokens = max_tokens
        self._interactive_tokens = min(max_tokens, interactive_tokens or max_tokens)
        self._comes_until_s = -math.inf
        self._max_queue_tokens = max_queue_tokens
        self._max_answer_bytes = max_answer_bytes
        self._tenants: dict[str, _Tenant] = {}
        self._clock = 0.0  # the earliest start when a job was served last
        self._services = itertools.count()
        self._waiting: dict[int, Job] = {}
        self._deadlines: list[tuple[float, int]] = []
        self.queued_tokens = 0

    @property
    def queued_jobs(self) -> int:
        return len(self._waiting)

    def queued_tokens_of(self) -> dict[str, int]:
        """Waiting tokens by tenant."""
        return {name: tenant.tokens for name, tenant in self._tenants.items() if tenant.jobs}

    def queued_interactive(self) -> tuple[int, int]:
        """Waiting tokens and jobs of the interactive lane."""
        tokens = [job.tokens for job in self._waiting.values() if job.interactive]
        return sum(tokens), len(tokens)

    def interactive_comes(self, now_s: float) -> bool:
        """Whether interactive jobs wait or are to be expected, on the clock of `next_batch`."""
        return now_s < self._comes_until_s or any(tenant.interactive.jobs for tenant in self._tenants.values())

    def add(self, job: Job) -> None:
        """Queues a job.

        Raises:
            OverloadedError: the tenant has more waiting than its share of the queue; or too many tenants wait.
        """
        share = self._share(job.tenant)
        limit = self._max_queue_tokens * share
        tenant = self._tenants.get(job.tenant)
        waiting = tenant.tokens if tenant else 0
        if waiting and waiting + job.tokens > limit:
            raise self._full("the tenant's share of the teacher's queue is full", waiting + job.tokens, limit, share)
        if waiting == 0 and self.queued_tokens > self._max_queue_tokens * _MOST_OVER:
            raise self._full(
                "the teacher's queue is full", self.queued_tokens, self._max_queue_tokens * _MOST_OVER, share
            )
        if tenant is None:
            tenant = self._tenants[job.tenant] = _Tenant()
        if not tenant.jobs:
            tenant.start = max(tenant.start, self._clock)
        lane = tenant.lane(job)
        lane.queue.append(job)
        lane.jobs += 1
        tenant.tokens += job.tokens
        self.queued_tokens += job.tokens
        self._waiting[job.job_id] = job
        if job.deadline_s < math.inf:
            heapq.heappush(self._deadlines, (job.deadline_s, job.job_id))

    def _share(self, name: str) -> float:
        """Of the queue and of the forward passes, among the tenants that want any."""
        active = {waiting for waiting, tenant in self._tenants.items() if tenant.jobs} | {name}
        return self._weight(name) / sum(map(self._weight, active))

    def _weight(self, name: str) -> float:
        return self.weights.get(name, self.default_weight)

    def _full(self, message: str, value: int, limit: float, share: float) -> OverloadedError:
        rate = self.tokens_per_s * share
        shortest, longest = _RETRY_S
        delay = min(longest, max(shortest, (value - limit) / rate)) if rate else 1.0
        return OverloadedError(message, field="queue_tokens", value=value, limit=int(limit), retry_after_s=delay)

    def measure(self, tokens: int, took_s: float) -> None:
        """Takes how long a forward pass took, for the delays that refusals name."""
        rate = tokens / max(took_s, 1e-6)
        self.tokens_per_s = _RATE_MEMORY * self.tokens_per_s + (1 - _RATE_MEMORY) * rate if self.tokens_per_s else rate

    def cancel(self, job_id: int) -> None:
        """Takes a job back; no forward pass is spent on it if it still waits."""
        job = self._waiting.pop(job_id, None)
        if job is not None:
            self._count_out(job)
            self._forget_deadlines()

    def _forget_deadlines(self) -> None:
        """Rebuilds the heap once most of it is of jobs that no longer wait."""
        if len(self._deadlines) > 2 * len(self._waiting) + _SPARE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)

    def next_batch(self, now_s: float, *, only_interactive: bool = False) -> tuple[list[Job], list[Job]]:
        """The jobs, or pieces of jobs, of the next forward pass, and the jobs whose deadline has passed (they get none).

        Args:
            now_s: on the clock of the jobs' deadlines.
            only_interactive: no bulk job may begin now.
        """
        expired = self._drop_expired(now_s)
        if any(tenant.interactive.jobs for tenant in self._tenants.values()):
            self._comes_until_s = now_s + _COMES_S
        batch = self._batch(self._next_interactive, self._interactive_tokens, self._max_tokens)
        if not batch and not only_interactive:
            small = self._interactive_tokens if self.interactive_comes(now_s) else None
            batch = self._batch(self._next_tenant, small or self._max_tokens, small)
        self._forget_idle()
        self._forget_deadlines()
        return batch, expired

    def _batch(
        self, choose: Callable[[], tuple[str, _Tenant, _Lane] | None], max_tokens: int, cut_at: int | None
    ) -> list[Job]:
        """Jobs in the order in which they are chosen, under the budget; those above `cut_at` tokens are cut."""
        batch: list[Job] = []
        room, room_bytes = max_tokens, self._max_answer_bytes
        while self._waiting and (chosen := choose()) is not None:
            name, tenant, lane = chosen
            while lane.queue[0].job_id not in self._waiting:
                lane.queue.popleft()
            job, rest = lane.queue[0], None
            if cut_at is not None and job.tokens > room and (not batch or cut_at <= max_tokens):
                job, rest = job.cut(room if batch else cut_at)
            if batch and (job.tokens > room or job.answer_bytes > room_bytes):
                break
            room -= job.tokens
            room_bytes -= job.answer_bytes
            batch.append(job)
            self._serve(name, tenant, lane, job, rest)
        return batch

    def _serve(self, name: str, tenant: _Tenant, lane: _Lane, job: Job, rest: Job | None) -> None:
        """Takes a job or its first pieces out of the queue and charges the tenant."""
        self._clock = self._now()
        tenant.start += job.tokens / self._weight(name)
        tenant.served = next(self._services)
        if rest is None:
            lane.queue.popleft()
            self._count_out(self._waiting.pop(job.job_id))
        else:
            lane.queue[0] = self._waiting[job.job_id] = rest
            tenant.tokens -= job.tokens
            self.queued_tokens -= job.tokens
        if not tenant.bulk.jobs:
            tenant.ahead = 0.0
        else:
            tenant.ahead = max(0.0, tenant.ahead + (job.tokens if job.interactive else -job.tokens))

    def _now(self) -> float:
        """The clock of tokens: the earliest start of those that wait."""
        return max(self._clock, min((tenant.start for tenant in self._tenants.values() if tenant.jobs), default=0.0))

    def _next_tenant(self) -> tuple[str, _Tenant, _Lane] | None:
        """Of all tenants the next, with its bulk jobs if there are any: interactive ones have had their chance."""
        waiting = ((name, tenant) for name, tenant in self._tenants.items() if tenant.jobs)
        name, tenant = min(waiting, key=lambda item: (item[1].start, item[1].served))
        return name, tenant, tenant.bulk if tenant.bulk.jobs else tenant.interactive

    def _next_interactive(self) -> tuple[str, _Tenant, _Lane] | None:
        """Of the tenants whose interactive jobs may go first the next, or None."""
        now = self._now()
        waiting = [
            (name, tenant)
            for name, tenant in self._tenants.items()
            if tenant.interactive.jobs
            and tenant.ahead <= self._max_tokens
            and (tenant.start - now) * self._weight(name) <= self._max_tokens
        ]
        if not waiting:
            return None
        name, tenant = min(waiting, key=lambda item: (item[1].start, item[1].served))
        return name, tenant, tenant.interactive

    def _forget_idle(self) -> None:
        """Drops tenants that want nothing and owe nothing."""
        idle = [name for name, tenant in self._tenants.items() if not tenant.jobs and tenant.start <= self._clock]
        for name in idle:
            del self._tenants[name]

    def _drop_expired(self, now_s: float) -> list[Job]:
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            job = self._waiting.pop(heapq.heappop(self._deadlines)[1], None)
            if job is not None:
                self._count_out(job)
                expired.append(job)
        return expired

    def _count_out(self, job: Job) -> None:
        tenant = self._tenants[job.tenant]
        lane = tenant.lane(job)
        tenant.tokens -= job.tokens
        lane.jobs -= 1
        if not lane.jobs:
            lane.queue.clear()  # of jobs taken back
        self.queued_tokens -= job.tokens
