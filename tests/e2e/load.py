"""Students that ask without pause and check every answer against the weights it says it comes from."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import numpy as np

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import MismatchError, TeacherWireError
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher

SPEC = spec_of("hidden", 64)


@dataclass
class Tally:
    """What students met.

    Attributes:
        answers: by the fingerprint they came with; every one was compared with that teacher's own.
        told: students whose weights are gone, and who took the new ones.
        troubles: everything else that was not an answer, also what the client would have tried again.
    """

    answers: Counter[str] = field(default_factory=Counter)
    told: int = 0
    troubles: list[TeacherWireError] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return sum(self.answers.values())


class Crowd:
    """Students at one address. `seeds` are those of all fakes that may answer."""

    def __init__(self, address: str, seeds: range = range(10), tokens: int = 64, teacher: str = "") -> None:
        self.tally = Tally()
        self._address = address
        self._teacher = teacher
        self._fakes = {fake.teacher_info().fingerprint: fake for fake in (FakeTeacher(seed=s) for s in seeds)}
        self._rng = np.random.default_rng(0)
        self._tokens = tokens

    @contextlib.asynccontextmanager
    async def asking(self, students: int, *, pinned: bool = True) -> AsyncIterator[Tally]:
        """Students ask while the block runs, and have their last answer when it ends."""
        stop = asyncio.Event()
        tasks = [asyncio.create_task(self._ask(stop, pinned)) for _ in range(students)]
        try:
            yield self.tally
        finally:
            stop.set()
            await asyncio.gather(*tasks)

    async def _ask(self, stop: asyncio.Event, pinned: bool) -> None:
        async with TeacherClient(self._address, retry_for_s=0, on_trouble=self.tally.troubles.append) as client:
            info = await client.teacher(self._teacher)
            while not stop.is_set():
                batch = TokenBatch.pack([self._rng.integers(0, 64, self._tokens).tolist()])  # never asked before
                try:
                    answer = await client.score(info if pinned else replace(info, fingerprint=""), SPEC, batch)
                except MismatchError:
                    self.tally.told += 1
                    info = await client.teacher(self._teacher)
                    continue
                except TeacherWireError as error:
                    self.tally.troubles.append(error)
                    return
                assert not pinned or answer.fingerprint == info.fingerprint
                expected = self._fakes[answer.fingerprint].signals(SPEC, batch)
                np.testing.assert_array_equal(answer["hidden_ND"].array, expected["hidden_ND"].array)
                self.tally.answers[answer.fingerprint] += 1


async def until(condition, limit_s: float = 60.0) -> None:
    """Returns when the condition, a function or a coroutine function, holds."""
    async with asyncio.timeout(limit_s):
        while True:
            found = condition()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.1)
