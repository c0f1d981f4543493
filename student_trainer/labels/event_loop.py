"""The one event loop of the student, in one thread, for everything that speaks to a teacher.

grpc's asyncio layer hands events of all loops of a process through one poller; a loop that is closed while an event for it is
under way loses events of the others too. So there is one loop, made when first needed and never closed.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from functools import lru_cache
from typing import Any, TypeVar

import grpc

from student_trainer.interruption import patiently

Result = TypeVar("Result")


@lru_cache(maxsize=1)
def loop() -> asyncio.AbstractEventLoop:
    """The loop, running."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, name="teacher-io", daemon=True).start()
    asyncio.run_coroutine_threadsafe(_hold_grpc(), made).result()
    return made


async def _hold_grpc() -> None:
    """For ever: with its last channel grpc would close a socket that the loop still reads. It needs a running loop."""
    grpc.aio.init_grpc_aio()


def start(work: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Begins `work` on the loop."""
    return asyncio.run_coroutine_threadsafe(work, loop())


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Does `work` on the loop and waits for it; taken back if we are interrupted."""
    future = start(work)
    try:
        wait_for(future)
        return future.result()
    except BaseException:
        future.cancel()
        raise


def wait_for(future: Future[Any], limit_s: float = math.inf) -> None:
    """Waits until `future` is over, however it ends, or `limit_s` have passed; an interruption ends the wait."""
    until = time.monotonic() + limit_s
    patiently(lambda slice_s: wait([future], slice_s).done or time.monotonic() >= until)
