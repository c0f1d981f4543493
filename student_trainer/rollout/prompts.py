"""The prompts of a run's rollouts, the longest sequence they may become, and the ids that end one.

In: tokenised rows, their order, a plan; out: prompts as token ids. A row's prompt is all before its last answer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example, IndexedExample, TokenizedDataset
from student_trainer.data.teacher_view import TeacherView
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.rollout.sample import RolloutPrompt


@dataclass(frozen=True)
class Room:
    """How long a sequence may become.

    Attributes:
        max_new_tokens: of a completion.
        student: tokens that the student has positions for; None if it knows no limit.
        teacher: tokens of a sequence that the teacher takes; None if there is none yet.
    """

    max_new_tokens: int
    student: int | None
    teacher: int | None

    def hindrance(self, row: Example) -> str:
        """Why the prompt of a row cannot be answered; empty if it can."""
        if not prompt_length(row):
            return "its prompt is empty"
        for whose, limit, read in (("student", self.student, row), ("teacher", self.teacher, row.asked)):
            tokens = prompt_length(read)
            if limit is not None and tokens + self.max_new_tokens > limit:
                return (
                    f"its prompt of {tokens} tokens and on_policy.max_new_tokens={self.max_new_tokens} are more than the {limit} tokens "
                    f"that the {whose} can read"
                )
        return ""


class Prompts:
    """See module.

    Args:
        data, order: the rows, and which of them each step holds.
        plan: which places of a window are rollouts.
        room: for completions.
    """

    def __init__(self, data: TokenizedDataset, order: RunOrder, plan: RolloutPlan, room: Room) -> None:
        self._data = data
        self._order = order
        self._plan = plan
        self._room = room

    def row(self, step: int, slot: int) -> IndexedExample:
        """The row at a place of the run."""
        return self._data[self._order[step * self._plan.window + slot]]

    def of(self, step: int) -> list[RolloutPrompt]:
        """The prompts of a step, in the order of its places."""
        found = []
        for place in self._plan.places(step):
            example = self.row(step, place.row).example
            ids = example.token_ids[: prompt_length(example)]
            found.append(RolloutPrompt(step, place.slot, ids, example.key))
        return found

    def hindrances(self, step: int) -> list[str]:
        """Why each of the prompts of a step cannot be answered; empty where it can."""
        return [self._room.hindrance(self.row(step, place.row).example) for place in self._plan.places(step)]


def prompt_length(read: Example | TeacherView) -> int:
    """Tokens before the last answer of a row, all that an inference prompt of it holds."""
    targets = np.flatnonzero(read.loss_mask)
    breaks = np.flatnonzero(np.diff(targets) > 1)
    return int(targets[breaks[-1] + 1 if breaks.size else 0])


def stop_ids(tokenizer: Any, model: Any, data: TokenizedDataset) -> frozenset[int]:
    """Ids that end a completion: those of generation_config.json, the tokenizer's eos, and what the template ends an answer with.

    The last is found in the rows: a special token that ends an answer. An answer that was cut short may end with another one, so an id
    counts that ends at least a tenth of the rows.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    special = set(tokenizer.all_special_ids) | {
        token_id for token_id, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    ends = Counter(int(row.example.token_ids[np.flatnonzero(row.example.loss_mask)[-1]]) for row in data)
    of_template = {token_id for token_id, count in ends.items() if token_id in special and 10 * count >= len(data)}
    return frozenset(
        {int(token_id) for token_id in (*listed, tokenizer.eos_token_id) if token_id is not None} | of_template
    )
