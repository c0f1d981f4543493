"""The whole run as one list, easy rows first: a pure function of the ranked rows, the constants of the curriculum and the seed.

In: rows by rising difficulty; out: micro-batch number -> indices of examples, as `data.batch_plan.RunOrder` gives them, so that the feed,
the trainer and a resumed run compute the same list. What step s holds does not depend on how many steps the run has.

Source: docs/concepts/method.md 11; Platanios et al., "Competence-based curriculum learning" (NAACL 2019). Axes: N rows, W places of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from student_trainer.data.batch_plan import RunOrder
from student_trainer.schedules import keyed_permutation, uniforms

_STREAM, _PACKS = "curriculum", "curriculum pack"


@dataclass(frozen=True)
class Pace:
    """How fast harder rows are let in; the constants of a run, which a resumed one keeps.

    Attributes:
        start, power, mix: as `config.order.curriculum.CurriculumConfig` has them.
        steps: optimizer steps until every row may come.
    """

    start: float
    power: float
    steps: int
    mix: float

    def competence(self, step: int) -> float:
        """Share of the rows, the easiest ones, that may come in optimizer step `step`, counted from 0."""
        if step >= self.steps:
            return 1.0
        least = self.start**self.power
        return float(min(1.0, (least + (1 - least) * step / self.steps) ** (1 / self.power)))

    def eligible(self, step: int, rows: int) -> int:
        """E: how many of N rows may come; at least one."""
        return min(rows, max(1, math.ceil(self.competence(step) * rows - 1e-9)))


class CurriculumOrder(RunOrder):
    """Which examples each micro-batch of the run holds, easy ones first.

    Rows are dealt from one shuffled pack after another, each pack a permutation of all N rows that is keyed by seed and number: those that may
    not come yet are passed over, so that no row comes twice from a pack, and what is let in meanwhile comes if its turn has not passed. Once all rows may come a
    pack is a pass over the data. Until then a share `mix` of the places goes to rows drawn from all N.

    Args:
        ranked: int64 [N], the rows by rising difficulty.
        pace: the constants.
        batch_size, accumulation, epochs, max_steps, seed: as `RunOrder`.
    """

    def __init__(
        self,
        ranked: np.ndarray,
        pace: Pace,
        *,
        batch_size: int,
        accumulation: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
    ) -> None:
        super().__init__(
            len(ranked), batch_size=batch_size, accumulation=accumulation, epochs=epochs, max_steps=max_steps, seed=seed
        )
        self.ranked = ranked
        self.pace = pace
        self._pack = lru_cache(maxsize=2)(lambda number: keyed_permutation(seed, _PACKS, number, len(ranked)))
        self._list = self._dealt(seed)

    def __getitem__(self, position: int) -> int:
        """The example at a position of the run."""
        return int(self._list[position])

    def _dealt(self, seed: int) -> np.ndarray:
        """int64 [steps * W]: the whole run."""
        rows, window = self.examples, self.batch_size * self.accumulation
        places_W = np.arange(window)
        found = np.empty((self.steps, window), np.int64)
        number, at = 0, 0  # of the pack, and of the next card in it
        for step in range(self.steps):
            eligible = self.pace.eligible(step, rows)
            free_W = np.ones(window, np.bool_)
            if eligible < rows and self.pace.mix:
                free_W = uniforms(seed, _STREAM, step, places_W) >= self.pace.mix
                any_W = (uniforms(seed, _STREAM, step, window + places_W) * rows).astype(np.int64)
                found[step] = any_W
            wanted = int(free_W.sum())
            dealt: list[np.ndarray] = []
            while wanted:
                places = np.flatnonzero(self._pack(number)[at:] < eligible)[:wanted]
                dealt.append(self._pack(number)[at:][places])
                wanted -= len(places)
                if wanted:
                    number, at = number + 1, 0
                else:
                    at += int(places[-1]) + 1
            if dealt:
                found[step, free_W] = np.concatenate(dealt)
        return np.asarray(self.ranked[found.reshape(-1)])
