"""What a run logs between two entries: sums that stay on the device until they are asked for, tokens, waiting.

In: figures of the loss terms, as they come; out: the figures of one log entry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from student_trainer.labels.source import LabelUsage
from student_trainer.losses.term import Mean

_OVER = "over "  # before the name of a figure: what its sum is divided by
# What the clock and the disk decide; everything else in the log is the same whenever the run is repeated.
TIMED = ("tokens_per_s", "wait_share", "cache_hits", "runtime_s", "rollout_wait_share")


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
    waited_alone_s: dict[str, float] = field(default_factory=dict)
    labels: LabelUsage = field(default_factory=LabelUsage)
    started_s: float = field(default_factory=time.perf_counter)

    def add(self, parts: Mapping[str, Mean], loss: Tensor) -> None:
        """The figures of one micro-batch's loss by their name in the log, and the whole."""
        for name, part in parts.items():
            self._add(name, part.sum)
            self._add(_OVER + name, part.over)
        self._add("loss", loss.detach())

    def _add(self, name: str, value: Tensor) -> None:
        self.window[name] = self.window[name] + value.double() if name in self.window else value.double()

    def end_window(self, left_out: Tensor) -> None:
        """The step is done; `left_out` is 1 [] if it was not learned from: then it counts in no mean."""
        values_S = torch.stack([*self.window.values(), torch.ones_like(self.window["loss"])])
        names = (*self.window, "steps")
        kept_S = torch.where(left_out > 0, torch.zeros_like(values_S), values_S)
        if self.sums_S is not None and names != self.names:  # of several teachers one was away, or is back
            names, (before_S, kept_S) = _aligned([(self.names, self.sums_S), (names, kept_S)])
            self.sums_S = before_S
        self.names = names
        self.sums_S = kept_S if self.sums_S is None else self.sums_S + kept_S
        self.window = {}

    def figures(self) -> dict[str, float]:
        """Means as the loss terms say (of the loss: over steps), rates over seconds; NaN if every step was left out.

        `wait_share` is time in which the host waited for labels; a GPU may still have had work meanwhile. `wait_share.NAME` is the part of it
        in which it waited for that one of several teachers alone.
        """
        seconds = max(time.perf_counter() - self.started_s, 1e-9)
        sums = {} if self.sums_S is None else dict(zip(self.names, self.sums_S.tolist(), strict=True))
        means = {
            name: sums[name] / max(sums[_OVER + name], 1e-9) for name in sums if _OVER + name in sums
        }  # nothing to divide by: the sum is 0 too
        if "steps" in sums:
            means = {"loss": sums["loss"] / sums["steps"] if sums["steps"] else math.nan} | means
            means = means if sums["steps"] else dict.fromkeys(means, math.nan)
        rates = {"tokens_per_s": self.tokens / seconds, "wait_share": self.waited_s / seconds}
        rates |= {f"wait_share.{name}": waited_s / seconds for name, waited_s in self.waited_alone_s.items()}
        return means | rates | ({"cache_hits": self.labels.disk_share} if self.labels.sequences else {})


def _aligned(parts: Sequence[tuple[tuple[str, ...], Tensor]]) -> tuple[tuple[str, ...], list[Tensor]]:
    """Sums by name over the names of all parts, 0 where a part has none."""
    names = tuple(dict.fromkeys(name for part, _ in parts for name in part))
    found = []
    for part, sums_S in parts:
        values = dict(zip(part, sums_S.unbind(), strict=True))
        found.append(torch.stack([values.get(name, torch.zeros_like(sums_S[0])) for name in names]))
    return names, found
