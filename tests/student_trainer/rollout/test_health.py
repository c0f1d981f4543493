"""Which rows the figures of rollouts look at."""

from types import SimpleNamespace

import pytest
import torch

from student_trainer.rollout.health import HealthTerm


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 10_088])
def test_rows_are_spread_over_all_whatever_the_default_dtype_is(count):
    sampled = torch.full((count + 40,), float("nan"))
    sampled[20 : 20 + count] = -1.0
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as another thread may do while it builds a model
    try:
        places = HealthTerm(lambda: None)._looked_at(SimpleNamespace(sampled_logp_N=sampled))
    finally:
        torch.set_default_dtype(before)
    assert len(places.unique()) == len(places) == min(32, count)
    assert places[0] == 20 and places[-1] == (20 if count == 1 else 19 + count)
