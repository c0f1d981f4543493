"""What an exception out of a forward pass says about the device, and whether a replica can still serve. No torch, no Ray.

In: exceptions and successes; out: a kind of fault, a `RuntimeError` for Serve's health check, an `UnavailableError` for callers.
"""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

from teacher_wire.core.errors import OverloadedError, ServerError, TeacherWireError, UnavailableError

Fault = Literal["memory", "device", "other"]
Work = Literal["score", "write"]

PROBE_AFTER = 3  # failed forward passes in a row after which the replica tests itself
LOST = "the replica can compute nothing any more; it is being replaced"
_MAX_REASON_CHARS = 200

# An allocation that failed leaves the CUDA context whole, whichever library reports it: this is looked for first.
_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|(?:can't|cannot) allocate memory|not enough memory", re.IGNORECASE)
# Errors after which every further call in the process fails (CUDA "sticky" errors), by the words of torch and its libraries.
_DEVICE = re.compile(
    r"CUDA error|CUDA driver error|cuda runtime error|CUBLAS_STATUS_|CUDNN_STATUS_|NCCL error|HIP error|"
    r"device-side assert|illegal memory access|unspecified launch failure|uncorrectable ECC",
    re.IGNORECASE,
)


def kind_of(error: BaseException) -> Fault:
    """`memory` if an allocation failed, `device` if the context is lost, else `other`; causes are looked at too."""
    seen: BaseException | None = error
    found: Fault = "other"
    for _ in range(8):
        if seen is None or isinstance(seen, TeacherWireError):
            break
        text = f"{type(seen).__name__}: {seen}"
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError" or _MEMORY.search(text):
            return "memory"
        if type(seen).__name__ == "AcceleratorError" or _DEVICE.search(text):
            found = "device"
        seen = seen.__cause__ or seen.__context__
    return found


def as_wire_error(error: BaseException, *, alone: str) -> TeacherWireError:
    """What a caller is told of a failed forward pass.

    Args:
        error: what the backend raised.
        alone: the work that failed by itself, for an allocation that failed: "a request of 512 tokens".
    """
    if isinstance(error, TeacherWireError):
        return error
    kind = kind_of(error)
    if kind == "device":
        return UnavailableError(LOST)
    if kind == "memory":
        return OverloadedError(
            f"the teacher's device has no memory left for {alone}", field="device memory", retry_after_s=1.0
        )
    return ServerError(shortened(error))


def shortened(error: BaseException) -> str:
    """Type and first line of an exception, bounded in length."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:_MAX_REASON_CHARS]


def release(error: BaseException) -> None:
    """Drops the local variables of the frames an exception passed through: they hold the tensors of what failed."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


class Health:
    """Whether the forward passes of one replica still succeed, and end.

    A lost device is fatal at once. Any other failure may be the fault of one request: after `PROBE_AFTER` in a row
    `needs_probe` holds, and the owner computes something known to be good; only if that fails too the replica is given up.

    Args:
        hang_s: longest time that one call of the backend may run; None for any.
        clock: seconds, monotonic.

    Attributes:
        failed: forward passes that failed since the start.
        reason: why the replica was given up, or "".
    """

    def __init__(self, hang_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.failed = 0
        self.reason = ""
        self._hang_s = hang_s
        self._clock = clock
        self._running: dict[
            object, float
        ] = {}  # since when, of each call that runs; written by the threads that run them
        self._in_a_row: Counter[Work] = Counter()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A call of the backend, on the thread that runs it: what it waits for a thread is no part of it."""
        call = object()
        self._running[call] = self._clock()
        try:
            yield
        finally:
            del self._running[call]

    @property
    def hung(self) -> str:
        """Which call has run longer than `hang_s`, in words, or ""."""
        if self._hang_s is None:
            return ""
        longest_s = self._clock() - min(list(self._running.values()), default=self._clock())
        return (
            f"a forward pass has run for {longest_s:.0f} s (hang_s {self._hang_s:g})"
            if longest_s > self._hang_s
            else ""
        )

    def succeeded(self, work: Work) -> None:
        """A forward pass gave its answers."""
        self._in_a_row[work] = 0

    def failure(self, error: BaseException, work: Work) -> None:
        """A forward pass raised. Errors that name a fault of the request do not count."""
        if isinstance(error, TeacherWireError) and not isinstance(error, ServerError):
            return
        self.failed += 1
        kind = kind_of(error)
        if kind == "device":
            self.give_up(shortened(error))
        elif kind != "memory":  # which says nothing about the next, smaller one
            self._in_a_row[work] += 1

    @property
    def needs_probe(self) -> bool:
        return not self.reason and max(self._in_a_row.values(), default=0) >= PROBE_AFTER

    def probed(self, error: BaseException | None) -> None:
        """The outcome of a probe: None if it succeeded."""
        self._in_a_row.clear()
        if error is not None and kind_of(error) != "memory":
            self.give_up(f"its own probe failed too: {shortened(error)}")

    def give_up(self, reason: str) -> None:
        """The replica is lost from now on; the first reason stays."""
        self.reason = self.reason or reason

    def check(self) -> None:
        """Raises RuntimeError once the replica is lost."""
        if self.reason:
            raise RuntimeError(f"forward passes fail: {self.reason}")

    def refuse(self) -> None:
        """Raises UnavailableError once the replica is lost, so that callers ask another one."""
        if self.reason:
            raise UnavailableError(LOST)
