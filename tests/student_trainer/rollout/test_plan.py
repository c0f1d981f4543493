"""Coins, groups and versions: pure functions of the step."""

import numpy as np
import pytest

from student_trainer.config.on_policy import OnPolicyConfig
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.schedules import uniform


def plan_of(steps=200, window=16, seed=3, **settings):
    return RolloutPlan(OnPolicyConfig(**settings), seed=seed, steps=steps, window=window)


def test_the_share_stays_then_rises_in_a_straight_line():
    plan = plan_of(share={"start": 0.1, "end": 0.9, "warmup": 0.2, "ramp": 0.4})
    assert [plan.share(step) for step in (0, 39, 40, 80, 120, 199)] == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.9, 0.9])
    sudden = plan_of(share={"start": 0.0, "end": 1.0, "warmup": 0.5, "ramp": 0.0})
    assert [sudden.share(step) for step in (99, 100)] == [0.0, 1.0]
    assert plan_of(share=0.25).share(7) == 0.25


def test_a_place_is_a_rollout_if_its_own_coin_says_so():
    plan = plan_of(share={"start": 0.0, "end": 0.7, "warmup": 0.1, "ramp": 0.5})
    for step in range(0, 200, 9):
        wanted = [slot for slot in range(16) if uniform(3, "on_policy", step, slot) < plan.share(step)]
        assert [place.slot for place in plan.places(step)] == wanted
        assert all(place.row == place.slot for place in plan.places(step))
    assert not plan.places(0) and plan_of(share=1.0).places(0) and not plan_of(share=0.0).has_any


def test_coins_have_the_share_as_their_mean():
    plan = plan_of(share=0.3, steps=1000)
    counts = np.array([len(plan.places(step)) for step in range(1000)])
    assert abs(counts.mean() / 16 - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 16_000)
    assert len({plan.places(step) for step in range(50)}) > 40


@pytest.mark.parametrize("group", [2, 3, 5])
def test_consecutive_rollouts_share_the_row_of_the_first(group):
    plan = plan_of(share=0.6, samples_per_prompt=group)
    for step in range(20):
        places = plan.places(step)
        for start in range(0, len(places), group):
            assert {place.row for place in places[start : start + group]} == {places[start].slot}
    assert [p.slot for p in plan.places(4)] == [p.slot for p in plan_of(share=0.6).places(4)]


@pytest.mark.parametrize(("staleness", "every"), [(0, 1), (1, 1), (3, 1), (4, 2), (4, 4), (5, 3)])
def test_versions_are_never_older_than_allowed_and_there_in_time(staleness, every):
    plan = plan_of(steps=40, share=1.0, max_staleness=staleness, sync_steps=every)
    versions = [plan.version(step) for step in range(40)]
    assert all(0 <= step - version <= staleness for step, version in enumerate(versions))
    assert all(version % every == 0 for version in versions) and versions == sorted(versions)
    if staleness:
        assert all(version < step for step, version in enumerate(versions) if step)  # written while another step trains
    assert sorted(step for version in set(versions) for step in plan.writers(version)) == list(range(40))
    assert all(plan.version(step) == version for version in set(versions) for step in plan.writers(version))
