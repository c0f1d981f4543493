"""The cluster state: heartbeats of replicas and edges, and what the server is to become, in one plain object without Ray.

In: reports of replicas and edges, and what `teacher-server up` wants now; out: `News` for who reported, and the server's
status. It decides nothing: when it cannot be reached everybody goes on with the last news.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from teacher_server.errors import TakenOverError
from teacher_server.telemetry.records import EdgeReport, Held, News, Plan, ReplicaReport, Source
from teacher_server.telemetry.summary import add_up, summarise
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.status import ServerStatus

FRESH_S = 5.0  # a report older than this is of somebody who is gone
HISTORY_S = 60.0
_RETURN_S = 600.0  # somebody who was silent for longer does not come back


class ClusterState:
    """Collects heartbeats; gives the plan and the live fingerprints back.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._born_s = clock()
        self._plan: Plan | None = None
        self._held: Held | None = None
        self._owner = ""
        self._posts = 0
        self._sources: dict[str, Source] = {}
        self._silent: dict[str, Source] = {}
        self._gone: list[ReplicaReport | EdgeReport] = []  # totals of those who went for good, by whom they were of

    async def post(self, plan: Plan, owner: str = "", held: Held | None = None) -> ServerStatus:
        """What `up` wants from now on, and what it has deployed; answers with the status, for its console.

        Raises:
            TakenOverError: another `up` has claimed the cluster state since.
        """
        if owner != self._owner:
            raise TakenOverError("another teacher-server has taken over this cluster")
        self._posts += 1
        self._plan, self._held = plan, held
        return await self.status()

    async def posts(self) -> int:
        """How often was posted; it grows while an `up` lives."""
        return self._posts

    async def claim(self, owner: str) -> Held | None:
        """Makes `owner` the one who may post; what the one before had deployed."""
        self._owner = owner
        return self._held

    async def report(self, source: str, report: ReplicaReport | EdgeReport) -> News:
        """Takes a report.

        Args:
            source: unique among all that ever reported.
            report: totals since that source started.
        """
        now_s = self._clock()
        back = self._silent.pop(source) if source in self._silent else Source(report)
        entry = self._sources.setdefault(source, back)
        entry.latest = report
        entry.past.append((now_s, report.counters))
        while entry.past[0][0] < now_s - HISTORY_S:
            entry.past.popleft()
        self._forget(now_s)
        return self.news()

    async def leave(self, source: str) -> None:
        """Goodbye of a source that goes in order."""
        entry = self._sources.pop(source, None)
        if entry is not None:
            self._silent[source] = entry

    def news(self) -> News:
        """The latest for everybody."""
        found: dict[str, dict[str, tuple[int, TeacherInfo]]] = {}
        healthy: Counter[str] = Counter()
        for report in self._reports(ReplicaReport):
            healthy[report.info.name] += not report.trouble
            same = found.setdefault(report.info.name, {})
            generation = max(report.generation, same.get(report.info.fingerprint, (0, report.info))[0])
            same[report.info.fingerprint] = (generation, report.info)
        weights = {
            name: tuple(info for _, info in sorted(same.values(), key=lambda held: -held[0]))
            for name, same in found.items()
        }
        return News(self._plan, weights, max(1, len(self._reports(EdgeReport))), dict(healthy))

    async def status(self) -> ServerStatus:
        """How the whole server is doing."""
        now_s = self._clock()
        self._forget(now_s)
        gone = [*self._gone, *(source.latest for source in self._silent.values())]
        return summarise(self._plan or Plan(), self.news(), list(self._sources.values()), gone, now_s, self._born_s)

    def _reports(self, kind: type) -> list[Any]:
        return [source.latest for source in self._sources.values() if isinstance(source.latest, kind)]

    def _forget(self, now_s: float) -> None:
        for name, source in list(self._sources.items()):
            if source.seen_s < now_s - FRESH_S:
                self._silent[name] = self._sources.pop(name)
        for name, source in list(self._silent.items()):
            if source.seen_s < now_s - _RETURN_S:
                self._bury(self._silent.pop(name).latest)

    def _bury(self, report: ReplicaReport | EdgeReport) -> None:
        """Adds its totals to those of the gone of its kind: the list grows with weights, not with restarts."""
        report = self._without_strangers(report)
        for place, other in enumerate(self._gone):
            if type(other) is type(report) and getattr(other, "info", None) == getattr(report, "info", None):
                self._gone[place] = add_up(other, report)
                return
        self._gone.append(report)

    def _without_strangers(self, report: ReplicaReport | EdgeReport) -> ReplicaReport | EdgeReport:
        """A last report without the rows of tenants that have no entry and are served by nobody now: else they stayed for ever."""
        known = set(self._plan.tenants) if self._plan else set()
        for source in self._sources.values():
            known |= set(source.latest.counters.get("tenants", {}))
        rows = report.counters.get("tenants")
        if not isinstance(rows, Mapping):
            return report
        kept = {name: row for name, row in rows.items() if name in known}
        return replace(report, counters={**report.counters, "tenants": kept})
