"""What a run logs between two entries: sums that stay on the device until they are asked for, tokens, waiting.

In: parts of losses, as they come; out: the figures of one log entry.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from student_trainer.labels.source import LabelUsage
from student_trainer.losses.output.loss import LossParts

# name in the log -> part of the loss it is the mean of
_LOGGED = {"kd_loss": "kd_sum", "sft_loss": "ce_sum", "acc1": "acc1_hits", "acc3": "acc3_hits"}
_COUNTS = ("acc1_hits", "acc3_hits")
# What the clock and the disk decide; everything else in the log is the same whenever the run is repeated.
TIMED = ("tokens_per_s", "wait_share", "cache_hits", "runtime_s")


@dataclass
class Meter:
    """What happened since the last log entry; device tensors, so that a step waits for nothing.

    Attributes:
        window: by name, of the micro-batches of the step under way.
        names, sums_S: of the steps that were learned from, as one tensor.
    """

    window: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    sums_S: Tensor | None = None
    tokens: int = 0
    waited_s: float = 0.0
    labels: LabelUsage = field(default_factory=LabelUsage)
    started_s: float = field(default_factory=time.perf_counter)

    def add(self, parts: LossParts, loss: Tensor) -> None:
        """The parts of one micro-batch's loss, and the whole."""
        for name, value in {**vars(parts), "loss": loss.detach()}.items():
            self.window[name] = self.window[name] + value.double() if name in self.window else value.double()

    def end_window(self, left_out: Tensor) -> None:
        """The step is done; `left_out` is 1 [] if it was not learned from: then it counts in no mean."""
        values_S = torch.stack([*self.window.values(), torch.ones_like(self.window["loss"])])
        self.names = (*self.window, "steps")
        kept_S = torch.where(left_out > 0, torch.zeros_like(values_S), values_S)
        self.sums_S = kept_S if self.sums_S is None else self.sums_S + kept_S
        self.window = {}

    def figures(self) -> dict[str, float]:
        """Means over weighted rows (of the loss: over steps), shares of rows, rates over seconds; NaN if every step was left out.

        `wait_share` is time in which the host waited for labels; a GPU may still have had work meanwhile.
        """
        seconds = max(time.perf_counter() - self.started_s, 1e-9)
        sums = {} if self.sums_S is None else dict(zip(self.names, self.sums_S.tolist(), strict=True))
        rows = max(sums.get("rows", 0.0), 1.0)
        weights = max(sums.get("weights", 0.0), 1e-9)
        means = {
            name: sums[part] / (rows if part in _COUNTS else weights) for name, part in _LOGGED.items() if part in sums
        }
        if "steps" in sums:
            means = {"loss": sums["loss"] / sums["steps"] if sums["steps"] else math.nan} | means
            means = means if sums["steps"] else dict.fromkeys(means, math.nan)
        rates = {"tokens_per_s": self.tokens / seconds, "wait_share": self.waited_s / seconds}
        return means | rates | ({"cache_hits": self.labels.disk_share} if self.labels.sequences else {})
