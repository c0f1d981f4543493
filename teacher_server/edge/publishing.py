"""Publications at an edge: who may, one at a time, within bounds; then the wait until `up` has deployed what came.

In: publications and news; out: a revision on the disk that `up` sees, and word of how it goes. It deploys nothing itself: what is
wanted is a file beside the revisions, so that a publication outlives the call, the edge and `up`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from teacher_server.config.publish import PublishConfig
from teacher_server.publishing.blueprint import Blueprint
from teacher_server.publishing.receiving import Receiving
from teacher_server.publishing.revisions import Revisions
from teacher_server.telemetry.records import News, TeacherPlan
from teacher_wire.core.errors import (
    CapabilityError,
    ForbiddenError,
    LimitError,
    MismatchError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from teacher_wire.core.info import TeacherInfo
from teacher_wire.publish.messages import Publication

_LOOK_S = 0.2
_TELL_S = 1.0
_DEPLOY_S = 3600.0
_RETRY_S = 2.0
_Result = TypeVar("_Result")


class Publishing:
    """Takes revisions; a `PublishService`."""

    def __init__(self) -> None:
        self.closed = False
        self._plans: Mapping[str, TeacherPlan] = {}
        self._weights: dict[str, tuple[TeacherInfo, ...]] = {}
        self._tenants: set[str] = set()  # that publish now

    def take(self, news: News) -> None:
        """Follows what is deployed, what lives, and who may publish."""
        if news.plan is not None:
            self._plans = news.plan.teachers
        self._weights |= news.weights

    @contextlib.asynccontextmanager
    async def receive(self, publication: Publication) -> AsyncGenerator[_Incoming, None]:
        """Lets a tenant begin, or refuses.

        Raises:
            NotFoundError, CapabilityError, ForbiddenError, LimitError, MismatchError, RequestError: it can never be.
            OverloadedError, UnavailableError: it cannot be now.
        """
        name, tenant = self._name(publication.teacher), publication.tenant
        plan = self._plans[name]
        settings, blueprint = await self._fitting(name, plan, publication)
        if tenant in self._tenants:
            raise OverloadedError(
                "a tenant publishes one revision at a time",
                field="tenant",
                value=tenant,
                limit=1,
                retry_after_s=_RETRY_S,
            )
        self._tenants.add(tenant)
        try:
            revisions = Revisions.of(settings, name)
            with contextlib.ExitStack() as stack:
                if not await _to_its_end(stack.enter_context, revisions.locked()):
                    raise OverloadedError(
                        "another revision of this teacher is being published", field="teacher", value=name, limit=1,
                        retry_after_s=_RETRY_S,
                    )  # fmt: skip
                receiving = await _to_its_end(Receiving, publication, revisions, blueprint, settings)
                stack.callback(receiving.close)
                yield _Incoming(self, _Revision(name, publication.revision, plan.model), receiving, revisions, settings)
        finally:
            self._tenants.discard(tenant)

    async def check(self, publication: Publication) -> None:
        """Refuses as `receive` what can be seen before a byte has come."""
        name = self._name(publication.teacher)
        await self._fitting(name, self._plans[name], publication)

    async def _fitting(self, name: str, plan: TeacherPlan, publication: Publication) -> tuple[PublishConfig, Blueprint]:
        settings = self._allowed(name, plan, publication)
        blueprint = await asyncio.to_thread(Blueprint.read, Revisions.of(settings, name))
        if blueprint is None or blueprint.model != plan.model:
            raise UnavailableError("the server does not see the folder of its revisions yet", field="publish.folder")
        blueprint.check_config(publication.config_json)
        return settings, blueprint

    def _name(self, teacher: str) -> str:
        if not teacher and len(self._plans) == 1:
            return next(iter(self._plans))
        if teacher not in self._plans:
            raise NotFoundError(
                "no such teacher", field="teacher", value=teacher or "(none given)", limit="|".join(self._plans)
            )
        return teacher

    def _allowed(self, name: str, plan: TeacherPlan, publication: Publication) -> PublishConfig:
        self.check_open()
        settings = plan.publish
        if settings is None:
            raise CapabilityError(
                "this teacher takes no revisions: its section of server.yaml has no publish",
                field="publish",
                value=name,
            )
        if publication.tenant not in settings.tenants:
            raise ForbiddenError(
                f"this tenant is not among those that may publish revisions of teacher {name}", field="publish.tenants",
                value=publication.tenant or "(without a name)",
            )  # fmt: skip
        if publication.bytes > settings.max_bytes:
            raise LimitError("too large", field="publish.max_gb", value=publication.bytes, limit=settings.max_bytes)
        known = self._weights.get(name, ())
        if not known:
            raise UnavailableError("no replica of this teacher has come up yet", field="teacher", value=name)
        if publication.tokenizer_sha256 != known[0].tokenizer_sha256:
            raise MismatchError(
                "another tokenizer than the teacher's", field="tokenizer_sha256", value=publication.tokenizer_sha256,
                limit=known[0].tokenizer_sha256,
            )  # fmt: skip
        return settings

    def check_open(self) -> None:
        """Raises UnavailableError once the edge is going down."""
        if self.closed:
            raise UnavailableError("the server is going down")

    def plan(self, name: str) -> TeacherPlan | None:
        """What is known of a teacher's deployment."""
        return self._plans.get(name)

    def live(self, name: str, revision: str) -> str:
        """The fingerprint of the newest weights of a teacher, if they are of that revision; else empty."""
        known = self._weights.get(name, ())
        return known[0].fingerprint if known and known[0].revision == revision else ""


@dataclass(frozen=True)
class _Revision:
    """Which revision of which teacher, and of which model of its config."""

    teacher: str
    name: str
    model: str


class _Incoming:
    """See `teacher_wire.publish.servicer.Incoming`."""

    def __init__(
        self, edge: Publishing, revision: _Revision, receiving: Receiving, revisions: Revisions, settings: PublishConfig
    ) -> None:
        self._edge = edge
        self._revision = revision
        self._receiving = receiving
        self._revisions = revisions
        self._settings = settings
        self._until_s = time.monotonic() + settings.upload_s
        self.have = receiving.have

    async def write(self, file: int, data: bytes) -> None:
        self._edge.check_open()
        if time.monotonic() > self._until_s:
            raise UnavailableError(
                "the files do not come in time; what came is kept for the next call", field="publish.upload_s",
                limit=self._settings.upload_s,
            )  # fmt: skip
        await _to_its_end(self._receiving.write, file, data)

    async def finish(self) -> None:
        await _to_its_end(self._finish)

    def _finish(self) -> None:
        self._receiving.finish()
        self._revisions.want(self._revision.model, self._revision.name)

    async def deployed(self, tell: Callable[[str], Awaitable[None]]) -> str:
        until_s, told_s = time.monotonic() + _DEPLOY_S, 0.0
        while time.monotonic() < until_s:
            self._edge.check_open()
            if fingerprint := self._edge.live(self._revision.teacher, self._revision.name):
                return fingerprint
            plan = self._edge.plan(self._revision.teacher)
            if plan is None or plan.model != self._revision.model:
                raise UnavailableError("the server's config has changed", field="teacher", value=self._revision.teacher)
            wanted = await asyncio.to_thread(self._revisions.wanted, self._revision.model)
            if self._revision.name not in wanted:
                why = await asyncio.to_thread(self._revisions.given_up, self._revision.name)
                if not why:
                    raise UnavailableError(
                        "it was deleted as too old meanwhile", field="revision", value=self._revision.name
                    )
                raise ServerError(
                    f"it cannot come up, the revision before stays: {why}", field="revision", value=self._revision.name
                )
            if time.monotonic() - told_s > _TELL_S:
                told_s = time.monotonic()
                await tell(f"{plan.state}, {plan.replicas} of {plan.replicas_wanted} replicas")
            await asyncio.sleep(_LOOK_S)
        raise UnavailableError("not deployed in time: is teacher-server up away?", field="teacher", limit=_DEPLOY_S)


async def _to_its_end(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """What work in a thread returns; a publisher who leaves does not tear it in two.

    The cancellation is raised once the work is done, however often it is asked for: a thread cannot be stopped, and the lock of the teacher
    must not be released beside it. So a revision that has got its name is also wanted.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        task.exception()  # nobody is left to hear of it
        raise
