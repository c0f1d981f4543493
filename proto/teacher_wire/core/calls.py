"""A request for labels as the server sees it."""

from __future__ import annotations

from dataclasses import dataclass

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.signals import SignalSpec


@dataclass(frozen=True)
class ScoreCall:
    """One request as the server sees it.

    Attributes:
        timeout_s: seconds the student waits; 0 for no limit.
        tenant: who asks, for fairness and quotas.
    """

    request_id: str
    teacher: str
    fingerprint: str
    spec: SignalSpec
    batch: TokenBatch
    timeout_s: float = 0.0
    tenant: str = ""
