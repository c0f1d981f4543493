"""How hard rows are, from figures of each: a number, and the order that follows. Pure arithmetic: asks nobody, draws nothing.

Source: docs/concepts/method.md 11. Axes: N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from student_trainer.config.order.curriculum import CurriculumConfig


def difficulty(
    settings: CurriculumConfig, nll_N: np.ndarray | None, tokens_N: np.ndarray, trace_steps_N: np.ndarray
) -> np.ndarray:
    """float64 [N]: the weighted sum of what is known of each row, every part in standard deviations from the mean of all rows.

    Args:
        settings: the weights.
        nll_N: the teacher's negative log-likelihood per token of the answer, nats; NaN for a row that no teacher is asked about, which counts
            as the mean of the others. None if nobody is asked.
        tokens_N: of the sequence, at least 1.
        trace_steps_N: of the row's trace; 0 without one.
    """
    score_N = settings.length * standardised(np.log(tokens_N)) + settings.trace_steps * standardised(trace_steps_N)
    if nll_N is None or not settings.nll:
        return np.asarray(score_N)
    known_N = np.isfinite(nll_N)
    if not known_N.any():
        return np.asarray(score_N)
    filled_N = np.where(known_N, nll_N, nll_N[known_N].mean())
    return np.asarray(score_N + settings.nll * standardised(filled_N))


def standardised(value_N: np.ndarray) -> np.ndarray:
    """float64 [N]: (value - mean) / standard deviation of these rows; 0 everywhere if they are all the same."""
    value_N = np.asarray(value_N, np.float64)
    spread = value_N.std()
    if not spread > 1e-12 * max(1.0, float(np.abs(value_N).max())):
        return np.zeros_like(value_N)
    return np.asarray((value_N - value_N.mean()) / spread)


def easy_to_hard(score_N: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """int64 [N]: the rows by rising difficulty; of two that are as hard, the one whose name has the smaller sha256 first."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    return np.array(sorted(range(len(names)), key=lambda i: (float(score_N[i]), digests[i], i)), np.int64)
