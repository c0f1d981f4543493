"""Rollouts as training examples: the prompt of a row, and what the student has written behind it as targets.

In: a rollout; out: an example. Token ids travel: text is never tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from student_trainer.data.dataset import Example
from student_trainer.rollout.sample import Rollout


@dataclass(frozen=True, eq=False)
class RolloutExample(Example):
    """An example whose answer the student has written.

    Attributes:
        sampled_logp_N: float32 [N], of its targets, as `Rollout.logp_n`.
        version: optimizer steps behind the weights that wrote it.
        likeliest_NM: int32 [N, M], as `Rollout.likeliest_nM`.
    """

    sampled_logp_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    version: int = 0
    likeliest_NM: np.ndarray | None = None


def example_of(rollout: Rollout, row: Example | None = None) -> RolloutExample:
    """The prompt and its completion, every token of which is a target and weighs as the row's last answer does at its end (that of a trace
    is the answer itself, behind the reasoning); the last one of a completion that was cut off weighs nothing.

    Args:
        rollout: the completion.
        row: whose prompt it is, for the weight of its last answer and for what the teacher reads in its place (`teacher.context`).
    """
    prompt, tokens = rollout.prompt, rollout.token_ids.size
    token_ids = np.concatenate([prompt.token_ids, rollout.token_ids]).astype(np.int32)
    loss_mask = np.zeros(token_ids.size, np.bool_)
    loss_mask[-tokens:] = True
    own = np.float32(1) if row is None or row.weights is None else row.weights[np.flatnonzero(row.loss_mask)[-1]]
    weights = None
    if own != 1 or not rollout.finished:
        weights = np.full(token_ids.size, own, np.float32)
        weights[-1] *= rollout.finished
    key = f"{prompt.key}[rollout {prompt.step}.{prompt.slot}]"
    seen = row.teacher.answered(rollout.token_ids) if row is not None and row.teacher is not None else None
    tags = row.tags if row is not None else ()
    views = {name: view.answered(rollout.token_ids) for name, view in row.views.items()} if row is not None else {}
    return RolloutExample(
        token_ids, loss_mask, 0, key, weights, seen, tags, views,
        sampled_logp_N=rollout.logp_n, version=rollout.version, likeliest_NM=rollout.likeliest_nM,
    )  # fmt: skip
