"""How long the stages of requests take, as histograms of fixed buckets: a plain object without Ray.

In: seconds by stage; out: cumulative counts as nested mappings, which `status` can add up over replicas and subtract over
time, and quantiles of such counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Replica: queue, forward, reduce (Score); queue is also the wait of a Generate call for its first sequence.
# Edge: first_chunk (labels or the first sample are there to be sent) and whole (all of the answer is).
# Also at edges: tokenize (a whole call of Tokenize).
# Requests with latency "interactive" are counted under `interactive_` and the stage, and not under the stage itself.
STAGES = (
    "queue", "forward", "reduce", "first_chunk", "whole", "tokenize",
    "interactive_queue", "interactive_first_chunk", "interactive_whole",
)  # fmt: skip
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_LABELS = (*(f"{bound:g}" for bound in BOUNDS_S), "inf")


class Latencies:
    """Counts of one process.

    Args:
        on_observe: told every observation, stage and seconds, at once.
    """

    def __init__(self, on_observe: Callable[[str, float], None] | None = None) -> None:
        self._on_observe = on_observe
        self._counts: dict[str, list[int]] = {}
        self._sum_s: dict[str, float] = {}

    def observe(self, stage: str, seconds: float) -> None:
        """Adds one duration."""
        counts = self._counts.setdefault(stage, [0] * len(_LABELS))
        place = next((i for i, bound in enumerate(BOUNDS_S) if seconds <= bound), len(BOUNDS_S))
        counts[place] += 1
        self._sum_s[stage] = self._sum_s.get(stage, 0.0) + seconds
        if self._on_observe is not None:
            self._on_observe(stage, seconds)

    def counters(self) -> dict[str, dict[str, Any]]:
        """By stage: `count`, `sum_s`, and `buckets`, the observations at most as long as each bound and above the one before."""
        return {
            stage: {
                "count": sum(counts),
                "sum_s": self._sum_s[stage],
                "buckets": dict(zip(_LABELS, counts, strict=True)),
            }
            for stage, counts in self._counts.items()
        }


def quantile_s(buckets: Mapping[str, float], share: float) -> float:
    """The duration below which `share` of the observations lie, linear within a bucket; 0 if there are none.

    Beyond the last bound it is that bound.
    """
    total = sum(buckets.get(label, 0) for label in _LABELS)
    if total <= 0:
        return 0.0
    wanted, below, low = share * total, 0.0, 0.0
    for label, bound in zip(_LABELS, BOUNDS_S, strict=False):
        count = buckets.get(label, 0)
        if below + count >= wanted and count:
            return low + (bound - low) * (wanted - below) / count
        below += count
        low = bound
    return BOUNDS_S[-1]
