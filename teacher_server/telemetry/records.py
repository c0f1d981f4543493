"""What replicas, edges and `teacher-server up` tell the cluster state, and what they hear back: plain frozen data."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from teacher_server.config.publish import PublishConfig
from teacher_server.config.server import EdgeConfig, TeacherConfig, TenantConfig
from teacher_wire.core.info import TeacherInfo


@dataclass(frozen=True)
class ReplicaReport:
    """One replica of a teacher.

    Attributes:
        generation: of its deployment; a later rolling update has a higher one.
        info: who it is, with its fingerprint.
        counters: see `TeacherEngine.counters`.
        trouble: why it can answer nothing any more, or "": Serve is about to replace it.
    """

    generation: int
    info: TeacherInfo
    counters: Mapping[str, Any]
    trouble: str = ""


@dataclass(frozen=True)
class EdgeReport:
    """One edge; `counters` as `EdgeServer.counters` gives them."""

    node: str
    counters: Mapping[str, Any]


@dataclass(frozen=True)
class TeacherPlan:
    """What `up` knows of a teacher's deployment; see `TeacherStatus` for the first fields.

    Attributes:
        publish: who may publish revisions of it; None for nobody.
        model: of its config, of which revisions are revisions (`revisions.model_key`).
    """

    state: str = "starting"
    message: str = ""
    replicas: int = 0
    replicas_wanted: int = 0
    publish: PublishConfig | None = None
    model: str = ""


@dataclass(frozen=True)
class Plan:
    """What `up` wants now.

    Attributes:
        tenants: weights and quotas, by name.
        teachers: that are to be served, by name.
        open: every teacher has come up once; until then edges wait.
    """

    tenants: Mapping[str, TenantConfig] = field(default_factory=dict)
    teachers: Mapping[str, TeacherPlan] = field(default_factory=dict)
    open: bool = False


@dataclass(frozen=True)
class Held:
    """What an `up` has deployed, for the next one on a cluster that stays.

    Attributes:
        version: of the package it ran.
        node: address of its machine.
        edge: as the edges run.
        teachers: by name, as they run, and the generation of each deployment.
    """

    version: str
    node: str
    edge: EdgeConfig
    teachers: Mapping[str, tuple[TeacherConfig, int]]


@dataclass(frozen=True)
class News:
    """What a reporter hears back.

    Attributes:
        plan: None while `up` has said nothing yet.
        weights: teacher -> its live weights, the newest first.
        edges: that are alive, at least 1.
        healthy: teacher -> replicas that report themselves able to answer.
    """

    plan: Plan | None
    weights: Mapping[str, tuple[TeacherInfo, ...]]
    edges: int
    healthy: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Source:
    """Whoever reports, with its recent past."""

    latest: ReplicaReport | EdgeReport
    past: deque[tuple[float, Mapping[str, Any]]] = field(default_factory=deque)

    @property
    def seen_s(self) -> float:
        return self.past[-1][0]

    def since(self, start_s: float) -> tuple[float, Mapping[str, Any], Mapping[str, Any]]:
        """Seconds, first and last counters of what is remembered after `start_s`."""
        first_s, first = next((entry for entry in self.past if entry[0] >= start_s), self.past[-1])
        return self.seen_s - first_s, first, self.past[-1][1]
