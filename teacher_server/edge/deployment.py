"""The edge as a Serve deployment, and the teachers behind their Serve handles.

The only Ray in the edge. A Ray failure becomes an error of the wire here: a dead replica is UNAVAILABLE, not INTERNAL
(reliability.md 0.3), and a cancelled call cancels the replica's work (0.6). While replicas come, go or hold different
weights, a request is asked again until it meets one that can answer it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from teacher_server.config import EdgeConfig
from teacher_server.edge.server import EdgeServer
from teacher_server.metrics import Exported
from teacher_server.reporting import Reporter, node_address
from teacher_server.reports import EdgeReport, News, Plan
from teacher_server.status import as_seen_by
from teacher_server.teacher import application_of
from teacher_wire.errors import (
    CapabilityError,
    MismatchError,
    NotFoundError,
    OverloadedError,
    ServerError,
    TeacherWireError,
    UnavailableError,
)
from teacher_wire.generation import GenerateCall, Sample
from teacher_wire.messages import HeadHeader, ScoreCall, ServerStatus, TeacherInfo, TeacherSignals

log = logging.getLogger(__name__)

ASK_AGAIN_FOR_S = 10.0
_PAUSE_S = (0.02, 0.5)


class ServeTeachers:
    """A `TeacherService` over Serve handles, one for each teacher.

    Args:
        names: of the teachers, until news comes.
        find_handle: name -> handle; may block.
        ask_again_for_s: how long a request that met the wrong replica, or a dying one, is asked again.
    """

    def __init__(
        self,
        names: list[str],
        find_handle: Callable[[str], Any],
        ask_again_for_s: float = ASK_AGAIN_FOR_S,
    ) -> None:
        self._names = names
        self._find_handle = find_handle
        self._ask_again_for_s = ask_again_for_s
        self._handles: dict[str, Any] = {}
        self._weights: dict[str, tuple[TeacherInfo, ...]] = {}  # the newest first

    def take(self, news: News) -> None:
        """Follows added and removed teachers, and which weights live. A teacher without a replica keeps its last ones."""
        if news.plan is not None:
            self._names = list(news.plan.teachers)
            for gone in {*self._handles, *self._weights} - set(self._names):
                self._handles.pop(gone, None)
                self._weights.pop(gone, None)
        self._weights |= {name: infos for name, infos in news.weights.items() if name in self._names}

    async def describe(self) -> list[TeacherInfo]:
        return list(await asyncio.gather(*(self.info(name) for name in self._names)))

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        name = self._name(teacher)
        known = self._weights.get(name, ())
        for info in known:
            if fingerprint in ("", info.fingerprint):
                return info
        found = await _call((await self._handle(name, fingerprint)).info.remote())
        if name in self._names and (not known or found.fingerprint == fingerprint):
            self._weights[name] = (found, *known)
        return found

    async def score(self, call: ScoreCall) -> TeacherSignals:
        return await self._ask(call.teacher, call.fingerprint, lambda handle: handle.score.remote(call))

    async def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        handle = await self._handle(self._name(call.teacher), call.fingerprint)
        async for sample in _stream(handle.options(stream=True).generate.remote(call)):
            yield sample

    async def head_header(self, teacher: str, fingerprint: str) -> HeadHeader:
        return await self._ask(teacher, fingerprint, lambda handle: handle.head_header.remote(fingerprint))

    async def head_bytes(self, teacher: str, fingerprint: str, offset: int, size: int) -> bytes:
        return await self._ask(teacher, fingerprint, lambda handle: handle.head_bytes.remote(fingerprint, offset, size))

    async def _ask(self, teacher: str, fingerprint: str, ask: Callable[[Any], Any]) -> Any:
        """Asks until a replica with these weights answers, none is left that has them, or time is up."""
        name = self._name(teacher)
        give_up_s = time.monotonic() + self._ask_again_for_s
        mixed = False
        problem: TeacherWireError
        pause_s, longest_s = _PAUSE_S
        while True:
            pinned = fingerprint if mixed or len(self._weights.get(name, ())) > 1 else ""
            try:
                return await _call(ask(await self._handle(name, pinned)))
            except (MismatchError, CapabilityError) as error:
                if error.field != "fingerprint" or not self._lives(name, fingerprint):
                    raise
                mixed, problem = True, error
            except UnavailableError as error:
                problem = error
            if name not in self._names or time.monotonic() + pause_s > give_up_s:
                raise problem
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(longest_s, 2 * pause_s)

    def _lives(self, name: str, fingerprint: str) -> bool:
        return any(info.fingerprint == fingerprint for info in self._weights.get(name, ()))

    async def _handle(self, name: str, fingerprint: str = "") -> Any:
        """A handle; with a fingerprint, one that prefers replicas of these weights."""
        if name not in self._handles:
            try:
                self._handles[name] = await asyncio.to_thread(self._find_handle, name)
            except (RayError, RayServeException, OSError, RuntimeError) as error:  # TimeoutError is an OSError
                raise UnavailableError(
                    f"the teacher cannot be looked up: {type(error).__name__}", field="teacher", value=name
                ) from error
        handle = self._handles[name]
        return handle.options(multiplexed_model_id=fingerprint) if fingerprint else handle

    def _name(self, teacher: str) -> str:
        if not teacher and len(self._names) == 1:
            return self._names[0]
        if teacher not in self._names:
            raise NotFoundError(
                "no such teacher", field="teacher", value=teacher or "(none given)", limit="|".join(self._names)
            )
        return teacher


async def _call(response: Any) -> Any:
    """The value of a handle call; cancels it when we are cancelled, and translates its failures."""
    try:
        return await response
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and not task.cancelling():  # Serve's word for a call that its replica lost
            raise UnavailableError("the replica dropped the request") from None
        response.cancel()
        raise
    except RayTaskError as error:  # before TeacherWireError: Ray raises a class that is both
        if isinstance(error.cause, TeacherWireError):
            raise error.cause from None
        log.exception("a teacher failed")
        raise ServerError(f"{type(error.cause).__name__}: {error.cause}") from error
    except BackPressureError as error:
        raise OverloadedError("all replicas of this teacher are full", retry_after_s=1.0) from error
    except (RayError, RayServeException) as error:
        raise UnavailableError(f"a replica went away: {type(error).__name__}") from error


def _find_handle(name: str) -> DeploymentHandle:
    return serve.get_deployment_handle(name, application_of(name))


async def _stream(responses: Any) -> AsyncIterator[Any]:
    """The values of a streaming handle call, as `_call` gives one; cancels it when closed before its end."""
    try:
        async for value in responses:
            yield value
    except RayTaskError as error:
        if isinstance(error.cause, TeacherWireError):
            raise error.cause from None
        log.exception("a teacher failed")
        raise ServerError(f"{type(error.cause).__name__}: {error.cause}") from error
    except BackPressureError as error:
        raise OverloadedError("all replicas of this teacher are full", retry_after_s=1.0) from error
    except (RayError, RayServeException) as error:
        raise UnavailableError(f"a replica went away: {type(error).__name__}") from error
    finally:
        responses.cancel()  # no effect at its end


class Edge:
    """One edge on one node.

    Args:
        config_json: of the edge.
        plan: what is wanted now, in case the board cannot be asked when this edge is started again.
    """

    _reporter: Reporter | None = None

    async def __init__(self, config_json: str, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._plan = plan
        self._teachers = ServeTeachers(list(plan.teachers), _find_handle)
        self._server = EdgeServer(EdgeConfig.model_validate_json(config_json), self._teachers, self._status_for)
        self._server.set_tenants(plan.tenants, 1)
        replica = serve.get_replica_context().replica_id.unique_id
        self._node = await asyncio.to_thread(node_address)
        self._exported = Exported(edge=replica)
        self._reporter = Reporter(replica, self._report, self._take)
        await self._reporter.report()
        if not self._plan.open:
            await self._teachers.describe()  # at first, serving means: every teacher has answered
        await self._server.start()
        self._reporter.start()

    async def drain(self) -> None:
        await self._server.drain()

    async def counters(self) -> dict[str, Any]:
        return self._server.counters()

    async def _status_for(self, tenant: str) -> ServerStatus:
        assert self._reporter is not None
        return as_seen_by(await self._reporter.status(), tenant, self._plan.tenants)

    def _report(self) -> EdgeReport:
        counters = self._server.counters()
        self._exported.show(counters)
        return EdgeReport(self._node, counters)

    def _take(self, news: News) -> None:
        self._plan = news.plan or self._plan
        self._teachers.take(news)
        self._server.set_tenants(self._plan.tenants, news.edges)

    def __del__(self) -> None:
        """Called by Serve on the way out."""
        if self._reporter is not None:
            self._reporter.leave()
