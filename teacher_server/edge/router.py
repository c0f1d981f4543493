"""The teachers behind their Serve handles: one way for every call to find a replica, be asked again, and end in one error table.

A Ray failure becomes an error of the wire here: a dead replica is UNAVAILABLE, not INTERNAL, and a cancelled
call cancels the replica's work (0.6). While replicas come, go or hold different weights, a request is asked again until it
meets one that can answer it; a Generate call takes its samples so far along, so that none is written twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from teacher_server.telemetry.latency import Latencies
from teacher_server.telemetry.records import News
from teacher_wire.artifacts.messages import ArtifactCall, ArtifactHeader
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import (
    CapabilityError,
    MismatchError,
    NotFoundError,
    OverloadedError,
    ServerError,
    TeacherWireError,
    UnavailableError,
)
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.tokenizing.messages import TokenizeCall, TokenizedRow

log = logging.getLogger(__name__)

ASK_AGAIN_FOR_S = 10.0
_PAUSE_S = (0.02, 0.5)


class ServeTeachers:
    """A `TeacherService` over Serve handles, one for each teacher.

    Args:
        names: of the teachers, until news comes.
        find_handle: name -> handle; may block.
        ask_again_for_s: how long a request that met the wrong replica, or a dying one, is asked again; a Generate call,
            since its last sample.
        on_observe: told how long answers take: stage, seconds, and the teacher as a tag.
    """

    def __init__(
        self,
        names: list[str],
        find_handle: Callable[[str], Any],
        ask_again_for_s: float = ASK_AGAIN_FOR_S,
        on_observe: Callable[..., None] | None = None,
    ) -> None:
        self._names = names
        self._find_handle = find_handle
        self._ask_again_for_s = ask_again_for_s
        self._on_observe = on_observe
        self._latencies: dict[str, Latencies] = {}  # by teacher
        self._handles: dict[str, Any] = {}
        self._weights: dict[str, tuple[TeacherInfo, ...]] = {}  # the newest first
        self._retries: Counter[str] = Counter()  # by teacher

    def take(self, news: News) -> None:
        """Follows added and removed teachers, and which weights live. A teacher without a replica keeps its last ones."""
        if news.plan is not None:
            self._names = list(news.plan.teachers)
            tables: tuple[dict[str, Any], ...] = (self._handles, self._weights, self._retries, self._latencies)
            for gone in {name for table in tables for name in table} - set(self._names):
                for table in tables:
                    table.pop(gone, None)
        self._weights |= {name: infos for name, infos in news.weights.items() if name in self._names}

    def counters(self) -> dict[str, Any]:
        """Attempts beyond the first, since the start, and how long answers took, by teacher."""
        latency = {name: latencies.counters() for name, latencies in self._latencies.items()}
        return {"retries": dict(self._retries), "latency": latency}

    def _observe(self, name: str, stage: str, started: float) -> None:
        if name not in self._latencies:
            told = self._on_observe
            self._latencies[name] = Latencies(None if told is None else partial(told, teacher=name))
        self._latencies[name].observe(stage, time.monotonic() - started)

    async def describe(self) -> list[TeacherInfo]:
        return list(await asyncio.gather(*(self.info(name) for name in self._names)))

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        name = self._name(teacher)
        known = self._weights.get(name, ())
        for info in known:
            if fingerprint in ("", info.fingerprint):
                return info
        found: TeacherInfo = await self._ask(name, "", lambda handle: _of_weights(handle, fingerprint).info.remote())
        if name in self._names and (not known or found.fingerprint == fingerprint):
            self._weights[name] = (found, *known)
        return found

    async def score(self, call: ScoreCall) -> TeacherSignals:
        started = time.monotonic()
        signals: TeacherSignals = await self._ask(
            call.teacher, call.fingerprint, lambda handle: handle.score.remote(call)
        )
        for stage in ("first_chunk", "whole"):  # an answer comes in one piece; what follows is the student's reading
            self._observe(self._name(call.teacher), f"interactive_{stage}" if call.interactive else stage, started)
        return signals

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Sample, None]:
        """Samples as they finish, each once and all of the same weights, from as many replicas as it takes."""
        started = time.monotonic()
        named = bool(call.fingerprint)
        if not named:  # whoever takes any weights takes the newest, and those to the end
            call = replace(call, fingerprint=(await self.info(call.teacher)).fingerprint)
        attempts = _Attempts(self, call.teacher, call.fingerprint)
        have, whole = set(call.have), call.prompts.prompts * call.spec.samples
        while len(have) < whole:
            try:
                handle = await self._handle(attempts.name, attempts.pinned)
                asked = replace(call, have=frozenset(have)) if len(have) > len(call.have) else call
                samples = _values(handle.options(stream=True).generate.remote(asked))
                async with contextlib.aclosing(samples):
                    async for sample in samples:
                        if len(have) == len(call.have):
                            self._observe(attempts.name, "first_chunk", started)
                        have.add((sample.prompt, sample.index))
                        attempts.progressed()
                        yield sample
                if len(have) < whole:
                    raise UnavailableError(
                        "a replica ended a call early", field="samples", value=len(have), limit=whole
                    )
            except TeacherWireError as error:
                if len(have) == whole:  # only the word that this was all got lost
                    break
                try:
                    await attempts.after(error)
                except MismatchError as final:
                    if named:
                        raise
                    raise UnavailableError("the teacher's weights were replaced; ask the new ones") from final
        self._observe(attempts.name, "whole", started)

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        header: ArtifactHeader = await self._ask(
            call.teacher, call.fingerprint, lambda handle: handle.artifact_header.remote(call)
        )
        return header

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        data: bytes = await self._ask(
            call.teacher, call.fingerprint, lambda handle: handle.artifact_bytes.remote(call, offset, size)
        )
        return data

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        started = time.monotonic()
        rows: list[TokenizedRow] = await self._ask(
            call.teacher, call.fingerprint, lambda handle: handle.tokenize.remote(call)
        )
        self._observe(self._name(call.teacher), "tokenize", started)
        return rows

    async def _ask(self, teacher: str, fingerprint: str, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        """The value of a call at the first replica that gives one."""
        attempts = _Attempts(self, teacher, fingerprint)
        while True:
            try:
                return await _value(ask(await self._handle(attempts.name, attempts.pinned)))
            except TeacherWireError as error:
                await attempts.after(error)

    async def _handle(self, name: str, fingerprint: str = "") -> Any:
        """A handle; with a fingerprint, one that prefers replicas of these weights.

        Raises:
            UnavailableError: Serve knows no such deployment (yet, or any more).
        """
        if name not in self._handles:
            try:
                self._handles[name] = await asyncio.to_thread(self._find_handle, name)
            except Exception as error:  # Serve raises its own, Ray's, and bare ValueError and KeyError here
                raise UnavailableError(
                    f"teacher {name!r} is not deployed: {type(error).__name__}", field="teacher", value=name
                ) from error
        return _of_weights(self._handles[name], fingerprint)

    def _name(self, teacher: str) -> str:
        if not teacher and len(self._names) == 1:
            return self._names[0]
        if teacher not in self._names:
            raise NotFoundError(
                "no such teacher", field="teacher", value=teacher or "(none given)", limit="|".join(self._names)
            )
        return teacher


class _Attempts:
    """What follows a failed attempt of one call: another one after a pause, or the error.

    Args:
        teachers: which weights live, and who is still served.
        teacher: as the call names it.
        fingerprint: of the weights that may answer, or "".

    Attributes:
        name: of the teacher.
    """

    def __init__(self, teachers: ServeTeachers, teacher: str, fingerprint: str) -> None:
        self._teachers = teachers
        self._fingerprint = fingerprint
        self.name = teachers._name(teacher)
        self._mixed = False
        self.progressed()

    @property
    def pinned(self) -> str:
        """The fingerprint by which to choose a replica, once replicas are known to differ."""
        several = len(self._teachers._weights.get(self.name, ())) > 1
        return self._fingerprint if self._mixed or several else ""

    def progressed(self) -> None:
        """Something came: the clock starts anew."""
        self._give_up_s = time.monotonic() + self._teachers._ask_again_for_s
        self._pause_s = _PAUSE_S[0]

    async def after(self, error: TeacherWireError) -> None:
        """Waits before the next attempt.

        Raises:
            TeacherWireError: `error`, if no other attempt can mend it or time is up.
        """
        if isinstance(error, MismatchError | CapabilityError):
            lives = any(i.fingerprint == self._fingerprint for i in self._teachers._weights.get(self.name, ()))
            if error.field != "fingerprint" or not lives:
                raise error
            self._mixed = True
        elif not isinstance(error, UnavailableError):
            raise error
        if self.name not in self._teachers._names or time.monotonic() + self._pause_s > self._give_up_s:
            raise error
        self._teachers._retries[self.name] += 1
        await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(_PAUSE_S[1], 2 * self._pause_s)


def _of_weights(handle: Any, fingerprint: str) -> Any:
    """A handle that prefers replicas of these weights; the same one if there is no fingerprint."""
    return handle.options(multiplexed_model_id=fingerprint) if fingerprint else handle


async def _value(response: Any) -> Any:
    """The value of a handle call; cancels it when we are cancelled."""
    with _translated():
        try:
            return await response
        except asyncio.CancelledError:
            if _we_are_cancelled():
                response.cancel()
            raise


async def _values(responses: Any) -> AsyncGenerator[Any, None]:
    """The values of a streaming handle call; cancels it when closed before its end."""
    try:
        with _translated():
            async for value in responses:
                yield value
    finally:
        responses.cancel()  # no effect at its end


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What Ray and Serve raise, as errors of the wire."""
    try:
        yield
    except asyncio.CancelledError:
        if not _we_are_cancelled():  # Serve's word for a call that its replica lost
            raise UnavailableError("the replica dropped the request") from None
        raise
    except RayTaskError as error:  # before TeacherWireError: Ray raises a class that is both
        if isinstance(error.cause, TeacherWireError):
            raise error.cause from None
        if isinstance(error.cause, asyncio.CancelledError):
            raise UnavailableError("the replica dropped the request") from None
        log.exception("a teacher failed")
        raise ServerError(f"{type(error.cause).__name__}: {error.cause}") from error
    except BackPressureError as error:
        raise OverloadedError("all replicas of this teacher are full", retry_after_s=1.0) from error
    except (RayError, RayServeException) as error:
        raise UnavailableError(f"a replica went away: {type(error).__name__}") from error


def _we_are_cancelled() -> bool:
    """Whether this task was asked to stop; Ray raises CancelledError for reasons of its own too."""
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())
