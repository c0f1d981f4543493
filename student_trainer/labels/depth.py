"""How many micro-batches to ask ahead: as many as the student uses up while one answer is on its way, and some in reserve.

In: times of answers and of steps; out: a number. Policy in numbers: no clock, no thread, no torch.
"""

from __future__ import annotations

import math

RESERVE = 2  # beside what the latency takes: one that is late, one in hand
_DEVIATIONS = 4  # above the mean, as TCP's retransmission timer has it (RFC 6298): a teacher is not always equally busy
_SHARE = 0.2  # of the newest measurement in a mean
_PAUSE = 5  # times the mean: longer is no step but an evaluation or a checkpoint
FIRST = 4  # until something has been measured


class Depth:
    """Smoothed latency of an answer and interval between two that were taken.

    A teacher slower than its student answers the later, the more it is asked: depth then grows to `most`, where it helps nobody and harms
    nobody; its own queue is fair.

    Args:
        most: never more.
        burst: micro-batches that a student takes at once; never fewer than these and the reserve.
    """

    def __init__(self, most: int, burst: int = 1) -> None:
        self._most = most
        self._least = burst + RESERVE if burst > 1 else 1
        self.latency_s: float | None = None
        self._deviation_s = 0.0
        self.interval_s: float | None = None

    def answered(self, latency_s: float) -> None:
        """An answer came so long after it was asked for."""
        if self.latency_s is None:
            self._deviation_s = latency_s / 2
        else:
            self._deviation_s = _smoothed(self._deviation_s, abs(latency_s - self.latency_s))
        self.latency_s = _smoothed(self.latency_s, latency_s)

    def taken(self, interval_s: float) -> None:
        """A micro-batch was taken so long after the one before it, waiting for labels not counted; a pause counts little."""
        if self.interval_s is not None:
            interval_s = min(interval_s, _PAUSE * self.interval_s)
        self.interval_s = _smoothed(self.interval_s, interval_s)

    @property
    def batches(self) -> int:
        """Micro-batches that should be asked for or in hand, from 1 to `most`."""
        if self.latency_s is None or self.interval_s is None:
            return min(self._most, max(FIRST, self._least))
        if self.interval_s <= 0:
            return self._most
        latest_s = self.latency_s + _DEVIATIONS * self._deviation_s
        return min(self._most, max(self._least, RESERVE + math.ceil(latest_s / self.interval_s)))


def _smoothed(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _SHARE * (newest - mean)
