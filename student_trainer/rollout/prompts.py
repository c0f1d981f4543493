"""The prompts of a run's rollouts, the longest sequence they may become, and the ids that end one.

In: tokenised rows, their order, a plan; out: prompts as token ids. A row's prompt is all before its last answer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example, IndexedExample, TokenizedDataset
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.rollout.sample import RolloutPrompt


class Prompts:
    """See module.

    Args:
        data, order: the rows, and which of them each step holds.
        plan: which places of a window are rollouts.
        longest: tokens of a sequence that student and teacher can both read; None if neither knows a limit.
        max_new_tokens: of a completion.
    """

    def __init__(
        self, data: TokenizedDataset, order: RunOrder, plan: RolloutPlan, longest: int | None, max_new_tokens: int
    ) -> None:
        self._data = data
        self._order = order
        self._plan = plan
        self._longest = longest
        self._most = max_new_tokens

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

    def hindrance(self, prompt: RolloutPrompt) -> str:
        """Why a prompt cannot be answered; empty if it can."""
        return hindrance(prompt.token_ids.size, self._longest, self._most)


def prompt_length(example: Example) -> int:
    """Tokens before the last answer of a row, all that an inference prompt of it holds."""
    targets = np.flatnonzero(example.loss_mask)
    breaks = np.flatnonzero(np.diff(targets) > 1)
    return int(targets[breaks[-1] + 1 if breaks.size else 0])


def hindrance(tokens: int, longest: int | None, max_new_tokens: int) -> str:
    """Why a prompt of so many tokens cannot be answered; empty if it can."""
    if tokens <= 1:
        return "it has no prompt: its first token is all that stands before its answer"
    if longest is not None and tokens + max_new_tokens > longest:
        return (
            f"its prompt of {tokens} tokens and on_policy.max_new_tokens={max_new_tokens} are more than the {longest} tokens that student "
            "and teacher can read"
        )
    return ""


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
