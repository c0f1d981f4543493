"""What writes rollouts, and what one is.

In: prompts as token ids; out: completions as token ids. Text is never tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RolloutPrompt:
    """What a completion is asked for.

    Attributes:
        step, slot: of the run's windows; with the run's seed they name the random stream of the sample, so that company, order and
            resumption change nothing.
        token_ids: int32 [L], the inference prompt.
        key: of the row, for errors.
    """

    step: int
    slot: int
    token_ids: np.ndarray
    key: str


@dataclass(frozen=True, eq=False)
class Rollout:
    """A completion that the student has written.

    Attributes:
        prompt: what it was asked.
        token_ids: int32 [n], n >= 1, the end of turn included where there is one.
        logp_n: float32 [n], log-probabilities of the tokens under the weights and temperature that sampled them, before top_p.
        finished: it ends with an end-of-turn token, not at `max_new_tokens`.
        version: optimizer steps behind the weights that wrote it.
        likeliest_nM: int32 [n, M], the student's own M likeliest ids at each token (before temperature); None if M = 0.
    """

    prompt: RolloutPrompt
    token_ids: np.ndarray
    logp_n: np.ndarray
    finished: bool
    version: int
    likeliest_nM: np.ndarray | None = None


class Sampler(Protocol):
    """Writes completions with the weights it was last given. One thread calls it at a time."""

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Takes the student's trained parameters by their names in the student (all others are those it was made with).

        Raises:
            RolloutError: they do not fit, or the engine is gone.
        """

    def sample(self, prompts: Sequence[RolloutPrompt]) -> list[Rollout | RolloutFailure]:
        """One completion per prompt, in order. A prompt that cannot be answered is a `RolloutFailure` and harms no other.

        Raises:
            RolloutError: the engine is gone, or has no memory.
        """

    def close(self) -> None:
        """Ends the engine; may come twice."""


@dataclass(frozen=True)
class RolloutFailure:
    """A prompt that got no completion.

    Attributes:
        prompt: which.
        why: in a sentence that names value and limit.
    """

    prompt: RolloutPrompt
    why: str
