"""A served teacher asked for answers and for likelihoods, through its server: its weights are never here.

In: prompts and sequences as ids of its own tokenizer; out: answers (Generate) and exact log-probabilities (Score, `top_k` with k = 1, whose rows
carry logp of the token that is there, and the likeliest id).
Axes: N scored rows, K kept ids.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape

from student_trainer.errors import ConfigError, ModelError
from student_trainer.inference.prompts import Prompter
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.writer import Written, written
from student_trainer.labels import event_loop
from student_trainer.teachers.connect import Connection
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.identity import tokenizer_sha256
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import PromptBatch, Sample, SamplingSpec
from teacher_wire.score.signals import TopK

CALLS = 4  # requests under way at a time
PROMPTS_PER_CALL = 8
Part = TypeVar("Part")


@dataclass(frozen=True)
class Scored:
    """What a model says of the tokens of one continuation.

    Attributes:
        logp: nats, of all of them.
        is_greedy: each is the likeliest one.
    """

    logp: float
    is_greedy: bool


class ServedTeacher:
    """One teacher of a server, with the tokenizer that its ids are of.

    Args:
        client: of the server, on the student's event loop.
        info: which teacher.
        tokenizer: a tokenizer that is byte for byte the teacher's.
        prompter: of its prompts.
    """

    def __init__(self, client: TeacherClient, info: TeacherInfo, tokenizer: Any, prompter: Prompter) -> None:
        self._client = client
        self.info, self.tokenizer, self.prompter = info, tokenizer, prompter
        eos = tokenizer.eos_token_id
        self.stop_ids = prompter.end_of_turn() | (frozenset() if eos is None else {int(eos)})

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        ignore_ends: bool = False,
        done: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """An answer to each prompt, in order.

        Args:
            prompts: ids.
            sampling: how; `top_k` is not the server's to do.
            ignore_ends: write all of max_new_tokens.
            done: called with the number of prompts of every call that has ended.

        Raises:
            ConfigError: `sampling.top_k`.
            TeacherWireError: the teacher does not write, or does not take these prompts.
        """
        if sampling.top_k:
            raise ConfigError(
                f"--top-k {sampling.top_k}: a served teacher samples by temperature and top-p alone; leave --top-k out"
            )
        ends = frozenset() if ignore_ends else self.stop_ids
        spec = SamplingSpec(
            temperature=sampling.temperature, top_p=sampling.top_p, max_new_tokens=sampling.max_new_tokens,
            seed=sampling.seed, stop_ids=tuple(sorted(ends)), ignore_eos=ignore_ends,
        )  # fmt: skip

        async def ask(numbers: range) -> list[Sample]:
            batch = PromptBatch.pack([prompts[number] for number in numbers])
            found: dict[int, Sample] = {}
            async for sample in self._client.generate(self.info, spec, batch):
                found[sample.prompt] = sample
            if done is not None:
                done(len(numbers))
            return [found[place] for place in range(len(numbers))]

        groups = [*_groups([len(p) + sampling.max_new_tokens for p in prompts], min(PROMPTS_PER_CALL, self.info.limits.max_request_sequences), self.info.limits.max_generate_tokens)]  # fmt: skip
        samples = [sample for part in _run([lambda group=group: ask(group) for group in groups]) for sample in part]  # type: ignore[misc]
        return [self._written(sample, ends) for sample in samples]

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        done: Callable[[int], None] | None = None,
    ) -> list[Scored]:
        """What the teacher says of each continuation behind its context, in order.

        Args:
            pairs: ids of a context, at least one, and of a continuation, at least one.
            done: called with the number of pairs of every request that has been answered.

        Raises:
            TeacherWireError: the teacher gives no `top_k` labels, or does not take sequences of this length.
        """
        spec = SignalSpec(self.info.vocab_rows, (TopK(k=1),))

        async def ask(numbers: range) -> list[Scored]:
            some = [pairs[number] for number in numbers]
            batch = TokenBatch.pack([[*context, *told] for context, told in some], [_wanted(len(c), len(t)) for c, t in some])  # fmt: skip
            answer = await self._client.score(self.info, spec, batch, cache="none")
            logp_N = answer.label_logp_N.array.astype(np.float64)
            hit_N = answer["topk_ids_NK"].array[:, 0].astype(np.int64) == batch.labels_N()
            if done is not None:
                done(len(numbers))
            bounds = batch.row_bounds_B1
            return [Scored(float(logp_N[a:b].sum()), bool(hit_N[a:b].all())) for a, b in pairwise(bounds)]

        limits = self.info.limits
        longest = [len(context) + len(told) for context, told in pairs]
        groups = _groups(longest, min(64, limits.max_request_sequences), limits.max_request_tokens)
        return [one for part in _run([lambda group=group: ask(group) for group in groups]) for one in part]  # type: ignore[misc]

    def _written(self, sample: Sample, ends: frozenset[int]) -> Written:
        ids = [int(token) for token in sample.token_ids_n]
        made = written(self.tokenizer, ids, ends)
        if sample.finish != "stop" or made.finish == "stop":
            return made
        body = ids[:-1]  # ended by an id of the teacher's own that is none of ours
        return Written(written(self.tokenizer, body, frozenset()).text, tuple(ids), len(body), "stop")


def _wanted(context: int, continuation: int) -> list[bool]:
    """Row t describes token t + 1: the rows of the continuation begin with the context's last."""
    return [False] * (context - 1) + [True] * continuation + [False]


def _groups(sizes: Sequence[int], most: int, tokens: int) -> Iterator[range]:
    """Neighbours that fit into one request; one that is too large is a request of its own, which is refused by name."""
    start, held = 0, 0
    for number, size in enumerate(sizes):
        if number > start and (number - start >= most or held + size > tokens):
            yield range(start, number)
            start, held = number, 0
        held += size
    if start < len(sizes):
        yield range(start, len(sizes))


def _run(calls: Sequence[Callable[[], Coroutine[Any, Any, Part]]]) -> list[Part]:
    """Makes calls on the event loop, a few at a time; their answers in order. The first error ends them all."""

    async def work() -> list[Part]:
        room = asyncio.Semaphore(CALLS)

        async def one(call: Callable[[], Coroutine[Any, Any, Part]]) -> Part:
            async with room:
                return await call()

        tasks = [asyncio.ensure_future(one(call)) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return event_loop.run(work())


@contextlib.contextmanager
def served_teacher(
    connection: Connection,
    tokenizers: Sequence[tuple[str, Any]],
    console: Console,
    *,
    template: str = "auto",
    kwargs: dict[str, Any] | None = None,
) -> Iterator[ServedTeacher]:
    """The teacher behind a connection, while the block runs.

    Args:
        connection: to its server.
        tokenizers: where each is from, and the tokenizer; one of them must be the teacher's.
        console: told of calls that are made again.
        template, kwargs: of its prompts.

    Raises:
        TeacherWireError: nobody answers, or no such teacher.
        ModelError: none of the tokenizers is the teacher's.
    """

    def tell(error: TeacherWireError) -> None:
        console.print(f"[yellow]teacher:[/] {escape(str(error))}; trying again", highlight=False)

    async def enter() -> tuple[TeacherClient, TeacherInfo]:
        client = connection.client(tell)
        try:
            return client, await connection.describe(client)
        except BaseException:
            await client.close()
            raise

    client, info = event_loop.run(enter())
    try:
        tokenizer = _its_own(info, tokenizers)
        prompter = Prompter(tokenizer, template, kwargs)
        told = prompter.template.source_sha256
        if told and info.chat_template_sha256 and told != info.chat_template_sha256:
            console.print(
                f"[yellow]note:[/] teacher {escape(info.name)} has another chat template than ours, and is asked by ours",
                highlight=False,
            )
        yield ServedTeacher(client, info, tokenizer, prompter)
    finally:
        event_loop.run(client.close())


def _its_own(info: TeacherInfo, tokenizers: Sequence[tuple[str, Any]]) -> Any:
    for _, tokenizer in tokenizers:
        if tokenizer_sha256(tokenizer.backend_tokenizer.to_str()) == info.tokenizer_sha256:
            return tokenizer
    tried = ", ".join(where for where, _ in tokenizers) or "none"
    raise ModelError(
        f"teacher {info.name!r} ({info.model}) has another tokenizer than {tried}, and its answers are ids: give the folder of its tokenizer "
        "(files alone, no weights) as --teacher-tokenizer"
    )
