"""The one feed of a run with several teachers: all are asked about a micro-batch at once, and it is ready when all of them are.

In: numbered questions to several teachers; out: `take(number)` as of any feed, and for which of them it was waited. A teacher that is away is
done without or waited for as its policy says (`lane`), by a rule that looks at nothing but who has answered (`answer.is_enough`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.joined.answer import Answer, AskedAll, AskedOne, JoinedAnswer, is_enough
from student_trainer.labels.joined.lane import AskedTeacher, Away, Lane
from student_trainer.labels.prefetch import AheadFeed, Taken, made_ready, with_names
from student_trainer.labels.source import LabelUsage
from teacher_wire.core.signals import TeacherSignals


@dataclass(frozen=True)
class JoinedTaken(Taken):
    """Labels of several teachers; `ready` is a `JoinedAnswer`.

    Attributes:
        came_s: when each teacher's answer was ready, of the clock `time.perf_counter`.
    """

    came_s: dict[str, float] = field(default_factory=dict)


class JoinedFeed(AheadFeed[AskedAll]):
    """See module; the other arguments are those of `AheadFeed`.

    Args:
        teachers: who are asked; their sources are closed with the feed.
        ask: number -> what each of them is asked.
        prepare: makes of an answer what a step reads, in a thread of the feed.
        tell: called with a sentence when a teacher is away, and when it is back.
        on_answer: called with the number of each micro-batch that is taken, and the answer, by whoever takes it.
    """

    def __init__(
        self,
        teachers: Sequence[AskedTeacher],
        ask: Callable[[int], AskedAll],
        *,
        first: int,
        count: int,
        max_bytes: int,
        max_batches: int,
        prepare: Callable[[TeacherSignals], LabelTensors],
        tell: Callable[[str], None],
        burst: int = 1,
        on_close: Callable[[], None] = lambda: None,
        on_answer: Callable[[int, JoinedAnswer], None] = lambda number, answer: None,
    ) -> None:
        super().__init__(
            ask, first=first, count=count, max_bytes=max_bytes, max_batches=max_batches, burst=burst, on_close=on_close
        )
        self._lanes = {teacher.name: Lane(teacher, tell) for teacher in teachers}
        self._weights = {teacher.name: teacher.weight for teacher in teachers}
        self._prepare = prepare
        self._on_answer = on_answer
        self.stats.alone_s = dict.fromkeys(self._lanes, 0.0)
        self._begin()

    @contextlib.asynccontextmanager
    async def _sources(self) -> AsyncIterator[object]:
        async with contextlib.AsyncExitStack() as stack:
            for lane in self._lanes.values():
                await stack.enter_async_context(lane.teacher.source)
                stack.push_async_callback(lane.close)
            yield self

    def _peak_bytes(self, asked: AskedAll) -> int:
        return sum(self._lanes[name].teacher.source.peak_bytes(one.request) for name, one in asked.by_name.items())

    def _on_take(self, number: int, taken: Taken, began_s: float) -> None:
        assert isinstance(taken, JoinedTaken)
        if taken.came_s:
            *earlier, last = sorted(taken.came_s, key=lambda name: taken.came_s[name])
            alone_s = taken.came_s[last] - max([began_s, *(taken.came_s[name] for name in earlier)])
            self.stats.alone_s[last] += max(0.0, alone_s)
        self._on_answer(number, taken.ready)

    async def _fetched(self, asked: AskedAll) -> JoinedTaken:
        """Asks everybody, and again whoever is away and cannot be done without.

        Raises:
            TeacherAwayError: somebody does not answer who is to be waited for.
            LabelError, TeacherWireError: an answer is refused; names the teacher and the samples.
        """
        there: dict[str, Taken] = {}
        came_s: dict[str, float] = {}
        away: set[str] = set()
        under_way = {asyncio.create_task(self._of(name, one)): name for name, one in asked.by_name.items()}
        try:
            while True:
                while under_way:
                    done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        name = under_way.pop(task)
                        try:
                            there[name] = task.result()
                            came_s[name] = time.perf_counter()
                        except Away:
                            away.add(name)
                if is_enough(asked.by_name, there, away, self._weights):
                    break
                await self._any_back(away)
                for name in [name for name in away if not self._lanes[name].is_away]:
                    away.remove(name)
                    under_way[asyncio.create_task(self._of(name, asked.by_name[name]))] = name
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
        usage = LabelUsage()
        for taken in there.values():
            usage.add(taken.usage)
        answers = {name: Answer(one, there[name].ready) for name, one in asked.by_name.items() if name in there}
        missing = {name: one.sequences for name, one in asked.by_name.items() if name in away}
        return JoinedTaken(JoinedAnswer(asked.names, answers, missing), usage, came_s=came_s)

    async def _of(self, name: str, asked: AskedOne) -> Taken:
        """One teacher's answer, made ready."""
        try:
            labels = await self._lanes[name].labels(asked.request)
            return await asyncio.to_thread(made_ready, labels, asked.request, self._prepare)
        except (Away, asyncio.CancelledError):
            raise
        except Exception as error:
            named = with_names(error, asked.request)
            if f"teacher {name}" not in getattr(named, "__notes__", []):
                named.add_note(f"teacher {name}")
            raise named from error.__cause__

    async def _any_back(self, away: set[str]) -> None:
        """Returns when one of them answers again; raises as `Lane.back`."""
        waiting = [asyncio.create_task(self._lanes[name].back()) for name in sorted(away)]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
