"""Computed once: between the wire and the teachers, by sequence. What is stored or under way is not asked for again.

In: a ScoreCall; out: its labels, of which only the sequences nobody has asked for cost a forward pass. A sequence is named by what
was asked about it (`label_store.label_keys`). Whoever asks first pays; whoever joins gets the same bytes, and if the first one's
request fails or is taken back, asks for itself.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from teacher_server.edge.admission import Admission
from teacher_wire.artifacts.messages import ArtifactCall, ArtifactHeader
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import TeacherSignals, Timing
from teacher_wire.core.tensor import Tensor
from teacher_wire.endpoint.servicer import TeacherService
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.labels.store import LabelStore, label_keys
from teacher_wire.score import codec
from teacher_wire.tokenizing.messages import TokenizeCall, TokenizedRow
from teacher_wire.transport.offload import Offload

_PAIR_BYTES = 100  # walking a pair of `have` takes as long as so many bytes of an array
_WRITERS = 16  # files of labels written at a time: an answer waits for its slowest file, not for all of them in turn


@dataclass
class SharingStats:
    """Sequences by where their labels came from, since the start; `unshared` were asked for with `cache: none`."""

    memory_hits: int = 0
    disk_hits: int = 0
    joined: int = 0
    computed: int = 0
    computed_tokens: int = 0
    unshared: int = 0


@dataclass
class _Flight:
    """One computation and those who wait for it.

    Attributes:
        labels: key -> its labels, when they are there.
        waiting: callers; the computation is taken back when the last one leaves.
        answer: of the teacher, once it came, in the order of `labels`; `answered` is of how many sequences.
    """

    labels: dict[str, asyncio.Future[TeacherSignals]]
    waiting: int = 0
    task: asyncio.Task[None] | None = None
    answer: TeacherSignals | None = None
    answered: int = 0


class LabelSharing:
    """A `TeacherService` in front of another one.

    Args:
        service: computes what is nowhere.
        admission: quotas; stored labels cost bytes and no tokens.
        memory_bytes: newest labels kept here.
        store: labels on disk, or None.
        offload: threads for long work; its own if not given.
    """

    def __init__(
        self,
        service: TeacherService,
        admission: Admission,
        *,
        memory_bytes: int,
        store: LabelStore | None = None,
        offload: Offload | None = None,
    ) -> None:
        self._service = service
        self._admission = admission
        self._memory = _Memory(memory_bytes)
        self._store = store
        self._offload = offload or Offload()
        self._writers = ThreadPoolExecutor(max_workers=_WRITERS, thread_name_prefix="label-store")
        self._flights: dict[str, _Flight] = {}
        self.stats = SharingStats()

    async def describe(self) -> list[TeacherInfo]:
        return await self._service.describe()

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        return await self._service.info(teacher, fingerprint)

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        return await self._service.artifact_header(call)

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        return await self._service.artifact_bytes(call, offset, size)

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        return await self._service.tokenize(call)

    async def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        """Samples as they come: chance makes each its own, so nothing is shared. Charged for what may be written, and
        settled at the end for what was."""
        with self._admission.writing(call.tenant, call.tokens) as written:
            written.tokens = await self._offload.run(call.tenant, _PAIR_BYTES * len(call.have), _prompt_tokens, call)
            samples, left = self._service.generate(call), call.samples
            try:
                async for sample in samples:
                    written.tokens += len(sample.token_ids_n)
                    left -= 1
                    written.whole = left == 0
                    yield sample
            finally:
                close = getattr(samples, "aclose", None)
                if close is not None:
                    await close()

    async def score(self, call: ScoreCall) -> TeacherSignals:
        info = await self._service.info(call.teacher, call.fingerprint)
        walked = _size_of(call.batch)
        size = await self._offload.run(call.tenant, walked, codec.reply_bytes, call, info)
        with self._admission.sending(call.tenant, size):
            return await self._score(call)

    async def _score(self, call: ScoreCall) -> TeacherSignals:
        # Whoever takes any weights may get others next time, and labels that nobody asks for again need no name: nothing to share.
        if not call.fingerprint or call.cache == "none":
            with self._admission.computing(call.tenant, call.batch.tokens):
                signals = await self._service.score(call)
            self.stats.unshared += call.batch.sequences if call.cache == "none" else 0
            return signals
        walked = _size_of(call.batch)
        keys, of_all = await self._offload.run(call.tenant, walked, _keys, call)
        bounds = call.batch.row_bounds_B1
        wanted = [sequence for sequence in range(call.batch.sequences) if bounds[sequence + 1] > bounds[sequence]]
        found: dict[int, TeacherSignals] = {}
        own: _Flight | None = None
        while len(found) < len(wanted):
            own = await self._round(call, keys, of_all, [s for s in wanted if s not in found], found) or own
        if own is not None and own.answer is not None and own.answered == len(wanted):
            return own.answer  # all of it, as it came
        timing = own.answer.timing if own and own.answer else Timing()
        parts = [found[sequence] for sequence in wanted]
        size = sum(part.payload_bytes for part in parts)
        return replace(await self._offload.run(call.tenant, size, _join, parts, call.fingerprint), timing=timing)

    async def _round(
        self,
        call: ScoreCall,
        keys: list[str],
        of_all: list[str],
        missing: list[int],
        found: dict[int, TeacherSignals],
    ) -> _Flight | None:
        """Takes what is there, joins what is under way, starts what is neither, and waits; the flight that was started."""
        joined: dict[int, _Flight] = {}
        checked_in_all: dict[int, TeacherSignals] = {}
        ours: list[int] = []
        for sequence in missing:
            kept = self._memory.get(keys[sequence])
            if kept is not None:
                found[sequence] = kept
                self.stats.memory_hits += 1
            elif of_all and (kept := self._memory.get(of_all[sequence])) is not None:
                checked_in_all[sequence] = kept
                self.stats.memory_hits += 1
            elif keys[sequence] in self._flights:
                joined[sequence] = self._flights[keys[sequence]]
            else:
                ours.append(sequence)
        own = (
            self._take_off(call, keys, ours) if ours else None
        )  # before anything is awaited: nobody else starts the same
        flights = {id(flight): flight for flight in (*joined.values(), *([own] if own else []))}.values()
        for flight in flights:
            flight.waiting += 1
        try:
            for sequence, kept in checked_in_all.items():
                found[sequence] = await self._offload.run(
                    call.tenant, _size_of(call.batch), _sampled, call.batch, sequence, kept
                )
            for sequence in ours:
                assert own is not None
                found[sequence] = await asyncio.shield(own.labels[keys[sequence]])
            for sequence, flight in joined.items():
                labels = await _of_another(flight.labels[keys[sequence]])
                if labels is not None:
                    found[sequence] = labels
                    self.stats.joined += flight is not own
        finally:
            for flight in flights:
                flight.waiting -= 1
                if not flight.waiting and flight.task is not None:
                    flight.task.cancel()  # no effect once it is done
        return own

    def _take_off(self, call: ScoreCall, keys: list[str], sequences: list[int]) -> _Flight:
        loop = asyncio.get_running_loop()
        flight = _Flight({keys[sequence]: loop.create_future() for sequence in sequences})
        for key in flight.labels:
            self._flights[key] = flight
        distinct: dict[str, int] = {}
        for sequence in sequences:
            distinct.setdefault(keys[sequence], sequence)
        flight.task = asyncio.create_task(self._fly(call, flight, distinct))
        return flight

    async def _fly(self, call: ScoreCall, flight: _Flight, sequences: dict[str, int]) -> None:
        try:
            await self._fetch(call, flight, sequences)
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            for label in flight.labels.values():
                if not label.done():
                    if cancelled:
                        label.cancel()
                    else:
                        label.set_exception(error)
                        label.exception()  # joined or not: no complaint about an error nobody took
            if cancelled or not isinstance(error, Exception):
                raise
        finally:
            for key in flight.labels:
                self._flights.pop(key, None)

    async def _fetch(self, call: ScoreCall, flight: _Flight, sequences: dict[str, int]) -> None:
        """Resolves every label of a flight, from disk or by a forward pass of the rest."""
        missing = dict(sequences)
        if self._store is not None:
            on_disk = await asyncio.get_running_loop().run_in_executor(self._writers, _read, self._store, call, missing)
            for key, labels in on_disk.items():
                self._land(flight, key, labels)
                del missing[key]
            self.stats.disk_hits += len(on_disk)
        if not missing:
            return
        offload, tenant = self._offload, call.tenant
        batch = await offload.run(tenant, _size_of(call.batch), call.batch.select, list(missing.values()))
        with self._admission.computing(tenant, batch.tokens):
            signals = await self._service.score(replace(call, batch=batch))
        self.stats.computed += len(missing)
        self.stats.computed_tokens += batch.tokens
        ours = signals.fingerprint == call.fingerprint  # else the student refuses it, and nobody else shall meet it
        if self._store is None or not ours:  # else another edge's labels may have been on disk first, and those count
            flight.answer, flight.answered = signals, len(missing)
        each = await offload.run(tenant, signals.payload_bytes, self._cut, signals, batch)
        if self._store is not None and ours:
            each = await asyncio.gather(
                *(
                    asyncio.get_running_loop().run_in_executor(
                        self._writers, self._keep, self._store, key, call, batch, place, labels
                    )
                    for place, (key, labels) in enumerate(zip(missing, each, strict=True))
                )
            )
        for key, labels in zip(missing, each, strict=True):
            self._land(flight, key, labels, keep=ours)

    def _cut(self, signals: TeacherSignals, batch: TokenBatch) -> list[TeacherSignals]:
        """The labels of each sequence."""
        return [_own_copy(labels) if self._memory.holds(labels) else labels for labels in signals.cut(batch)]

    @staticmethod
    def _keep(
        store: LabelStore, key: str, call: ScoreCall, batch: TokenBatch, place: int, labels: TeacherSignals
    ) -> TeacherSignals:
        """Those that are on disk then; they carry the fingerprint with which they were stored."""
        return store.keep(key, call.fingerprint, call.spec, batch.select([place]), labels)

    def _land(self, flight: _Flight, key: str, labels: TeacherSignals, *, keep: bool = True) -> None:
        if keep:
            self._memory.put(key, labels)
        if not flight.labels[key].done():
            flight.labels[key].set_result(labels)

    @property
    def memory_bytes(self) -> int:
        """Of the labels that are kept in memory."""
        return self._memory.held_bytes

    def counters(self) -> dict[str, Any]:
        """Hits and sizes, for status displays and tests."""
        disk = (
            {
                f"disk_{f.name}": getattr(self._store.stats, f.name)
                for f in fields(self._store.stats)
                if f.name != "trouble"
            }
            | {"disk_bytes": self._store.used_bytes, "trouble": self._store.trouble}
            if self._store
            else {}
        )
        own = {f.name: getattr(self.stats, f.name) for f in fields(self.stats)}
        return {**own, "memory_bytes": self._memory.held_bytes, "flights": len(self._flights), **disk}


async def _of_another(labels: asyncio.Future[TeacherSignals]) -> TeacherSignals | None:
    """What somebody else asked for; None if it failed there: then we ask ourselves, and meet our own error."""
    try:
        return await asyncio.shield(labels)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return None
    except TeacherWireError:
        return None


def _prompt_tokens(call: GenerateCall) -> int:
    """Tokens of the prompts of which samples are to be made."""
    left_B = np.full(call.prompts.prompts, call.spec.samples)
    for prompt, _ in call.have:
        left_B[prompt] -= 1
    return int(call.prompts.lengths_B[left_B > 0].sum())


def _size_of(batch: TokenBatch) -> int:
    """Bytes that are walked where a batch is hashed or copied."""
    return batch.token_ids_T.nbytes + (0 if batch.extra_ids_NM is None else batch.extra_ids_NM.nbytes)


def _join(parts: Sequence[TeacherSignals], fingerprint: str) -> TeacherSignals:
    """One answer of several parts; of another teacher if a part is, so that the student refuses it."""
    foreign = [part.fingerprint for part in parts if part.fingerprint != fingerprint]
    return replace(TeacherSignals.join(parts), fingerprint=foreign[0] if foreign else fingerprint)


def _keys(call: ScoreCall) -> tuple[list[str], list[str]]:
    """Names of the labels of each sequence; and, if a sample of rows is to be checked, of those that are checked in every row."""
    keys = label_keys(call.fingerprint, call.spec, call.batch)
    if call.spec.check == "all":
        return keys, []
    return keys, label_keys(call.fingerprint, replace(call.spec, check="all"), call.batch)


def _sampled(batch: TokenBatch, sequence: int, labels: TeacherSignals) -> TeacherSignals:
    """Labels of a sequence that are checked in every row, as if a sample of rows had been asked for."""
    return labels.sampled(batch.select([sequence]))


def _read(store: LabelStore, call: ScoreCall, sequences: dict[str, int]) -> dict[str, TeacherSignals]:
    """What is on disk; labels that are checked in every row serve where a sample is asked for too."""
    if call.spec.check == "all":
        found = {key: store.get(key) for key in sequences}
        return {key: labels for key, labels in found.items() if labels is not None}
    of_all = label_keys(call.fingerprint, replace(call.spec, check="all"), call.batch)
    found = {key: store.get(key, of_all[sequence]) for key, sequence in sequences.items()}
    return {key: _sampled(call.batch, sequences[key], labels) for key, labels in found.items() if labels is not None}


def _own_copy(labels: TeacherSignals) -> TeacherSignals:
    """The same labels in memory of their own: a slice keeps the whole answer alive, and Ray's shared memory with it."""
    tensors = {name: Tensor(tensor.dtype, tensor.array.copy()) for name, tensor in labels.tensors.items()}
    return TeacherSignals(tensors, labels.fingerprint)


class _Memory:
    """The newest labels, least recently used first out."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._labels: OrderedDict[str, TeacherSignals] = OrderedDict()
        self.held_bytes = 0

    def get(self, key: str) -> TeacherSignals | None:
        labels = self._labels.get(key)
        if labels is not None:
            self._labels.move_to_end(key)
        return labels

    def holds(self, labels: TeacherSignals) -> bool:
        """Whether labels of that size may be kept at all."""
        return _bytes_of(labels) <= self._max_bytes

    def put(self, key: str, labels: TeacherSignals) -> None:
        size = _bytes_of(labels)
        if key in self._labels or size > self._max_bytes:
            return
        self._labels[key] = labels
        self.held_bytes += size
        while self.held_bytes > self._max_bytes:
            self.held_bytes -= _bytes_of(self._labels.popitem(last=False)[1])


def _bytes_of(labels: TeacherSignals) -> int:
    return sum(tensor.array.nbytes for tensor in labels.tensors.values())
