"""An AIMD limit on the concurrent requests of a student: none until the server refuses, then lowered, and slowly raised again.

A policy over counts and a given clock: additive increase, multiplicative decrease (Chiu & Jain 1989), so that a student over its
quota sends one request at a time instead of sending everything again and again.
"""

from __future__ import annotations

import math


class Pace:
    """Open requests of one client, and how many there may be."""

    def __init__(self) -> None:
        self._open: set[str] = set()
        self._allowed = math.inf
        self._not_before_s = 0.0

    @property
    def allowed(self) -> float:
        """Requests that may be open; infinite while the server has refused none."""
        return self._allowed

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next request may be sent; infinite while an answer must come first."""
        if len(self._open) >= self._allowed:
            return math.inf
        return max(0.0, self._not_before_s - now_s)

    def sent(self, request_id: str) -> None:
        """A request was sent."""
        self._open.add(request_id)

    def answered(self, request_id: str) -> None:
        """A whole answer came: one more may be open."""
        self.ended(request_id)
        self._allowed += 1

    def ended(self, request_id: str) -> None:
        """A request came to an end that says nothing about the server's load."""
        self._open.discard(request_id)

    def refused(self, request_id: str, now_s: float, delay_s: float) -> None:
        """The server is full or our quota used up: half as many, and none before `delay_s` has passed."""
        self._open.discard(request_id)
        if now_s >= self._not_before_s:  # else: it was sent before the refusal that we act on already
            self._allowed = max(1, len(self._open) // 2)
        self._not_before_s = max(self._not_before_s, now_s + delay_s)

    def lost(self) -> None:
        """The stream broke: nothing is open any more."""
        self._open.clear()
