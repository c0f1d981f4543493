"""What a run logs between two entries: sums that stay on the device until they are asked for, tokens, waiting.

In: parts of losses, as they come; out: the figures of one log entry.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from student_trainer.feed.source import LabelUsage
from student_trainer.losses.output import LossParts

# name in the log -> part of the loss it is the mean of
_LOGGED = {"kd_loss": "kd_sum", "sft_loss": "ce_sum", "acc1": "acc1_hits", "acc3": "acc3_hits"}
_COUNTS = ("acc1_hits", "acc3_hits")
# What the clock and the disk decide; everything else in the log is the same whenever the run is repeated.
TIMED = ("tokens_per_s", "wait_share", "cache_hits", "runtime_s")


@dataclass
class Meter:
    """What happened since the last log entry; device tensors, so that a step waits for nothing."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    waited_s: float = 0.0
    labels: LabelUsage = field(default_factory=LabelUsage)
    started_s: float = field(default_factory=time.perf_counter)

    def add(self, parts: LossParts) -> None:
        """The parts of one micro-batch's loss."""
        for name, value in vars(parts).items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def figures(self) -> dict[str, float]:
        """Means over weighted rows, shares of rows, rates over seconds.

        `wait_share` is time in which the host waited for labels; a GPU may still have had work meanwhile.
        """
        seconds = max(time.perf_counter() - self.started_s, 1e-9)
        sums = {name: float(value) for name, value in self.sums.items()}
        rows = max(sums.get("rows", 0.0), 1.0)
        weights = max(sums.get("weights", 0.0), 1e-9)
        means = {
            name: sums[part] / (rows if part in _COUNTS else weights) for name, part in _LOGGED.items() if part in sums
        }
        rates = {"tokens_per_s": self.tokens / seconds, "wait_share": self.waited_s / seconds}
        return means | rates | ({"cache_hits": self.labels.disk_share} if self.labels.sequences else {})
