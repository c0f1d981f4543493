"""A sequence that makes its step fail is found within a logarithm of steps, whenever it came and whichever token it fails at."""

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.config.server import GenerationConfig
from teacher_server.decoding.sequence_queue import Sequence, SequenceQueue
from teacher_wire.generate.messages import SamplingSpec

TOKENS = 3  # what every sequence writes
SPEC = SamplingSpec(max_new_tokens=8)


def sequences_of(call: int, count: int, numbers: Iterator[int]) -> Iterator[Sequence]:
    for index in range(count):
        yield Sequence(next(numbers), call, 0, index, np.array([call], np.int32), SPEC)


class Replica:
    """A queue, and steps that fail while they hold a sequence of `poison` that has written `at` tokens."""

    def __init__(self, max_running: int, poison: int, at: int) -> None:
        self.queue = SequenceQueue(GenerationConfig(max_running=max_running))
        self.poison, self.at = poison, at
        self.written: dict[int, int] = {}
        self.failures = self.largest = 0
        self.blamed: list[int] = []
        self.ended: list[int] = []

    def step(self) -> bool:
        """As `SteppedGeneration` makes one; False if there was nothing to do."""
        joining = self.queue.admit()
        held = list(self.queue.running.values())
        if not held:
            return False
        self.written = {sequence.number: self.written.get(sequence.number, 0) for sequence in held}
        if any(s.call == self.poison and self.written[s.number] >= self.at for s in held):
            self.failures += 1
            self.largest = max(self.largest, len(held))
            self.written = {}
            if len(held) > 1:
                self.queue.narrow(joining, memory=False)
                return True
            self.blamed.append(held[0].call)
            self.queue.end(held[0].number)
            self.queue.drop(held[0].call)
            return True
        self.queue.stepped()
        for sequence in held:
            self.written[sequence.number] += 1
            if self.written[sequence.number] == TOKENS:
                self.ended.append(sequence.call)
                self.queue.end(sequence.number, TOKENS)
        return True


@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    at=st.integers(0, TOKENS - 1),
    max_running=st.sampled_from([1, 2, 3, 4, 8, 32]),
)
def test_who_is_to_blame_is_found_in_few_steps(seed, counts, at, max_running):
    draw = random.Random(seed)
    poison = draw.randrange(len(counts))
    replica, numbers = Replica(max_running, poison, at), iter(range(10**6))
    coming = list(enumerate(counts))
    draw.shuffle(coming)
    steps = 0
    while True:
        while coming and draw.random() < 0.5:
            call, count = coming.pop()
            replica.queue.add(f"tenant {call}", call, sequences_of(call, count, numbers), count, 9 * count)
        if not replica.step() and not coming:
            break
        steps += 1
        assert steps < 10_000, "nobody ends and nobody is to blame"
    assert replica.blamed == [poison]
    others = [call for call, count in enumerate(counts) if call != poison for _ in range(count)]
    assert sorted(replica.ended) == others
    assert replica.failures <= math.log2(max(1, replica.largest)) + 2
    assert not replica.queue.running and not replica.queue.begin_again and not replica.queue.waiting


@pytest.mark.parametrize("at", range(TOKENS))
def test_three_that_let_each_other_in_for_ever(at):
    """The sequence to blame came first and fails later than at its first token; it used to be let in second each time."""
    replica, numbers = Replica(8, poison=0, at=at), iter(range(100))
    for call in range(3):
        replica.queue.add(f"tenant {call}", call, sequences_of(call, 1, numbers), 1, 9)
        replica.step()
    for _ in range(50):
        replica.step()
    assert replica.blamed == [0] and sorted(replica.ended) == [1, 2]


@pytest.mark.parametrize("memory", [True, False])
def test_a_failed_step_of_which_everything_was_taken_back_narrows_nothing(memory):
    """Whoever asked has gone while the model was set back: there is nobody to blame, and no cache of half of nothing."""
    queue, numbers = SequenceQueue(GenerationConfig(max_running=8)), iter(range(100))
    queue.add("tenant", 0, sequences_of(0, 8, numbers), 8, 72)
    joining = queue.admit()
    queue.drop(0)
    queue.narrow(joining, memory=memory)
    queue.add("tenant", 1, sequences_of(1, 8, numbers), 8, 72)
    assert len(queue.admit()) == 8


@given(seed=st.integers(0, 2**32), most=st.integers(1, 7))
def test_want_of_memory_ends_where_few_enough_run_and_whoever_leaves_holds_nobody_up(seed, most):
    """Steps of more than `most` sequences fail; calls are taken back at any time."""
    draw, numbers = random.Random(seed), iter(range(10**6))
    queue, written, ended, dropped, steps = SequenceQueue(GenerationConfig(max_running=16)), {}, [], set(), 0
    for call in range(6):
        queue.add(f"tenant {call}", call, sequences_of(call, 5, numbers), 5, 45)
    while True:
        joining = queue.admit()
        if draw.random() < 0.05:
            gone = draw.randrange(6)
            dropped.add(gone)
            queue.drop(gone)
        held = list(queue.running.values())
        if not held and not queue.begin_again and not queue.waiting:
            break
        steps += 1
        assert steps < 2000, "nobody ends"
        if len(held) > most:
            queue.narrow(joining, memory=True)
            continue
        queue.stepped()
        for sequence in held:
            written[sequence.number] = written.get(sequence.number, 0) + 1
            if written[sequence.number] >= TOKENS:
                ended.append(sequence.call)
                queue.end(sequence.number, TOKENS)
    assert all(ended.count(call) == 5 for call in range(6) if call not in dropped)


def test_what_was_under_suspicion_and_is_taken_back_holds_nobody_up():
    queue, numbers = SequenceQueue(GenerationConfig(max_running=8)), iter(range(100))
    queue.add("tenant", 0, sequences_of(0, 8, numbers), 8, 72)
    queue.narrow(queue.admit(), memory=False)
    queue.add("tenant", 1, sequences_of(1, 8, numbers), 8, 72)
    assert len(queue.admit()) == 4
    queue.drop(0)
    assert len(queue.admit()) == 8
