"""How many replicas a teacher needs: one for every `target_queued_tokens` that wait, over all replicas together. What waits to
be written counts with the tokens that it may come to hold.

Ray Serve calls the policy several times a second with what replicas record (`record_autoscaling_stats`), keeps the answer
within min and max replicas, and follows it only after it has stood for upscale_delay_s or downscale_delay_s.
Serve ships this module by value to its controller: it imports nothing of ours.
"""

from __future__ import annotations

import math
from typing import Any

QUEUED_TOKENS = "queued_tokens"
WINDOW_S = 5.0  # the queue moves with every forward pass: its mean over this time counts


class QueuedTokensPolicy:
    """A custom autoscaling policy of Ray Serve.

    Args:
        target_queued_tokens: waiting tokens that are worth one replica.
    """

    def __init__(self, target_queued_tokens: int) -> None:
        self._target = target_queued_tokens

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted for an AutoscalingContext, and no state. A replica that has said nothing yet has no queue."""
        series = (context.raw_metrics or {}).get(QUEUED_TOKENS, {})
        queued = sum(_mean(points, context.current_time - WINDOW_S) for points in series.values())
        wanted = math.ceil(queued / self._target)
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, least), most), {}


def _mean(points: Any, start_s: float) -> float:
    values = [point.value for point in points if point.timestamp >= start_s] or [point.value for point in points][-1:]
    return sum(values) / len(values) if values else 0.0
