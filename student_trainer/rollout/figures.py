"""What the log says of rollouts, and when a run is warned that its teacher is asked about garbage.

In: rollouts as the trainer takes them; out: figures of a log entry, which are pure functions of the steps since the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from student_trainer.rollout.sample import Rollout, RolloutFailure
from student_trainer.rollout.writer import Written

# Of `health.HealthTerm`, by the name in the log; they mean nothing while there are no rollouts.
OF_LABELS = ("teacher_agreement", "topk_overlap", "teacher_entropy", "rollout_reverse_kl")
_GRAM = 4  # tokens that count as a repetition when they come again
_AGREES = (
    0.25  # below it the likeliest tokens of student and teacher are mostly others: early in training, or off its ground
)
_REPEATS = 0.5


@dataclass
class _Sums:
    sequences: int = 0
    rollouts: int = 0
    failures: int = 0
    tokens: int = 0
    truncated: int = 0
    age: int = 0
    repetition: float = 0.0


class RolloutFigures:
    """See module.

    Args:
        note: called with a sentence when the teacher is asked about garbage, once a run.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._sums = _Sums()
        self._warned = False

    def add(self, sequences: int, written: Written) -> None:
        """A step of so many sequences learns from these rollouts."""
        sums = self._sums
        sums.sequences += sequences
        for one in written:
            if isinstance(one, RolloutFailure):
                sums.failures += 1
                continue
            sums.rollouts += 1
            sums.tokens += one.token_ids.size
            sums.truncated += not one.finished
            sums.age += one.prompt.step - one.version
            sums.repetition += repetition(one)

    def into(self, logs: dict[str, float]) -> None:
        """Adds the figures since the last call to a log entry, and takes out those of labels where there was no rollout."""
        sums, self._sums = self._sums, _Sums()
        logs["on_policy_share"] = sums.rollouts / max(1, sums.sequences)
        if sums.failures:
            logs["rollout_failures"] = sums.failures
        if not sums.rollouts:
            for name in OF_LABELS:
                logs.pop(name, None)
            return
        logs["staleness"] = sums.age / sums.rollouts
        logs["rollout_tokens"] = sums.tokens / sums.rollouts
        logs["rollout_truncated"] = sums.truncated / sums.rollouts
        logs["rollout_repetition"] = sums.repetition / sums.rollouts
        self._warn(logs)

    def _warn(self, logs: dict[str, float]) -> None:
        agreement, repeated = logs.get("teacher_agreement", 1.0), logs["rollout_repetition"]
        if self._warned or (agreement >= _AGREES and repeated <= _REPEATS):
            return
        self._warned = True
        self._note(
            f"the teacher is asked about sequences that are far from its own: its likeliest token is the student's in {agreement:.0%} of "
            f"the rows, and {repeated:.0%} of the rollouts' {_GRAM}-grams are repetitions; learn off-policy for longer first "
            "(on_policy.share.warmup), or lower on_policy.temperature or on_policy.max_new_tokens"
        )


def repetition(rollout: Rollout) -> float:
    """The share of its 4-grams that have come before in it; 0 if it has none."""
    ids = rollout.token_ids
    if ids.size < _GRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, _GRAM)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)
