"""Which rows the figures of rollouts look at, and what they say of them, against loops over the definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from student_trainer.rollout.figures import repetition
from student_trainer.rollout.health import HealthTerm, _compared
from tests.student_trainer.losses.worlds import world


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


@pytest.mark.parametrize(("form", "kept"), [("full", 23), ("hidden", 23), ("top_k", 23), ("top_k", 6)])
def test_what_is_said_of_a_row(form, kept):
    """Of `top_k` the overlap is over so many ids as there are, and the entropy that of the kept ids and one for the rest."""
    w = world(seed=3, spread=1.5)
    rows = {"full": w.full_rows, "hidden": w.hidden_rows, "top_k": lambda: w.topk_rows(kept)}[form]()
    z = (w.hidden_ND @ w.weight_VD.T).numpy()
    same, shared, entropy, surer = (part.numpy() for part in _compared(torch.from_numpy(z), rows, w.labels_N))
    teacher = w.teacher_logits_NV.numpy()
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, z))
    top = min(8, kept)
    for n, label in enumerate(w.labels_N.tolist()):
        best_p, best_q = np.argsort(-p[n]), np.argsort(-q[n])
        assert bool(same[n]) == (best_p[0] == best_q[0])
        assert shared[n] == pytest.approx(len({*best_p[:top]} & {*best_q[:top]}) / top)
        outcomes = [*p[n][best_p[:kept]], *([p[n][best_p[kept:]].sum()] if kept < 23 else [])]
        assert entropy[n] == pytest.approx(-sum(x * np.log(x) for x in outcomes))
        assert surer[n] == pytest.approx(np.log(q[n, label]) - np.log(p[n, label]))
    assert 0 < same.mean() < 1 and 0 < shared.mean() < 1, "a world in which nothing or everything agrees tells nothing"


@pytest.mark.parametrize(
    ("ids", "share"),
    [([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([7] * 8, 0.8), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2), ([1, 2] * 4, 0.6)],
)
def test_repetition_is_the_share_of_4_grams_that_came_before(ids, share):
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    assert sum(gram in grams[:i] for i, gram in enumerate(grams)) / max(1, len(grams)) == pytest.approx(share)
    assert repetition(SimpleNamespace(token_ids=np.array(ids, np.int32))) == pytest.approx(share)
