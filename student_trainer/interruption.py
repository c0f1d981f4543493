"""Ctrl-C and a scheduler's SIGTERM, for commands that end in order.

In: a signal; out: KeyboardInterrupt where nothing is torn: later, by whoever handles the signal, or between two slices of a wait. Raised amid
a wait it could leave a lock taken that other threads need. Only commands install it: in other people's programs signals are theirs.
Loads nothing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SLICE_S = 0.2


class _Interruption:
    """What the main thread is doing as a signal comes."""

    def __init__(self) -> None:
        self.holders: list[Callable[[], bool]] = []
        self.waits = 0
        self.pending = False  # a signal that the current wait has yet to notice

    def arrived(self) -> bool:
        """Whether the command will end in order by itself, soon."""
        taken = [holder() for holder in self.holders]
        if any(taken):
            return True
        self.pending = bool(self.waits)
        return self.pending

    def take_pending(self) -> bool:
        """Whether a signal is pending; it no longer is."""
        pending, self.pending = self.pending, False
        return pending


_now = _Interruption()


@contextlib.contextmanager
def told_first(holder: Callable[[], bool]) -> Iterator[None]:
    """While the block runs, `holder` is told of every interruption, and answers whether it ends the block by itself soon."""
    _now.holders.append(holder)
    try:
        yield
    finally:
        _now.holders.remove(holder)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """A block of the main thread that takes locks which other threads need: an interruption waits for its end, or for a wait in it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _now.waits += 1
    try:
        yield
    finally:
        _now.waits -= 1
        if not _now.waits and _now.take_pending():
            raise KeyboardInterrupt


def patiently(is_over: Callable[[float], object]) -> None:
    """Waits until `is_over`, which gets the seconds that it may wait itself, says so; an interruption ends the wait of the main thread.

    It must look at a state, as `Condition.wait_for` does: a notification that comes between two slices is missed.

    Raises:
        KeyboardInterrupt: between two calls of `is_over`.
    """
    is_main = threading.current_thread() is threading.main_thread()
    with guarded():
        while not (is_main and _now.pending) and not is_over(_SLICE_S):
            pass
        if is_main and _now.take_pending():
            raise KeyboardInterrupt


@contextlib.contextmanager
def interrupted_in_order(tell: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt in the block, at once or where it is safe soon; `tell` then says so, in a thread of its own."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if not _now.arrived():
            raise KeyboardInterrupt
        # The main thread may hold the lock of the very stream that is written to, amid a write.
        threading.Thread(target=tell, daemon=True).start()

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
