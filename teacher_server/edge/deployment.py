"""The edge as a Serve deployment, and the teachers behind their Serve handles.

The only Ray in the edge. A Ray failure becomes an error of the wire here: a dead replica is UNAVAILABLE, not INTERNAL
(reliability.md 0.3), and a cancelled call cancels the replica's work (0.6).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from teacher_server.config import EdgeConfig
from teacher_server.edge.server import EdgeServer
from teacher_wire.errors import NotFoundError, OverloadedError, ServerError, TeacherWireError, UnavailableError
from teacher_wire.generation import GenerateCall, Sample
from teacher_wire.messages import HeadHeader, ScoreCall, TeacherInfo, TeacherSignals

log = logging.getLogger(__name__)


class ServeTeachers:
    """A `TeacherService` over Serve handles, one for each teacher."""

    def __init__(self, handles: dict[str, DeploymentHandle]) -> None:
        self._handles = handles
        self._infos: dict[str, TeacherInfo] = {}

    async def describe(self) -> list[TeacherInfo]:
        found = await asyncio.gather(*(_call(handle.info.remote()) for handle in self._handles.values()))
        self._infos = {info.name: info for info in found}
        return list(found)

    async def info(self, teacher: str) -> TeacherInfo:
        name = self._name(teacher)
        if name not in self._infos:
            await self.describe()
        return self._infos[name]

    async def score(self, call: ScoreCall) -> TeacherSignals:
        return await _call(self._handles[self._name(call.teacher)].score.remote(call))

    def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        handle = self._handles[self._name(call.teacher)].options(stream=True)
        return _stream(handle.generate.remote(call))

    async def head_header(self, teacher: str, fingerprint: str) -> HeadHeader:
        return await _call(self._handles[self._name(teacher)].head_header.remote(fingerprint))

    async def head_bytes(self, teacher: str, fingerprint: str, offset: int, size: int) -> bytes:
        return await _call(self._handles[self._name(teacher)].head_bytes.remote(fingerprint, offset, size))

    def _name(self, teacher: str) -> str:
        if not teacher and len(self._handles) == 1:
            return next(iter(self._handles))
        if teacher not in self._handles:
            raise NotFoundError(
                "no such teacher", field="teacher", value=teacher or "(none given)", limit="|".join(self._handles)
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
    """One edge on one node, with the handles of its teachers in the order of `names`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config_json: str, names: list[str], *handles: DeploymentHandle
    ) -> None:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        service = ServeTeachers(dict(zip(names, handles, strict=True)))
        self._server = EdgeServer(EdgeConfig.model_validate_json(config_json), service)
        await service.describe()  # serving means: every teacher has answered
        await self._server.start()

    async def drain(self) -> None:
        await self._server.drain()

    async def counters(self) -> dict[str, int]:
        return self._server.counters()
