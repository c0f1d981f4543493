"""What one replica has done since it started: plain counters, and how they are told.

In: what happened; out: nested mappings for `telemetry`. No clocks, no Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_OUTCOMES = ("answered", "failed", "expired", "cancelled", "refused")


class Counts:
    """Counters of one engine.

    Attributes:
        ended: requests and calls of Generate by how they ended.
        served: tokens by tenant.
        refused: requests that met a full queue, by tenant.
        forwards, forward_tokens: passes and their tokens.
        interactive: of passes, their tokens and answered requests, those of the interactive lane.
    """

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.forwards = 0
        self.forward_tokens = 0
        self.interactive: Counter[str] = Counter()

    def began(self, tokens: int, *, interactive: bool) -> None:
        """Counts a forward pass."""
        self.forwards += 1
        self.forward_tokens += tokens
        if interactive:
            self.interactive.update(interactive_forwards=1, interactive_tokens=tokens)

    def answered(self, *, interactive: bool) -> None:
        """Counts a request that has its labels."""
        self.ended["answered"] += 1
        self.interactive["interactive_answered"] += interactive

    def told(self) -> dict[str, int]:
        """Totals, for status displays."""
        lane = ("interactive_forwards", "interactive_tokens", "interactive_answered")
        return {
            "forwards": self.forwards,
            "forward_tokens": self.forward_tokens,
            **{name: self.ended[name] for name in _OUTCOMES},
            **{name: self.interactive[name] for name in lane},
        }

    def tenants(self, queued: Mapping[str, int], written: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
        """A row for each tenant.

        Args:
            queued: its tokens that wait to be scored.
            written: what writing counts of it.
        """
        names: Iterable[str] = {*queued, *self.served, *self.refused, *written}
        rows = {}
        for name in names:
            of_writing = written.get(name, {})
            rows[name] = {
                "queued_tokens": queued.get(name, 0) + of_writing.get("queued_tokens", 0),
                "served_tokens": self.served[name] + of_writing.get("served_tokens", 0),
                "refused": self.refused[name] + of_writing.get("refused", 0),
            }
        return rows
