"""Gives memory that the allocator keeps back to the system, without making the edge fault the same pages in again and again.

In: how many bytes the edge knows that it holds; out: calls of glibc's `malloc_trim`. With another libc it does nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1  # of malloc.h
_ARENAS = 1  # by default eight per core, and each keeps the memory that it was once used for
# Mapped by itself and gone when freed: the pieces of the longest requests (21 MB), but not the labels of a sequence of 2,048
# tokens of a 7B teacher (15 MB), of which a reply has eight; glibc's own bound is 128 KiB at first and 32 MiB later.
_MAPPED_BYTES = 16 << 20
_TOP_BYTES = 64 << 20  # free at an arena's end; else setting the other leaves it at 128 KiB

CHECK_S = 0.5
SPARE_BYTES = 32 << 20  # kept for the next request: below this nothing is given back
GIVEN_BYTES_PER_S = 64 << 20  # on average at most, about 16,000 page faults per second: 2 % of a core
USELESS_BYTES, USELESS_S = 8 << 20, 3.0  # a call that gives back less than this is not repeated at once


class Trimmer:
    """Decides when freed memory is given back.

    An mmap threshold of 2 MiB did this at every single free, and cost 40,000 page faults for a reply of 117 MB, a quarter of
    the edge's CPU time. Now blocks below `_MAPPED_BYTES` are used again; what is free beyond `SPARE_BYTES` is given back here.

    Args:
        held_bytes: what the edge holds on purpose: requests, replies, kept labels.
        rss_bytes: resident memory of this process.
        trim: gives back what is free; called on a thread.
    """

    def __init__(self, held_bytes: Callable[[], int], rss_bytes: Callable[[], int], trim: Callable[[], object]) -> None:
        self._held_bytes = held_bytes
        self._rss_bytes = rss_bytes
        self._trim = trim
        self._base_bytes = rss_bytes()
        self._not_before_s = 0.0

    async def check(self, now_s: float) -> bool:
        """Gives memory back if that is due at `now_s` (seconds, monotonic); whether it was."""
        before = self._rss_bytes()
        if now_s < self._not_before_s or before - self._base_bytes - self._held_bytes() < SPARE_BYTES:
            return False
        await asyncio.to_thread(self._trim)
        given = before - self._rss_bytes()
        self._not_before_s = now_s + (given / GIVEN_BYTES_PER_S if given >= USELESS_BYTES else USELESS_S)
        return True


def set_up_allocator() -> None:
    """Sets glibc's allocator for this process. Before there are threads: an arena that exists stays."""
    libc = _glibc()
    if libc is not None:
        for option, value in (
            (_M_ARENA_MAX, _ARENAS),
            (_M_MMAP_THRESHOLD, _MAPPED_BYTES),
            (_M_TRIM_THRESHOLD, _TOP_BYTES),
        ):
            libc.mallopt(option, value)


async def give_back(held_bytes: Callable[[], int]) -> None:
    """Runs a `Trimmer` over this process until it is cancelled; returns at once where there is no glibc."""
    libc = _glibc()
    if libc is None:
        return
    trimmer = Trimmer(held_bytes, _rss_bytes, lambda: libc.malloc_trim(0))
    while True:
        await asyncio.sleep(CHECK_S)
        await trimmer.check(asyncio.get_running_loop().time())


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt, libc.malloc_trim  # noqa: B018  (looked up here)
    except (AttributeError, OSError):
        return None
    return libc


def _rss_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
