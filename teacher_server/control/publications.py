"""Published revisions as `up` follows them: the newest one is deployed by the rolling update, one that cannot come up is dropped, old ones go.

In: teachers of a config and what edges have left on the disk; out: the teachers that are to run. It decides which weights; `rolling_update`
how they come to run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from teacher_server.config.publish import PublishConfig
from teacher_server.config.server import TeacherConfig
from teacher_server.control.rolling_update import Rollout
from teacher_server.publishing import blueprint
from teacher_server.publishing.revisions import Revisions, model_key, published, revision_of, with_revision
from teacher_server.telemetry.records import TeacherPlan


class Publications:
    """The revisions of one server's teachers.

    Args:
        rollout: of the server.
        say: told each step, for the console.
    """

    def __init__(self, rollout: Rollout, say: Callable[[str], None]) -> None:
        self._rollout = rollout
        self._say = say
        self._tried: dict[str, str] = {}  # the revision that was ordered last, by teacher
        self._told: dict[str, str] = {}  # of disks

    def prepare(self, teachers: Sequence[TeacherConfig]) -> None:
        """Writes down what revisions must fit.

        Raises:
            ServerConfigError: a model that revisions cannot replace, or a folder that cannot be written to.
        """
        for config in teachers:
            if config.publish is not None:
                blueprint.make(config)

    def wanted(self, teachers: Sequence[TeacherConfig]) -> list[TeacherConfig]:
        """The teachers with the weights that are wanted now; what is on its way comes first, and is not changed under way."""
        return [self._wanted(config) for config in teachers]

    def _wanted(self, config: TeacherConfig) -> TeacherConfig:
        found = published(config)
        deployed = self._rollout.deployed.get(config.name)
        if deployed is not None and not self._rollout.has_come(config.name):
            held = with_revision(config, revision_of(deployed[0]))
            if held == deployed[0]:  # the operator has changed nothing else meanwhile
                return held
        if revision := revision_of(found):
            self._order(config, revision)
        return found

    def _order(self, config: TeacherConfig, revision: str) -> None:
        if self._tried.get(config.name) != revision:
            assert config.publish is not None
            self._tried[config.name] = revision
            self._say(f"{config.name}: revision {revision[:12]} is wanted{_origin(config, revision)}")

    def step(self, teachers: Sequence[TeacherConfig]) -> None:
        """One look at every teacher whose weights may be published. Trouble with a disk is said once, and looked at again."""
        for config in teachers:
            if config.publish is None or config.name not in self._rollout.deployed:
                continue
            try:
                self._look(config, config.publish)
                trouble = ""
            except OSError as error:
                trouble = f"{config.name}: publish.folder {config.publish.folder}: {error.strerror}"
            if trouble and self._told.get(config.name) != trouble:
                self._say(trouble)
            self._told[config.name] = trouble

    def _look(self, config: TeacherConfig, settings: PublishConfig) -> None:
        revisions, key = Revisions.of(settings, config.name), model_key(config)
        running = revision_of(self._rollout.deployed[config.name][0])
        tried = self._tried.get(config.name, "")
        if tried and tried != running and revisions.wanted(key)[:1] == [tried]:
            self._say(f"{config.name}: revision {tried[:12]} is given up")
            del self._tried[config.name]
            revisions.drop(key, tried, self._rollout.note(config.name))
        needed = {revision_of(version) for version in self._rollout.needed(config.name)}
        for name in revisions.tidy(key, settings.keep, needed):
            self._say(f"{config.name}: revision {name[:12]} is deleted; publish.keep is {settings.keep}")

    def told(self, teachers: Sequence[TeacherConfig], plans: Mapping[str, TeacherPlan]) -> dict[str, TeacherPlan]:
        """The plans with what edges must know of publishing."""
        more = {
            config.name: {"publish": config.publish, "model": model_key(config)}
            for config in teachers
            if config.publish is not None
        }
        return {name: replace(plan, **more.get(name, {})) for name, plan in plans.items()}  # type: ignore[arg-type]


def _origin(config: TeacherConfig, revision: str) -> str:
    """Who published a revision, as its folder says."""
    assert config.publish is not None
    try:
        told = json.loads(
            (Revisions.of(config.publish, config.name).path(revision) / "lyceum-revision.json").read_text()
        )
        return f" (of tenant {told['tenant'] or 'without a name'}{', ' * bool(told['note'])}{told['note']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
