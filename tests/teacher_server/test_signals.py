"""Device reductions against their definitions in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.signals import output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 299, 300])
def test_top_k_is_exact_in_ids_values_and_tail(dtype, k):
    torch.manual_seed(0)
    z = (torch.randn(20, 300) * 4).to(dtype)
    lse, _ = output.lse_and_label(z, torch.zeros(20, dtype=torch.long))
    ids, values, tail = output.top_k(z, lse, k)
    wide = z.double().numpy()
    order = np.lexsort((np.broadcast_to(np.arange(300), wide.shape), -wide), axis=-1)  # falling logit, then rising id
    np.testing.assert_array_equal(ids.numpy(), order[:, :k])
    np.testing.assert_array_equal(values.double().numpy(), np.take_along_axis(wide, order[:, :k], -1))
    probabilities = np.exp(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))
    rest = np.take_along_axis(probabilities, order[:, k:], -1).sum(-1)
    np.testing.assert_allclose(np.exp(tail.double().numpy()), rest, atol=1e-6)
    if k == 300:
        assert (tail == -torch.inf).all()


def test_a_tiny_tail_keeps_its_digits():
    """log(1 - sum) would say 0 or nothing; the tail is a sum of what is left."""
    z = torch.full((1, 100), -30.0)
    z[0, 3] = 30.0
    lse, _ = output.lse_and_label(z, torch.tensor([3]))
    _, _, tail = output.top_k(z, lse, 1)
    assert float(tail) == pytest.approx(np.log(99) - 60, rel=1e-5)


@given(st.lists(st.integers(-2, 2), min_size=5, max_size=30), st.integers(1, 5))
def test_ties_keep_the_lower_ids(values, k):
    z = torch.tensor([values], dtype=torch.bfloat16)
    lse, _ = output.lse_and_label(z, torch.tensor([0]))
    ids, _, _ = output.top_k(z, lse, k)
    assert ids[0].tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def test_label_and_lse_are_float32_of_the_whole_vocabulary():
    z = torch.randn(5, 50, dtype=torch.bfloat16) * 5
    labels = torch.tensor([0, 10, 49, 3, 3])
    lse, logp = output.lse_and_label(z, labels)
    expected = z.double().log_softmax(-1)
    assert lse.dtype == logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected[torch.arange(5), labels], atol=1e-5, rtol=1e-5)
