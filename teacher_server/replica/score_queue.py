"""Which requests share the next forward pass: a policy over ints, without torch, ray or clocks of its own.

In: jobs with tenant, tokens and deadline; out: batches under a token budget, fair between tenants by start-time fair
queueing (Goyal, Vin & Cheng 1996). It never splits a job and never reorders one tenant's jobs.

A clock of tokens runs with the service; a tenant's next job starts when its last one would have ended at the tenant's share,
or now if that is past, and the earliest start is served first. So a newcomer is next, whoever came back pays for what it
had, and shares are exact in tokens. (Deficit round robin gives the same shares, but lets a newcomer wait for what the others
had left of their turn: half a batch more on average.)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from teacher_wire.core.errors import OverloadedError

# Tenants that come when the queue is full still get their share; together they may exceed it by this factor.
_MOST_OVER = 2.0
_RETRY_S = (0.05, 5.0)  # shortest and longest delay that a refusal names


_SPARE_DEADLINES = 64  # of ended jobs, before they are swept


@dataclass(frozen=True)
class Job:
    """One request in the queue.

    Attributes:
        job_id: unique.
        tenant: who asked.
        tokens: what it costs.
        deadline_s: on the caller's clock; infinite if none.
        answer_bytes: that its labels take.
    """

    job_id: int
    tenant: str
    tokens: int
    deadline_s: float = math.inf
    answer_bytes: int = 0


@dataclass
class _Tenant:
    """What waits for one tenant.

    Attributes:
        queue: its jobs; those taken back stay in it until their turn.
        start: of its next job, on the clock of tokens.
        served: number of its last service; of equal starts the longest unserved goes first.
        tokens, jobs: that wait.
    """

    queue: deque[Job] = field(default_factory=deque)
    start: float = 0.0
    served: int = -1
    tokens: int = 0
    jobs: int = 0


_SPARE_DEADLINES = 64  # of ended jobs, before they are swept


class Batcher:
    """A queue that hands out batches.

    Args:
        max_tokens: budget of a batch; a job above it gets a batch of its own.
        max_queue_tokens: tokens that may wait; a tenant may fill what the others' shares leave.
        max_answer_bytes: budget of a batch in bytes of labels, which are all held at once; as for tokens, a job above it
            gets a batch of its own.
        weights: shares of tenants under contention; `default_weight` for a tenant not listed. Both may change at any time.
    """

    def __init__(
        self,
        max_tokens: int,
        max_queue_tokens: int,
        *,
        max_answer_bytes: float = math.inf,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.weights: Mapping[str, float] = weights or {}
        self.default_weight = 1.0
        self.tokens_per_s = 0.0  # as measured by whoever runs the batches; 0 while unknown
        self._max_tokens = max_tokens
        self._max_queue_tokens = max_queue_tokens
        self._max_answer_bytes = max_answer_bytes
        self._tenants: dict[str, _Tenant] = {}
        self._clock = 0.0  # start of the job served last
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
        tenant.queue.append(job)
        tenant.tokens += job.tokens
        tenant.jobs += 1
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

    def cancel(self, job_id: int) -> None:
        """Takes a job back; no forward pass is spent on it if it still waits."""
        job = self._waiting.pop(job_id, None)
        if job is not None:
            self._count_out(job)
            self._forget_deadlines()

    def _forget_deadlines(self) -> None:
        """Rebuilds the heap once most of it is of jobs that no longer wait."""
        if len(self._deadlines) > 2 * len(self._waiting) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)

    def next_batch(self, now_s: float) -> tuple[list[Job], list[Job]]:
        """The jobs of the next forward pass, and those whose deadline has passed (they get none).

        Args:
            now_s: on the clock of the jobs' deadlines.
        """
        expired = self._drop_expired(now_s)
        batch: list[Job] = []
        room, room_bytes = self._max_tokens, self._max_answer_bytes
        while self._waiting:
            name, tenant = self._next_tenant()
            while tenant.queue[0].job_id not in self._waiting:
                tenant.queue.popleft()
            job = tenant.queue[0]
            if batch and (job.tokens > room or job.answer_bytes > room_bytes):
                break
            tenant.queue.popleft()
            room -= job.tokens
            room_bytes -= job.answer_bytes
            batch.append(self._waiting.pop(job.job_id))
            self._count_out(job)
            self._clock = tenant.start
            tenant.start += job.tokens / self._weight(name)
            tenant.served = next(self._services)
        self._forget_idle()
        self._forget_deadlines()
        return batch, expired

    def _next_tenant(self) -> tuple[str, _Tenant]:
        waiting = ((name, tenant) for name, tenant in self._tenants.items() if tenant.jobs)
        return min(waiting, key=lambda item: (item[1].start, item[1].served))

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
        if len(self._deadlines) > 2 * len(self._waiting) + _SPARE_DEADLINES:  # jobs long ended are not kept for theirs
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)
        tenant = self._tenants[job.tenant]
        tenant.tokens -= job.tokens
        tenant.jobs -= 1
        if not tenant.jobs:
            tenant.queue.clear()  # of jobs taken back
        self.queued_tokens -= job.tokens
