"""The way to one of several teachers: it answers, or it is away, and its policy says what follows (`when_missing`).

In: requests; out: its labels, or `Away`. A teacher is away when its server could not be reached for `AWAY_S`, or was full for `retry_s`. Only
that is ever "missing": whatever else an answer is refused for (integrity, another fingerprint, no credentials) is raised as it is. Under
`reweight` a teacher that is away is asked the request that it failed again and again in the background, and used again once it has answered it.
Lives on the loop of `labels.event_loop`; needs no lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from student_trainer.config.teachers import WhenMissing
from student_trainer.errors import TeacherAwayError
from student_trainer.labels.source import LabelRequest, Labels, LabelSource
from teacher_wire.core.errors import OverloadedError, TeacherWireError, UnavailableError

log = logging.getLogger(__name__)

AWAY_S = 4.0  # of failed connections, after which a teacher that need not be waited for is away
PROBE_S = 1.0  # between two tries to reach it again


class Away(Exception):  # noqa: N818
    """The teacher does not answer now, and need not."""


@dataclass(frozen=True)
class AskedTeacher:
    """One of several teachers.

    Attributes:
        name: in the run.
        weight: its share, beside those of the others that are asked about the same sample.
        when_missing: what happens when it does not answer.
        retry_s: for how long it is waited for.
        source: of its labels; its client gives up after `patience_s`.
    """

    name: str
    weight: float
    when_missing: WhenMissing
    retry_s: float
    source: LabelSource


def patience_s(when_missing: WhenMissing, retry_s: float) -> float:
    """How long the client of a teacher itself makes a failed call again."""
    return retry_s if when_missing == "wait" else min(AWAY_S, retry_s)


class Lane:
    """See module.

    Args:
        teacher: who is asked.
        tell: called with a sentence when it is away, and when it is back.
    """

    def __init__(self, teacher: AskedTeacher, tell: Callable[[str], None]) -> None:
        self.teacher = teacher
        self._tell = tell
        self._away_since_s = math.inf  # of the monotonic clock; infinite while it answers
        self._problem: TeacherWireError | None = None
        self._back = asyncio.Event()
        self._probe: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def is_away(self) -> bool:
        return self._away_since_s < math.inf

    async def labels(self, request: LabelRequest) -> Labels:
        """The labels of `request`; those on disk are there whether the teacher is or not.

        Raises:
            Away: it does not answer, and its policy is `reweight`.
            TeacherAwayError: it does not answer, and its policy is another.
            LabelError, TeacherWireError: as `LabelSource.labels`, what cannot be tried again.
        """
        teacher, full_since_s = self.teacher, math.inf
        if self._failure is not None:
            raise self._failure
        if self.is_away and not await teacher.source.has(request):
            raise Away(self.name)
        while True:
            try:
                return await teacher.source.labels(request)
            except OverloadedError as problem:  # it is there, and has too much to do
                full_since_s = min(full_since_s, time.monotonic() - patience_s(teacher.when_missing, teacher.retry_s))
                if time.monotonic() - full_since_s >= teacher.retry_s:
                    raise self._missing(request, problem) from problem
            except UnavailableError as problem:
                raise self._missing(request, problem) from problem

    async def back(self) -> None:
        """Returns when it answers again.

        Raises:
            TeacherAwayError: it has been away for `retry_s`.
            TeacherWireError: it is back, and is another.
        """
        left_s = self._away_since_s + self.teacher.retry_s - time.monotonic() if self.is_away else 0.0
        if self.is_away:
            try:
                async with asyncio.timeout(left_s if left_s < math.inf else None):
                    await self._back.wait()
            except TimeoutError:
                raise self._gone(self._problem) from self._problem
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Ends the tries to reach it."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    def _missing(self, request: LabelRequest, problem: TeacherWireError) -> Exception:
        """What is raised for a request that got no answer."""
        if self.teacher.when_missing != "reweight":
            return self._gone(problem)
        if not self.is_away:
            self._away_since_s = time.monotonic() - patience_s("reweight", self.teacher.retry_s)
            self._problem = problem
            self._back.clear()
            self._probe = asyncio.create_task(self._until_it_answers(request))
            self._tell(f"teacher {self.name!r} is away ({problem}): the others are learned from alone until it is back")
        return Away(self.name)

    def _gone(self, problem: TeacherWireError | None) -> TeacherAwayError:
        policy, retry_s = self.teacher.when_missing, self.teacher.retry_s
        waited = "" if policy == "fail" else f" for retry_s={retry_s:g} seconds"
        alone = ", and the others are less than 0.3 of the weight of its samples" if policy == "reweight" else ""
        return TeacherAwayError(
            f"teacher {self.name!r} has not answered{waited} (when_missing={policy}{alone}): {problem}"
        )

    async def _until_it_answers(self, request: LabelRequest) -> None:
        while True:
            try:
                await self.teacher.source.labels(request)
                break
            except (UnavailableError, OverloadedError) as problem:
                log.debug("%s: still away: %s", self.name, problem)
                await asyncio.sleep(PROBE_S)
            except Exception as error:  # it is back, and what it says is refused: whoever asks next is told
                self._failure = error
                break
        if self._failure is None:
            self._tell(f"teacher {self.name!r} is back after {time.monotonic() - self._away_since_s:.0f} s")
        self._away_since_s = math.inf
        self._back.set()
