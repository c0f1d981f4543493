"""What of a row is the student's prompt, which ids end its answer, and what the row says of the rollout in its place."""

from types import SimpleNamespace

import numpy as np
import pytest

from student_trainer.data.dataset import Example
from student_trainer.rollout.examples import example_of
from student_trainer.rollout.prompts import prompt_length, stop_ids
from student_trainer.rollout.sample import Rollout, RolloutPrompt


def example(mask, weights=None, ids=None):
    mask = np.array(mask, bool)
    ids = np.arange(len(mask)) if ids is None else ids
    return Example(np.array(ids, np.int32), mask, 0, "row", None if weights is None else np.array(weights, np.float32))


@pytest.mark.parametrize(
    ("mask", "length"),
    [([0, 0, 1, 1], 2), ([0, 1, 0, 1, 1], 3), ([0, 1, 1, 0, 0, 1, 0, 0, 1], 8), ([0, 1], 1), ([0, 1, 1, 0, 1, 1, 0], 4)],
)  # fmt: skip
def test_a_prompt_is_all_before_the_last_answer(mask, length):
    assert prompt_length(example(mask)) == length


def rollout(prompt_ids, tokens=3, finished=True):
    prompt = RolloutPrompt(2, 1, np.array(prompt_ids, np.int32), "row")
    return Rollout(prompt, np.arange(50, 50 + tokens, dtype=np.int32), np.zeros(tokens, np.float32), finished, 2)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("weight", [None, 1.0, 0.25])
def test_a_rollout_weighs_as_the_answer_whose_place_it_takes(weight, finished):
    """Of a row with two answers the last, at its end: that of a trace begins with its markup, which weighs little. An answer that was cut
    off is not taught to end there.
    """
    weights = None if weight is None else [0, 3.0, 3.0, 0, 0.0625, weight]
    row = example([0, 1, 1, 0, 1, 1], weights)
    found = example_of(rollout([0, 1, 2, 3], finished=finished), row)
    own = 1.0 if weight is None else weight
    assert found.loss_mask.tolist() == [False] * 4 + [True] * 3
    assert found.target_weights.tolist() == [own, own, own if finished else 0.0]


TOKENIZER = SimpleNamespace(
    eos_token_id=9,
    all_special_ids=(9, 8, 7),
    added_tokens_decoder={6: SimpleNamespace(special=True), 5: SimpleNamespace(special=False)},
)


def ending_with(*ends):
    return [SimpleNamespace(example=example([0, 1, 1], ids=[1, 2, end])) for end in ends]


def test_which_ids_end_an_answer():
    """A tenth of the rows make it the template's; fewer are answers that were cut short; no other than a special token does."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 4]))
    rows = ending_with(*[8] * 16, *[6] * 2, 7, 5)
    assert stop_ids(TOKENIZER, model, rows) == {3, 4, 9, 8, 6}
    assert stop_ids(TOKENIZER, SimpleNamespace(), ending_with(*[5] * 9, 1)) == {9}
