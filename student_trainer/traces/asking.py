"""Prompts to a teacher that writes, a few calls ahead of what is taken; samples back in the order of the prompts.

In: prompts as ids and a way of sampling; out: (number, samples) of each. It decides nothing about what was written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from teacher_wire.core.info import TeacherInfo
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import PromptBatch, Sample, SamplingSpec


class Asking:
    """Calls under way.

    Args:
        client, info: the teacher.
        spec: how samples are drawn.
        prompts: ids of each prompt.
        per_call, calls: prompts of one call at most, and calls under way.
    """

    def __init__(
        self,
        client: TeacherClient,
        info: TeacherInfo,
        spec: SamplingSpec,
        prompts: Sequence[Sequence[int]],
        per_call: int,
        calls: int,
    ) -> None:
        self.info, self.spec = info, spec
        self._client = client
        self._prompts = prompts
        self._per_call, self._calls = per_call, calls

    async def answers(self, first: int) -> Any:
        """(number, samples) of every prompt from `first` on, in order."""
        under_way: deque[tuple[range, asyncio.Task[list[list[Sample]]]]] = deque()
        try:
            for group in groups(self._prompts, first, self._per_call, self.spec, self.info):
                under_way.append((group, asyncio.create_task(self._ask(group))))
                if len(under_way) >= self._calls:
                    for pair in await _finished(*under_way.popleft()):
                        yield pair
            while under_way:
                for pair in await _finished(*under_way.popleft()):
                    yield pair
        finally:
            for _, task in under_way:
                task.cancel()
            await asyncio.gather(*(task for _, task in under_way), return_exceptions=True)

    async def _ask(self, group: range) -> list[list[Sample]]:
        found: list[list[Sample]] = [[] for _ in group]
        batch = PromptBatch.pack([self._prompts[number] for number in group])
        async for sample in self._client.generate(self.info, self.spec, batch):
            found[sample.prompt].append(sample)
        return found


async def _finished(group: range, task: asyncio.Task[list[list[Sample]]]) -> list[tuple[int, list[Sample]]]:
    try:
        return list(zip(group, await task, strict=True))
    except BaseException:
        task.cancel()
        raise


def groups(
    prompts: Sequence[Sequence[int]], first: int, most: int, spec: SamplingSpec, info: TeacherInfo
) -> Iterator[range]:
    """Prompts of one call each: neighbours, under the teacher's limits."""
    start, tokens = first, 0
    for number in range(first, len(prompts)):
        needed = spec.samples * (len(prompts[number]) + spec.max_new_tokens)
        full = number - start >= min(most, info.limits.max_request_sequences)
        if number > start and (full or tokens + needed > info.limits.max_generate_tokens):
            yield range(start, number)
            start, tokens = number, 0
        tokens += needed
    if start < len(prompts):
        yield range(start, len(prompts))
