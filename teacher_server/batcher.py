"""Which requests share the next forward pass: a policy over ints, without torch, ray or clocks of its own.

In: jobs with tenant, tokens and deadline; out: batches under a token budget, fair between tenants by
deficit round robin (Shreedhar & Varghese 1995). It never splits a job and never reorders one tenant's jobs.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from teacher_wire.errors import OverloadedError


@dataclass(frozen=True)
class Job:
    """One request in the queue.

    Attributes:
        job_id: unique.
        tenant: who asked.
        tokens: what it costs.
        deadline_s: on the caller's clock; infinite if none.
    """

    job_id: int
    tenant: str
    tokens: int
    deadline_s: float = math.inf


@dataclass
class _Tenant:
    queue: deque[Job] = field(default_factory=deque)
    deficit: float = 0.0


class Batcher:
    """A queue that hands out batches.

    Args:
        max_tokens: budget of a batch; a job above it gets a batch of its own.
        max_queue_tokens: tokens that may wait; beyond, `add` refuses.
        exclusive: a batch is exactly one job (deterministic serving).
        weights: shares of tenants under contention; 1 for a tenant not listed.
    """

    def __init__(
        self,
        max_tokens: int,
        max_queue_tokens: int,
        *,
        exclusive: bool = False,
        weights: dict[str, float] | None = None,
    ) -> None:
        self._max_tokens = max_tokens
        self._max_queue_tokens = max_queue_tokens
        self._exclusive = exclusive
        self._weights = weights or {}
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # in the order of their turns
        self.queued_tokens = 0
        self.queued_jobs = 0

    def add(self, job: Job) -> None:
        """Queues a job.

        Raises:
            OverloadedError: the queue is full.
        """
        if self.queued_tokens and self.queued_tokens + job.tokens > self._max_queue_tokens:
            raise OverloadedError(
                "the teacher's queue is full",
                field="queue_tokens", value=self.queued_tokens + job.tokens, limit=self._max_queue_tokens, retry_after_s=1.0,
            )  # fmt: skip
        self._tenants.setdefault(job.tenant, _Tenant()).queue.append(job)
        self.queued_tokens += job.tokens
        self.queued_jobs += 1

    def cancel(self, job_id: int) -> None:
        """Takes a job back; no forward pass is spent on it if it still waits."""
        for tenant in self._tenants.values():
            for job in tenant.queue:
                if job.job_id == job_id:
                    tenant.queue.remove(job)
                    self._count_out(job)
                    return

    def next_batch(self, now_s: float) -> tuple[list[Job], list[Job]]:
        """The jobs of the next forward pass, and those whose deadline has passed (they get none).

        Args:
            now_s: on the clock of the jobs' deadlines.
        """
        expired = self._drop_expired(now_s)
        batch: list[Job] = []
        room = self._max_tokens
        while self._tenants:
            name, tenant = next(iter(self._tenants.items()))
            if not tenant.queue:
                del self._tenants[name]  # an idle tenant saves up nothing
                continue
            job = tenant.queue[0]
            if batch and (self._exclusive or job.tokens > room):
                break
            if tenant.deficit < job.tokens and len(self._tenants) > 1:
                tenant.deficit += self._quantum(name)
                self._tenants.move_to_end(name)
                continue
            tenant.queue.popleft()
            tenant.deficit = max(0.0, tenant.deficit - job.tokens)
            room -= job.tokens
            batch.append(job)
            self._count_out(job)
        return batch, expired

    def _quantum(self, tenant: str) -> float:
        """Tokens a tenant gains a turn: small against the budget, so that every batch is shared."""
        return max(1.0, self._max_tokens / 8) * self._weights.get(tenant, 1.0)

    def _drop_expired(self, now_s: float) -> list[Job]:
        expired = [job for tenant in self._tenants.values() for job in tenant.queue if job.deadline_s <= now_s]
        for job in expired:
            self._tenants[job.tenant].queue.remove(job)
            self._count_out(job)
        return expired

    def _count_out(self, job: Job) -> None:
        self.queued_tokens -= job.tokens
        self.queued_jobs -= 1
