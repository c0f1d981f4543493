"""The revisions of a teacher that a run learns from, when the run itself publishes them: which one is asked now, and what each label was of.

In: revisions that went live, labels that were used; out: whom to ask, and a ledger (`revisions.jsonl` in the run folder). Any thread may ask.
A fingerprint that is none of this run's is never learned from.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from student_trainer.labels.source import LabelRequest, Labels, LabelSource, LabelUsage
from teacher_wire.core.errors import MismatchError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore

REVISIONS_NAME = "revisions.jsonl"
_LOOK_S = 0.05


class Lineage:
    """The revisions of one run.

    Args:
        info: the teacher as the run met it.
        ledger: the file.
        first_batch: micro-batch that the process begins with: entries of later ones are dropped, since they are asked for again.
        origin: fingerprint that the run was begun with; that of `info` if not given.

    Attributes:
        fingerprints: of all revisions that this process has asked.

    Raises:
        OSError: the ledger cannot be written.
    """

    def __init__(self, info: TeacherInfo, ledger: Path, first_batch: int = 0, origin: str = "") -> None:
        self._info = info
        self._ledger = ledger
        self._lock = threading.Lock()
        self._coming = 0
        self.fingerprints = {info.fingerprint}
        kept = [entry for entry in read_ledger(ledger) if entry.get("batch", -1) < first_batch]
        begun = [] if any("origin" in entry for entry in kept) else [{"origin": origin or info.fingerprint}]
        self._announced = {str(entry["revision"]) for entry in kept if "revision" in entry}
        ledger.write_text("".join(json.dumps(entry) + "\n" for entry in (*kept, *begun)))

    @property
    def info(self) -> TeacherInfo:
        """Whom to ask now."""
        return self._info

    def coming(self, more: int) -> None:
        """One more (1) or less (-1) revision is on its way: whoever meets other weights meanwhile waits for word of it."""
        with self._lock:
            self._coming += more

    def announce(self, step: int, revision: str) -> None:
        """A revision of ours is about to be published: the teacher may hold it from now on, whether this process lives or not."""
        self._announced.add(revision)
        self._write({"step": step, "revision": revision})

    def live(self, step: int, revision: str, info: TeacherInfo) -> None:
        """A revision of ours is live, and asked from now on if it is of the teacher that the run learns from."""
        self._write({"step": step, "revision": revision, "fingerprint": info.fingerprint})
        if info.name == self._info.name:
            self._move(info)

    def _move(self, info: TeacherInfo) -> None:
        self.fingerprints.add(info.fingerprint)
        self._info = info

    def used(self, batch: int, fingerprint: str) -> None:
        """Labels of a micro-batch were taken; of which revision they are."""
        self._write({"batch": batch, "fingerprint": fingerprint})

    def _write(self, entry: dict[str, Any]) -> None:
        with self._lock, self._ledger.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    async def after(self, asked: TeacherInfo, problem: MismatchError, client: TeacherClient) -> None:
        """Returns once another revision than `asked` is to be asked.

        Raises:
            MismatchError: `problem`, since none is on its way, and what the teacher holds is none of ours.
        """
        if problem.field not in ("", "fingerprint"):
            raise problem
        while self._coming and self._info.fingerprint == asked.fingerprint:
            await asyncio.sleep(_LOOK_S)
        if self._info.fingerprint != asked.fingerprint:
            return
        found = await client.teacher(asked.name)  # it may have gone live although we were told it had not
        if found.fingerprint == asked.fingerprint or found.revision not in self._announced:
            problem.add_note("the weights behind the teacher are none that this run has published")
            raise problem
        self._move(found)


class FollowingSource(LabelSource):
    """Labels of whatever revision the lineage asks at the moment; the other arguments are those of `LabelSource`.

    A request that meets a revision that is gone is made again of the one that took its place, whole: one answer is of one revision.
    """

    def __init__(
        self,
        lineage: Lineage,
        connect: Callable[[], TeacherClient],
        spec: SignalSpec,
        check: Callable[[TeacherSignals, LabelRequest], None],
        store: LabelStore | None,
        usage: LabelUsage,
    ) -> None:
        super().__init__(connect, lineage.info, spec, check, store, usage)
        self._lineage = lineage
        self._sources: dict[str, LabelSource] = {}

    def _now(self) -> tuple[TeacherInfo, LabelSource]:
        info = self._lineage.info
        if info.fingerprint not in self._sources:
            self._sources[info.fingerprint] = LabelSource(
                self._connected, info, self._spec, self._check, self._store, self._usage
            )
        return info, self._sources[info.fingerprint]

    def _connected(self) -> TeacherClient:
        """The one client of all revisions, which ends with this source."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    async def labels(self, request: LabelRequest) -> Labels:
        while True:
            info, source = self._now()
            try:
                return await source.labels(request)
            except MismatchError as problem:
                await self._lineage.after(info, problem, self._connected())

    async def has(self, request: LabelRequest) -> bool:
        return await self._now()[1].has(request)

    async def keep(self, request: LabelRequest, answer: TeacherSignals) -> None:
        await self._now()[1].keep(request, answer)


def read_ledger(ledger: Path) -> list[dict[str, Any]]:
    """The entries of a ledger; none if there is none. A line that was cut short by a kill is left out."""
    try:
        lines = ledger.read_text().splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        entries += [entry] if isinstance(entry, dict) else []
    return entries


def origin_of(ledger: Path, info: TeacherInfo) -> str:
    """The fingerprint that a run was begun with, if it has itself published what the teacher holds now; else the teacher's."""
    entries = read_ledger(ledger)
    published = {entry["revision"] for entry in entries if "revision" in entry}
    origin = next((entry["origin"] for entry in entries if "origin" in entry), info.fingerprint)
    return str(origin) if info.revision in published else info.fingerprint
