"""How far ahead: enough to hide the teacher's time, no more."""

import pytest

from student_trainer.labels.depth import FIRST, RESERVE, Depth


def settled(latency_s, interval_s, most=64):
    depth = Depth(most)
    for _ in range(60):
        depth.answered(latency_s)
        depth.taken(interval_s)
    return depth


@pytest.mark.parametrize(
    ("latency_s", "interval_s", "least", "most"),
    [(0.01, 1.0, RESERVE + 1, RESERVE + 1), (0.3, 0.1, 5, 6), (1.0, 0.1, 12, 13), (100.0, 0.1, 64, 64)],
)
def test_as_many_as_one_answer_takes_steps_and_some_in_reserve(latency_s, interval_s, least, most):
    assert least <= settled(latency_s, interval_s).batches <= most


def test_a_burst_is_always_covered_and_a_pause_counts_little():
    assert Depth(64, burst=16).batches == 16 + RESERVE and Depth(8, burst=16).batches == 8
    depth = Depth(64, burst=16)
    for _ in range(40):
        depth.answered(0.3)
        depth.taken(0.3)
    assert depth.batches == 16 + RESERVE
    steady = settled(1.0, 0.1)
    before = steady.batches
    steady.taken(60.0)  # an evaluation
    assert steady.batches >= before / 2


def test_bounded_by_what_is_allowed_and_by_one():
    assert settled(10.0, 0.1, most=3).batches == 3
    assert Depth(1).batches == 1 and Depth(64).batches == FIRST
    assert settled(1.0, 0.0).batches == 64, "a student that takes no time uses whatever it is given"


def test_answers_that_come_unevenly_need_more_and_a_lasting_change_is_followed():
    depth = settled(0.1, 0.1)
    before = depth.batches
    depth.answered(1.0)
    assert before + 5 <= depth.batches <= before + 15, "the next one may be as late"
    for _ in range(60):
        depth.answered(0.1)
    assert depth.batches <= before + 1
    for number in range(60):
        depth.answered(1.0 if number % 4 == 0 else 0.1)
    assert depth.batches >= 1.0 / 0.1, "covers the late ones"
    for _ in range(60):
        depth.answered(2.0)
    assert depth.batches >= RESERVE + 20
