"""Where a batch's time went, by the device's clock."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class Stopwatch:
    """Time between marks, on the device's own clock where it has one: reading it waits for nothing but the last mark."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        """The time since the last mark was spent on `name`."""
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((name, now))

    def us(self) -> dict[str, int]:
        """Microseconds by name; waits for the last mark: whoever has waited for answers need not have waited for it."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        spent: dict[str, float] = {}
        for (_, start), (name, end) in pairwise(self._marks):
            took_us = start.elapsed_time(end) * 1e3 if self._cuda else (end - start) * 1e6
            spent[name] = spent.get(name, 0.0) + took_us
        return {name: round(took_us) for name, took_us in spent.items()}
