from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.errors import ConfigError
from student_trainer.schedules import KINDS, STREAMS, Schedule, permutation, philox_4x32, uniform


@pytest.mark.parametrize(
    ("kind", "quarter", "half"),
    [
        ("constant", 8.0, 8.0),
        ("linear", 6.3, 4.6),
        ("cosine", 4.6 + 3.4 * math.cos(math.pi / 4), 4.6),
        ("exponential", 8 * (1.2 / 8) ** 0.25, math.sqrt(8 * 1.2)),
    ],
)
def test_temperature_from_8_to_1_2(kind: str, quarter: float, half: float) -> None:
    tau = Schedule(kind, 8.0, 1.2, steps=100)  # type: ignore[arg-type]
    assert [tau.at(25), tau.at(50)] == pytest.approx([quarter, half], rel=1e-12)
    assert tau.at(0) == 8.0
    assert tau.at(100) == tau.at(10**9) == (8.0 if kind == "constant" else 1.2)


@given(st.sampled_from(KINDS), st.floats(0.01, 100), st.floats(0.01, 100), st.integers(1, 50), st.integers(0, 200))
def test_between_its_ends_and_monotone(kind: str, start: float, end: float, steps: int, step: int) -> None:
    schedule = Schedule(kind, start, end, steps)  # type: ignore[arg-type]
    now, later = schedule.at(step), schedule.at(step + 1)
    slack = 1e-9 * max(start, end)
    assert min(start, end) - slack <= now <= max(start, end) + slack
    assert (later - now) * (end - start) >= -slack * abs(end - start)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="'step' is unknown; choose from constant, linear"):
        Schedule("step", 1, 2, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        Schedule("linear", 1, 2, 0)
    with pytest.raises(ConfigError, match="both ends above 0"):
        Schedule("exponential", 1, 0, 3)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors, philox4x32 10
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_is_philox(counter: list[int], key: tuple[int, int], words: str) -> None:
    assert " ".join(f"{w:08x}" for w in philox_4x32(np.array([counter], np.uint32), key)[0]) == words


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> str:
    """A second stream, which nothing of ours draws from yet."""
    monkeypatch.setitem(STREAMS, "other", 1)
    return "other"


def test_uniform_is_made_of_its_words(other: str) -> None:
    high, low, *_ = (int(w) for w in philox_4x32(np.array([[5, 0, 3, 0]], np.uint32), (42, STREAMS[other]))[0])
    assert uniform(42, other, 5, 3) == ((high << 21) | (low >> 11)) / 2**53
    big, *_ = philox_4x32(np.array([[0, 2, 1, 1]], np.uint32), (42, STREAMS["data"]))[0]
    assert int(uniform(42, "data", 2 << 32, (1 << 32) + 1) * 2**32) == big


def test_the_numbers_are_those_of_every_run_so_far() -> None:
    """Recorded; a change of library that moves one of them changes the order of rows of every run that is resumed."""
    assert uniform(42, "data", 5, 3).hex() == "0x1.cdaf40c17d4e4p-3"
    assert permutation(0, 0, 12).tolist() == [2, 11, 10, 8, 0, 6, 1, 5, 7, 9, 3, 4]
    assert permutation(7, 3, 12).tolist() == [9, 11, 4, 1, 2, 0, 3, 6, 5, 7, 8, 10]


def test_numpys_philox_is_another_generator() -> None:
    """Why ours stays: numpy has Philox-4x64 alone, whose words no choice of counter and key makes those of Philox-4x32."""
    ours = philox_4x32(np.array([[0, 0, 0, 0]], np.uint32), (0, 0))[0].tobytes()
    for counter in range(3):
        theirs = np.random.Philox(counter=counter, key=0)
        assert theirs.state["state"]["key"].dtype == np.uint64 and ours[:8] not in theirs.random_raw(8).tobytes()


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(STREAMS)), st.integers(0, 2**40), st.integers(0, 2**40))
def test_uniform_is_pure_and_in_range(seed: int, stream: str, step: int, slot: int) -> None:
    value = uniform(seed, stream, step, slot)
    assert 0 <= value < 1
    assert uniform(seed, stream, step, slot) == value


def test_every_argument_counts(other: str) -> None:
    values = [
        uniform(0, "data", 0, 0),
        uniform(1, "data", 0, 0),
        uniform(0, other, 0, 0),
        uniform(0, "data", 1, 0),
        uniform(0, "data", 0, 1),
    ]
    assert len(set(values)) == 5
    many = np.array([uniform(7, other, step, slot) for step in range(40) for slot in range(25)])
    assert abs(many.mean() - 0.5) < 0.04
    assert abs(many.std() - 12**-0.5) < 0.02


def test_streams_keep_their_numbers() -> None:
    assert STREAMS == {"data": 0, "on_policy": 1, "rollout": 2, "curriculum": 3, "curriculum pack": 4}


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation(n: int) -> None:
    order = permutation(3, 1, n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, permutation(3, 1, n))


def test_permutations_differ_by_seed_and_epoch_and_are_pinned() -> None:
    orders = [permutation(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    keys = [uniform(0, "data", 0, slot) for slot in range(8)]
    assert permutation(0, 0, 8).tolist() == sorted(range(8), key=keys.__getitem__)


def test_randomness_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="'dropout' is unknown; choose from data"):
        uniform(0, "dropout", 0, 0)
    with pytest.raises(ConfigError, match="seed must lie in"):
        uniform(2**32, "data", 0, 0)
    with pytest.raises(ConfigError, match="must not be negative"):
        uniform(0, "data", -1, 0)
    with pytest.raises(ConfigError, match="must not be negative"):
        uniform(0, "data", 0, -1)
