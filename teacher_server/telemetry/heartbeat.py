"""The board as a Ray actor, and the task by which a replica or an edge talks to it once a second.

In: what to report; out: News. A board that is away, slow or new never hurts whoever reports: it goes on with its last news.
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

from teacher_server.telemetry.cluster_state import Board
from teacher_server.telemetry.records import EdgeReport, Held, News, ReplicaReport
from teacher_wire.core.errors import UnavailableError
from teacher_wire.core.status import ServerStatus

log = logging.getLogger(__name__)

NAMESPACE = "lyceum"
BOARD_NAME = "board"
REPORT_EVERY_S = 1.0
_ANSWER_S = 2.0
_LEFT_ANSWER_S = 5.0  # of a board that was left
_WATCH_S = 6.0  # in which an `up` that lives has posted
_BOARD_START_S = 60.0  # its process has to come up first


def start_board(owner: str) -> tuple[Any, Held | None]:
    """Makes the board on this node, or takes over the one that an `up` before left on this cluster.

    Args:
        owner: who may post from now on; unique.

    Returns:
        The board, and what the `up` before had deployed, if there was one.

    Raises:
        ValueError: another `up` lives.
    """
    try:
        left = ray.get_actor(BOARD_NAME, NAMESPACE)
    except ValueError:
        return _new_board(owner), None
    try:
        seen = ray.get(left.posts.remote(), timeout=_LEFT_ANSWER_S)
        until_s = time.monotonic() + _WATCH_S
        while time.monotonic() < until_s:
            time.sleep(0.5)
            if ray.get(left.posts.remote(), timeout=_LEFT_ANSWER_S) != seen:
                raise ValueError("another teacher-server up serves this cluster")
        return left, ray.get(left.claim.remote(owner), timeout=_LEFT_ANSWER_S)
    except RayError:  # of a machine that is gone
        remove_board()
        return _new_board(owner), None


def _new_board(owner: str) -> Any:
    """It outlives us on a cluster that stays, so that status goes on and the next `up` finds what runs; other nodes may die."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Board)
    options = {"name": BOARD_NAME, "namespace": NAMESPACE, "scheduling_strategy": here, "lifetime": "detached"}
    board = actor.options(**options).remote()
    ray.get(board.claim.remote(owner), timeout=_BOARD_START_S)
    return board


def remove_board() -> None:
    """Takes the board away."""
    with contextlib.suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(BOARD_NAME, NAMESPACE))


def node_address() -> str:
    """The address by which the Ray cluster knows this node."""
    here = ray.get_runtime_context().get_node_id()
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)


class Reporter:
    """One source on the board.

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
        self._board: Any = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins reporting, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    def leave(self) -> None:
        """Says goodbye without waiting for an answer."""
        if self._task is not None:
            self._task.cancel()
        if self._board is not None:
            self._board.leave.remote(self._source)
            self._board = None

    async def report(self) -> bool:
        """Reports once; whether the board answered."""
        try:
            board = await self._find()
            async with asyncio.timeout(_ANSWER_S):
                news = await board.report.remote(self._source, self._make())
        except (RayError, ValueError, TimeoutError) as error:
            self._board = None
            log.debug("the board does not answer: %s", error)
            return False
        self._take(news)
        return True

    async def status(self) -> ServerStatus:
        """The status of the whole server.

        Raises:
            UnavailableError: the board does not answer.
        """
        try:
            board = await self._find()
            async with asyncio.timeout(_ANSWER_S):
                return await board.status.remote()
        except (RayError, ValueError, TimeoutError) as error:
            raise UnavailableError("the board that gathers the status does not answer") from error

    async def _find(self) -> Any:
        if self._board is None:
            self._board = await asyncio.to_thread(ray.get_actor, BOARD_NAME, NAMESPACE)
        return self._board

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
