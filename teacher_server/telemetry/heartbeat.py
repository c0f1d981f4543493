"""The cluster state as a Ray actor, and the task by which a replica or an edge talks to it once a second.

In: what to report; out: News. A cluster state that is away, slow or new never hurts whoever reports: it goes on with its last news.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from teacher_server.telemetry.cluster_state import ClusterState
from teacher_server.telemetry.records import EdgeReport, Held, News, ReplicaReport
from teacher_wire.core.errors import UnavailableError
from teacher_wire.core.status import ServerStatus

log = logging.getLogger(__name__)

NAMESPACE = "lyceum"
STATE_NAME = "cluster_state"
REPORT_EVERY_S = 1.0
_ANSWER_S = 2.0
_LEFT_ANSWER_S = 5.0  # of a cluster state that was left
_WATCH_S = 6.0  # in which an `up` that lives has posted
_STATE_START_S = 60.0  # its process has to come up first


def start_cluster_state(owner: str) -> tuple[Any, Held | None]:
    """Makes the cluster state on this node, or takes over the one that an `up` before left on this cluster.

    Args:
        owner: who may post from now on; unique.

    Returns:
        The cluster state, and what the `up` before had deployed, if there was one.

    Raises:
        ValueError: another `up` lives.
    """
    try:
        left = ray.get_actor(STATE_NAME, NAMESPACE)
    except ValueError:
        return _new_cluster_state(owner), None
    try:
        seen = ray.get(left.posts.remote(), timeout=_LEFT_ANSWER_S)
        until_s = time.monotonic() + _WATCH_S
        while time.monotonic() < until_s:
            time.sleep(0.5)
            if ray.get(left.posts.remote(), timeout=_LEFT_ANSWER_S) != seen:
                raise ValueError("another teacher-server up serves this cluster")
        return left, ray.get(left.claim.remote(owner), timeout=_LEFT_ANSWER_S)
    except RayError:  # of a machine that is gone
        remove_cluster_state()
        return _new_cluster_state(owner), None


def _new_cluster_state(owner: str) -> Any:
    """It outlives us on a cluster that stays, so that status goes on and the next `up` finds what runs; other nodes may die."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(ClusterState)
    options = {"name": STATE_NAME, "namespace": NAMESPACE, "scheduling_strategy": here, "lifetime": "detached"}
    cluster_state = actor.options(**options).remote()
    ray.get(cluster_state.claim.remote(owner), timeout=_STATE_START_S)
    return cluster_state


def remove_cluster_state() -> None:
    """Takes the cluster state away."""
    with contextlib.suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(STATE_NAME, NAMESPACE))


def node_address() -> str:
    """The address by which the Ray cluster knows this node."""
    here = ray.get_runtime_context().get_node_id()
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)


class Reporter:
    """One source on the cluster state.

    Args:
        source: unique among all that ever reported.
        make: the report of this moment.
        take: told the news, at once in the running event loop.
    """

    def __init__(
        self, source: str, make: Callable[[], ReplicaReport | EdgeReport], take: Callable[[News], None]
    ) -> None:
        self._source = source
        self._make = make
        self._take = take
        self._cluster_state: Any = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins reporting, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    def leave(self) -> None:
        """Says goodbye without waiting for an answer."""
        if self._task is not None:
            self._task.cancel()
        if self._cluster_state is not None:
            self._cluster_state.leave.remote(self._source)
            self._cluster_state = None

    async def report(self) -> bool:
        """Reports once; whether the cluster state answered."""
        try:
            cluster_state = await self._find()
            async with asyncio.timeout(_ANSWER_S):
                news = await cluster_state.report.remote(self._source, self._make())
        except (RayError, ValueError, TimeoutError) as error:
            self._cluster_state = None
            log.debug("the cluster state does not answer: %s", error)
            return False
        self._take(news)
        return True

    async def status(self) -> ServerStatus:
        """The status of the whole server.

        Raises:
            UnavailableError: the cluster state does not answer.
        """
        try:
            cluster_state = await self._find()
            async with asyncio.timeout(_ANSWER_S):
                return await cluster_state.status.remote()
        except (RayError, ValueError, TimeoutError) as error:
            raise UnavailableError("the cluster state that gathers the status does not answer") from error

    async def _find(self) -> Any:
        if self._cluster_state is None:
            self._cluster_state = await asyncio.to_thread(ray.get_actor, STATE_NAME, NAMESPACE)
        return self._cluster_state

    async def _run(self) -> None:
        said = ""
        while True:
            try:
                await self.report()
                said = ""
            except Exception as error:  # of the report or of who hears the news: the next second may be better
                if said != str(error):
                    log.exception("a report of %s failed; reports go on", self._source)
                said = str(error)
            await asyncio.sleep(REPORT_EVERY_S)
