"""The edge as a Serve deployment. In: config and plan; out: an open port. What it asks goes through `router`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from teacher_server.config.server import EdgeConfig
from teacher_server.edge.router import ServeTeachers
from teacher_server.edge.server import EdgeServer
from teacher_server.replica.deployment import application_of
from teacher_server.telemetry.heartbeat import Reporter, node_address
from teacher_server.telemetry.prometheus import Exported
from teacher_server.telemetry.records import EdgeReport, News, Plan
from teacher_server.telemetry.summary import as_seen_by
from teacher_wire.core.status import ServerStatus


def _find_handle(name: str) -> DeploymentHandle:
    return serve.get_deployment_handle(name, application_of(name))


class Edge:
    """One edge on one node.

    Args:
        config_json: of the edge.
        plan: what is wanted now, in case the cluster state cannot be asked when this edge is started again.
    """

    _reporter: Reporter | None = None

    async def __init__(self, config_json: str, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._plan = plan
        replica = serve.get_replica_context().replica_id.unique_id
        self._exported = Exported(edge=replica)
        self._teachers = ServeTeachers(list(plan.teachers), _find_handle, on_observe=self._exported.observe)
        self._server = EdgeServer(EdgeConfig.model_validate_json(config_json), self._teachers, self._status_for)
        self._server.set_tenants(plan.tenants, 1)
        self._server.publishing.take(News(plan, {}, 1))
        self._node = await asyncio.to_thread(node_address)
        self._reporter = Reporter(replica, self._report, self._take)
        await self._reporter.report()
        if not self._plan.open:
            await self._teachers.describe()  # at first, serving means: every teacher has answered
        await self._server.start()
        self._reporter.start()

    async def drain(self) -> None:
        await self._server.drain()

    async def counters(self) -> dict[str, Any]:
        return {**self._server.counters(), **self._teachers.counters()}

    async def _status_for(self, tenant: str) -> ServerStatus:
        assert self._reporter is not None
        return as_seen_by(await self._reporter.status(), tenant, self._plan.tenants)

    def _report(self) -> EdgeReport:
        counters = {**self._server.counters(), **self._teachers.counters()}
        self._exported.show(counters)
        return EdgeReport(self._node, counters)

    def _take(self, news: News) -> None:
        self._plan = news.plan or self._plan
        self._teachers.take(news)
        self._server.publishing.take(news)
        self._server.set_tenants(self._plan.tenants, news.edges)
        self._server.set_healthy({name: news.healthy.get(name, 0) > 0 for name in self._plan.teachers})

    def __del__(self) -> None:
        """Called by Serve on the way out."""
        if self._reporter is not None:
            self._reporter.leave()
