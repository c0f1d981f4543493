"""A request for labels as the server sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.signals import SignalSpec

Cache = Literal["shared", "none"]  # proto: Cache
Latency = Literal["bulk", "interactive"]  # proto: Latency


@dataclass(frozen=True)
class ScoreCall:
    """One request as the server sees it.

    Attributes:
        timeout_s: seconds the student waits; 0 for no limit.
        tenant: who asks, for fairness and quotas.
        cache: "none" for labels that nobody will ask for again: they are looked for nowhere and kept nowhere.
        latency: "interactive" if somebody waits for this very answer; see proto.
    """

    request_id: str
    teacher: str
    fingerprint: str
    spec: SignalSpec
    batch: TokenBatch
    timeout_s: float = 0.0
    tenant: str = ""
    cache: Cache = "shared"
    latency: Latency = "bulk"

    @property
    def interactive(self) -> bool:
        """Whether it goes before bulk requests."""
        return self.latency == "interactive"
