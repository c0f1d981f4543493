"""Which places of which windows are rollouts, from which prompts, and with which weights they are written: pure functions of the step.

In: the section `on_policy`, seed, steps and size of the windows; out: numbers. No torch, no state: every rank and every resumed run finds
the same, however a window is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from student_trainer.config.on_policy import OnPolicyConfig, ShareConfig
from student_trainer.schedules import uniforms


@dataclass(frozen=True)
class Place:
    """A sequence of a window that is a rollout.

    Attributes:
        slot: its place in the window, from 0.
        row: the place of the row whose prompt it answers.
    """

    slot: int
    row: int


class RolloutPlan:
    """See module.

    Args:
        config: of the run.
        seed: of the run.
        steps: optimizer steps of the run.
        window: sequences of an optimizer step.
    """

    def __init__(self, config: OnPolicyConfig, *, seed: int, steps: int, window: int) -> None:
        self.steps = steps
        self.window = window
        self._config = config
        self._seed = seed
        self.places = lru_cache(maxsize=64)(self._places)

    def share(self, step: int) -> float:
        """The probability that a sequence of optimizer step `step` is a rollout."""
        share = self._config.share
        if not isinstance(share, ShareConfig):
            return share
        ramped = step - share.warmup * self.steps
        ramp = share.ramp * self.steps
        if ramped < 0:
            return share.start
        return share.end if ramped >= ramp else share.start + (share.end - share.start) * ramped / ramp

    def _places(self, step: int) -> tuple[Place, ...]:
        """The rollouts of a window, by slot. Consecutive ones share a prompt in groups of `samples_per_prompt`, that of the first."""
        coins = uniforms(self._seed, "on_policy", step, np.arange(self.window))
        slots = np.flatnonzero(coins < self.share(step)).tolist()
        group = self._config.samples_per_prompt
        return tuple(Place(slot, slots[number // group * group]) for number, slot in enumerate(slots))

    def version(self, step: int) -> int:
        """The weights that write the rollouts of a step, as the number of optimizer steps behind them.

        A multiple of `sync_steps`, and never more than `max_staleness` behind; before the step itself unless that is 0.
        """
        oldest, every = max(0, step - self._config.max_staleness), self._config.sync_steps
        return -(-oldest // every) * every

    def writers(self, version: int) -> Iterator[int]:
        """The steps whose rollouts these weights write, if they have any."""
        last = min(self.steps, version + self._config.max_staleness + 1)
        return (step for step in range(version, last) if self.version(step) == version and self.places(step))

    @property
    def has_any(self) -> bool:
        """Whether the run has a rollout at all."""
        return any(self.places(step) for step in range(self.steps))
