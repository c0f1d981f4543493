"""From wanted teachers to running ones: what to deploy, roll, take away or put back, one step at a time. No Ray here.

In: the teachers of a config, and what the cluster says about their deployments; out: orders to the cluster, lines for the
console, and a `TeacherPlan` for each. A version that cannot come up is taken back and the last good one is in force again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from teacher_server.config.server import TeacherConfig
from teacher_server.errors import ServerConfigError
from teacher_server.telemetry.records import TeacherPlan


@dataclass(frozen=True)
class Deployed:
    """What the cluster says about one teacher's deployment.

    Attributes:
        state: `deploying`, `running` or `failed`.
        why: it is not running, in a sentence.
        replicas: by their state: running, starting, stopping.
    """

    state: str
    why: str = ""
    replicas: Mapping[str, int] = field(default_factory=dict)


class Cluster(Protocol):
    """Where teachers are deployed."""

    def deploy(self, config: TeacherConfig, generation: int) -> None:
        """Starts a teacher, or begins to replace its replicas; returns at once."""

    def remove(self, name: str) -> None:
        """Begins to drain a teacher away; returns at once."""

    def look(self) -> dict[str, Deployed]:
        """Every teacher that is there, also one that is going."""


@dataclass
class _Teacher:
    """One teacher that is wanted.

    Attributes:
        config: deployed now; `good` came up before and is put back if this one does not.
        coming: its deployment has not ended yet.
        note: what is to be known about it longer.
    """

    config: TeacherConfig
    generation: int
    since_s: float
    good: TeacherConfig | None = None
    coming: bool = True
    note: str = ""
    told: str = ""


class Rollout:
    """The teachers of one server.

    Args:
        cluster: where they are deployed.
        say: told each step, for the console.
        clock: seconds, monotonic.
    """

    def __init__(
        self, cluster: Cluster, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._say = say
        self._clock = clock
        self._teachers: dict[str, _Teacher] = {}
        self._leaving: dict[str, float] = {}
        self._generation = 0

    @property
    def settled(self) -> bool:
        """Whether nothing is under way."""
        return not self._leaving and not any(teacher.coming for teacher in self._teachers.values())

    def want(self, configs: Iterable[TeacherConfig]) -> None:
        """Begins whatever leads to exactly these teachers."""
        wanted = {config.name: config for config in configs}
        for name in [name for name in self._teachers if name not in wanted]:
            self._say(f"{name}: taken away; what it holds is answered first")
            self._leave(name)
        for name, config in wanted.items():
            known = self._teachers.get(name)
            if known is None:
                self._begin(_Teacher(config, 0, 0.0))
            elif config != known.config:
                changed = ", ".join(changes(known.config.model_dump(), config.model_dump()))
                self._say(f"{name}: rolling to the new version ({changed})")
                self._begin(_Teacher(config, 0, 0.0, good=known.good))

    def has_come(self, name: str) -> bool:
        """Whether a teacher's last change has ended."""
        return not self._teachers[name].coming

    def note(self, name: str) -> str:
        """What is to be known about a teacher longer, such as why its last change was taken back."""
        return self._teachers[name].note

    def needed(self, name: str) -> tuple[TeacherConfig, ...]:
        """The versions of a teacher that are deployed, or are put back if that one does not come up."""
        teacher = self._teachers.get(name)
        return () if teacher is None else (teacher.config, *([teacher.good] if teacher.good else []))

    @property
    def deployed(self) -> dict[str, tuple[TeacherConfig, int]]:
        """Every wanted teacher as it is deployed, and the generation of its deployment."""
        return {name: (teacher.config, teacher.generation) for name, teacher in self._teachers.items()}

    def adopt(self, held: Mapping[str, tuple[TeacherConfig, int]]) -> None:
        """Takes on what runs in the cluster: teachers as another server deployed them; of others nothing is known, so they go."""
        now_s = self._clock()
        for name, found in self._cluster.look().items():
            if name in held and found.state != "failed":
                config, generation = held[name]
                coming = found.state != "running"
                self._teachers[name] = _Teacher(config, generation, now_s, None if coming else config, coming)
                self._say(f"{name}: still runs; adopted")
            else:
                self._say(f"{name}: left by another server in a state that is not known; taken away")
                self._leaving[name] = now_s
                self._cluster.remove(name)
        self._generation = max([self._generation, *(generation for _, generation in held.values())])

    def start(self) -> None:
        """One step of the first start.

        Raises:
            ServerConfigError: a teacher cannot come up; why, in its replica's own words.
        """
        for name, found in self._cluster.look().items():
            teacher = self._teachers.get(name)
            if teacher is not None and found.state == "failed":
                raise ServerConfigError(found.why)
            if teacher is not None and found.state == "running":
                teacher.good, teacher.coming = teacher.config, False

    def step(self) -> dict[str, TeacherPlan]:
        """Looks how things are going and does what is next; what is to be said of every teacher."""
        found = self._cluster.look()
        for name, since_s in list(self._leaving.items()):
            if name not in found and name not in self._teachers:
                self._say(f"{name}: gone after {self._clock() - since_s:.0f} s")
            if name not in found or name in self._teachers:
                del self._leaving[name]
        for name, teacher in list(self._teachers.items()):
            if teacher.coming:
                self._follow(name, teacher, found.get(name, Deployed("deploying")))
        return {name: _plan(teacher, found.get(name)) for name, teacher in self._teachers.items()}

    def _begin(self, teacher: _Teacher) -> None:
        self._generation += 1
        teacher.generation, teacher.since_s = self._generation, self._clock()
        self._teachers[teacher.config.name] = teacher
        self._cluster.deploy(teacher.config, teacher.generation)

    def _leave(self, name: str) -> None:
        del self._teachers[name]
        self._leaving[name] = self._clock()
        self._cluster.remove(name)

    def _follow(self, name: str, teacher: _Teacher, found: Deployed) -> None:
        took_s = self._clock() - teacher.since_s
        if found.state == "running":
            back = bool(teacher.note)
            self._say(f"{name}: {'the version before is' if back else 'the new version is'} up after {took_s:.0f} s")
            teacher.good, teacher.coming = teacher.config, False
        elif found.state == "failed" and teacher.good is None:
            self._say(f"{name}: cannot come up: {found.why}; taken away")
            self._leave(name)
        elif found.state == "failed" and teacher.good is not None and teacher.good != teacher.config:
            self._say(f"{name}: the new version cannot come up: {found.why}; going back to the version before")
            self._begin(
                _Teacher(teacher.good, 0, 0.0, good=teacher.good, note=f"the last change was taken back: {found.why}")
            )
        else:
            moving = any(found.replicas.get(state) for state in ("starting", "stopping"))
            doing = ", ".join(f"{count} {state}" for state, count in found.replicas.items() if count)
            doing = "; ".join(part for part in (doing, found.why) if part)
            if (moving or found.why) and doing != teacher.told:
                teacher.told = doing
                self._say(f"{name}: {doing}")


def _plan(teacher: _Teacher, found: Deployed | None) -> TeacherPlan:
    replicas = dict(found.replicas) if found else {}
    running, starting = replicas.get("running", 0), replicas.get("starting", 0)
    state = "running"
    if teacher.coming:
        state = "rolling" if teacher.good else "starting"
    elif found is None or found.state == "failed":
        state = "failed"
    message = teacher.note or (found.why if found and state != "running" else "")
    return TeacherPlan(state, message, running, running + starting)


def changes(old: Mapping[str, object], new: Mapping[str, object], path: str = "") -> list[str]:
    """Dotted names of the fields that differ."""
    found: list[str] = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += changes(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key}")
    return found
