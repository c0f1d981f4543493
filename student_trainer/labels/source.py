"""Where labels come from: the disk if they are there, else the teacher; what came is checked and on disk before anyone sees it.

In: requests of one signal; out: their labels in order, and how many of them cost the teacher nothing. The labels used are the
stored ones: of two processes that ask at the same time both train on the bytes of the first. Runs on the background loop;
disks are read and written in its threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from student_trainer.errors import OfflineError
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals, Timing
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore, label_keys

_SHOWN_NAMES = 3


@dataclass(frozen=True)
class LabelRequest:
    """One micro-batch to be labelled.

    Attributes:
        batch: its tokens and wanted rows.
        names: of its sequences, for errors.
        fresh: numbers of the sequences that were made for this step, about which nobody will ask again: their labels are not kept.
    """

    batch: TokenBatch
    names: tuple[str, ...]
    fresh: frozenset[int] = frozenset()

    def select(self, sequences: list[int]) -> LabelRequest:
        """These sequences alone."""
        fresh = frozenset(place for place, b in enumerate(sequences) if b in self.fresh)
        return LabelRequest(self.batch.select(sequences), tuple(self.names[b] for b in sequences), fresh)


@dataclass
class LabelUsage:
    """Sequences and tokens whose labels were there already, and those that the teacher was asked for."""

    disk_sequences: int = 0
    disk_tokens: int = 0
    teacher_sequences: int = 0
    teacher_tokens: int = 0

    def add(self, other: LabelUsage) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def sequences(self) -> int:
        return self.disk_sequences + self.teacher_sequences

    @property
    def tokens(self) -> int:
        return self.disk_tokens + self.teacher_tokens

    @property
    def disk_share(self) -> float:
        """Of the sequences; 0 if there were none."""
        return self.disk_sequences / max(1, self.sequences)


@dataclass(frozen=True)
class Labels:
    """The answer to a request, and what it took."""

    signals: TeacherSignals
    usage: LabelUsage


class LabelSource:
    """Labels by one signal of one teacher.

    Args:
        connect: makes the client; called on the loop, when something must be asked for the first time.
        info: the teacher.
        spec: which signal.
        check: raises LabelError for an answer that must not be learned from; what is on disk has passed it.
        store: labels on disk; None asks the teacher for everything.
        usage: a sum over several sources to count into.
    """

    def __init__(
        self,
        connect: Callable[[], TeacherClient],
        info: TeacherInfo,
        spec: SignalSpec,
        check: Callable[[TeacherSignals, LabelRequest], None],
        store: LabelStore | None = None,
        usage: LabelUsage | None = None,
    ) -> None:
        self._connect = connect
        self._info = info
        self._spec = spec
        self._check = check
        self._store = store
        self._usage = usage or LabelUsage()
        self._client: TeacherClient | None = None
        self._flights: dict[
            str, asyncio.Future[TeacherSignals]
        ] = {}  # asked for, or being looked up, and not yet on disk

    async def __aenter__(self) -> LabelSource:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._client is not None:
            await self._client.close()

    def reply_bytes(self, request: LabelRequest) -> int:
        """Payload bytes of the answer to `request`, wherever it comes from."""
        return self._spec.answer_bytes(request.batch, self._spec.shape_of(self._info))

    def peak_bytes(self, request: LabelRequest) -> int:
        """Host memory that the answer to `request` takes at most on its way: as it travels, joined from the parts that were kept, and as
        tensors that a device can copy from, where ids of two and three bytes become four.
        """
        wire, shape = self.reply_bytes(request), self._spec.shape_of(self._info)
        prepared = wire + request.batch.rows * sum(signal.widened_bytes(shape) for signal in self._spec.signals)
        return wire * (1 if self._store is None else 2) + prepared

    async def labels(self, request: LabelRequest) -> Labels:
        """The labels of `request`. Requests that began earlier ask for what both need, so every run asks the same.

        Raises:
            LabelError, TeacherWireError: as `TeacherClient.score` and the check raise them.
        """
        if 0 < len(request.fresh) < request.batch.sequences:
            return await self._mixed(request)
        if self._store is None or request.fresh:
            signals = await self._ask(request.batch, fresh=bool(request.fresh))
            await asyncio.to_thread(self._check, signals, request)
            found = Labels(signals, LabelUsage(0, 0, request.batch.sequences, request.batch.tokens))
        else:
            found = await self._from_store(self._store, request)
        self._usage.add(found.usage)
        return found

    async def _mixed(self, request: LabelRequest) -> Labels:
        """Labels of fresh sequences and of others, asked for side by side."""
        every = range(request.batch.sequences)
        parts = [[b for b in every if b in request.fresh], [b for b in every if b not in request.fresh]]
        asked = [request.select(part) for part in parts]
        answers = await asyncio.gather(*(self.labels(part) for part in asked))
        usage = LabelUsage()
        found: dict[int, TeacherSignals] = {}
        for part, one, answer in zip(parts, asked, answers, strict=True):
            usage.add(answer.usage)
            found.update(zip(part, answer.signals.cut(one.batch), strict=True))
        bounds = request.batch.row_bounds_B1.tolist()
        labelled = [found[b] for b in every if bounds[b + 1] > bounds[b]]
        signals = TeacherSignals.join(labelled)
        return Labels(replace(signals, fingerprint=self._info.fingerprint, timing=answers[0].signals.timing), usage)

    async def has(self, request: LabelRequest) -> bool:
        """Whether all labels of `request` are on disk."""
        if self._store is None or request.fresh:
            return False
        keys = label_keys(self._info.fingerprint, self._spec, request.batch)
        found = await asyncio.to_thread(
            self._look_up, self._store, request.batch, {key: b for b, key in enumerate(keys)}
        )
        return None not in found.values()

    async def keep(self, request: LabelRequest, answer: TeacherSignals) -> None:
        """Checks and keeps the labels of `request` that somebody else has asked for, and counts them as asked."""
        if self._store is None or request.fresh:
            await asyncio.to_thread(self._check, answer, request)
        else:
            keys = label_keys(self._info.fingerprint, self._spec, request.batch)
            await asyncio.to_thread(self._keep, self._store, keys, request, answer)
        self._usage.add(LabelUsage(0, 0, request.batch.sequences, request.batch.tokens))

    async def _from_store(self, store: LabelStore, request: LabelRequest) -> Labels:
        batch = request.batch
        keys = label_keys(self._info.fingerprint, self._spec, batch)
        bounds = batch.row_bounds_B1.tolist()
        labelled = [b for b in range(batch.sequences) if bounds[b + 1] > bounds[b]]  # others have no labels
        own: dict[str, int] = {}
        for b in labelled:
            if keys[b] not in self._flights:
                own.setdefault(keys[b], b)
        of_others = {keys[b]: self._flights[keys[b]] for b in labelled if keys[b] not in own}
        timing, asked = Timing(), LabelUsage()
        async with self._claimed(own) as flights:
            found = await asyncio.to_thread(self._look_up, store, batch, own)
            for key, signals in found.items():
                if signals is not None:
                    flights[key].set_result(signals)
            missing = {key: b for key, b in own.items() if found[key] is None}
            if missing:
                part = request.select(list(missing.values()))
                try:
                    answer = await self._ask(part.batch)
                except OfflineError as error:  # a file that was there before step 0 is damaged, or was deleted since
                    raise OfflineError(f"{', '.join(part.names[:_SHOWN_NAMES])}: {error}") from error
                kept = await asyncio.to_thread(self._keep, store, list(missing), part, answer)
                for key, signals in kept.items():
                    flights[key].set_result(signals)
                timing = answer.timing
                asked = LabelUsage(teacher_sequences=len(missing), teacher_tokens=part.batch.tokens)
            ready = {key: flight.result() for key, flight in flights.items()}
        for key, flight in of_others.items():
            ready[key] = await asyncio.shield(flight)  # ours may be cancelled, theirs must not
        signals = TeacherSignals.join([ready[keys[b]] for b in labelled])
        lengths = batch.lengths_B
        asked.disk_sequences = len(labelled) - asked.teacher_sequences
        asked.disk_tokens = int(lengths[labelled].sum()) - asked.teacher_tokens
        return Labels(replace(signals, fingerprint=self._info.fingerprint, timing=timing), asked)

    def _look_up(self, store: LabelStore, batch: TokenBatch, keys: dict[str, int]) -> dict[str, TeacherSignals | None]:
        """What is on disk of these sequences, by key; labels that are checked in every row serve where a sample is asked for too."""
        if self._spec.check == "all":
            return {key: store.get(key) for key in keys}
        of_all = label_keys(self._info.fingerprint, replace(self._spec, check="all"), batch)
        kept = {key: store.get(key, of_all[b]) for key, b in keys.items()}
        return {key: labels and labels.sampled(batch.select([keys[key]])) for key, labels in kept.items()}

    @contextlib.asynccontextmanager
    async def _claimed(self, keys: dict[str, int]) -> AsyncIterator[dict[str, asyncio.Future[TeacherSignals]]]:
        """Promises of the labels under `keys`, for whoever needs them too while the block runs."""
        loop = asyncio.get_running_loop()
        flights: dict[str, asyncio.Future[TeacherSignals]] = {key: loop.create_future() for key in keys}
        self._flights.update(flights)
        try:
            yield flights
        except BaseException as error:
            for flight in flights.values():
                if not flight.done():
                    flight.set_exception(error) if isinstance(error, Exception) else flight.cancel()
                if not flight.cancelled():
                    flight.exception()  # nobody else may have needed it
            raise
        finally:
            for key in flights:
                del self._flights[key]

    async def _ask(self, batch: TokenBatch, *, fresh: bool = False) -> TeacherSignals:
        if self._client is None:
            self._client = self._connect()
        if fresh:  # a step waits for them, and nobody else will ask for them
            return await self._client.score(self._info, self._spec, batch, cache="none", latency="interactive")
        return await self._client.score(self._info, self._spec, batch)

    def _keep(
        self, store: LabelStore, keys: list[str], asked: LabelRequest, answer: TeacherSignals
    ) -> dict[str, TeacherSignals]:
        """Checks an answer and keeps each of its sequences; what is on disk now, maybe another process's."""
        self._check(answer, asked)
        fingerprint, spec = self._info.fingerprint, self._spec
        kept = {}
        bounds = asked.batch.row_bounds_B1.tolist()
        for b, (key, part) in enumerate(zip(keys, answer.cut(asked.batch), strict=True)):
            if bounds[b + 1] > bounds[b]:
                kept[key] = store.keep(key, fingerprint, spec, asked.batch.select([b]), part)
        return kept
