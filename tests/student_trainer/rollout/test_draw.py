"""One token from one uniform, against the definition in plain Python."""

import numpy as np
import pytest
import torch

from student_trainer.rollout.engines.draw import draw


def by_hand(z_V, u, temperature, top_p):
    """Inverse CDF in float64: the id and its log-probability before top_p."""
    z_V = z_V.astype(np.float64) / temperature
    p_V = np.exp(z_V - z_V.max())
    p_V /= p_V.sum()
    order_V = np.argsort(-p_V, kind="stable") if top_p < 1 else np.arange(p_V.size)
    kept = []
    for token in order_V:
        kept.append(token)
        if top_p < 1 and p_V[kept].sum() >= top_p:
            break
    cdf_K = np.cumsum(p_V[kept])
    token = kept[int(np.searchsorted(cdf_K, u * cdf_K[-1], side="right"))]
    return token, np.log(p_V[token])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4])
def test_it_is_the_inverse_of_the_distribution_function(temperature, top_p):
    rng = np.random.default_rng(0)
    z_BV, uniform_B = (2 * rng.standard_normal((200, 40))).astype(np.float32), rng.random(200)
    ids_B, logp_B = draw(torch.from_numpy(z_BV), torch.from_numpy(uniform_B), temperature, top_p)
    wanted = [by_hand(z_V, u, temperature, top_p) for z_V, u in zip(z_BV, uniform_B, strict=True)]
    assert ids_B.tolist() == [int(token) for token, _ in wanted]
    np.testing.assert_allclose(logp_B.numpy(), [logp for _, logp in wanted], atol=1e-5)


def test_frequencies_are_probabilities():
    z_V = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0])
    uniform_B = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ids_B, _ = draw(z_V.expand(20_000, 5), uniform_B, 1.0, 1.0)
    np.testing.assert_allclose(np.bincount(ids_B, minlength=5) / 20_000, z_V.softmax(-1), atol=1e-4)


def test_the_ends_of_the_interval_give_ids_that_have_a_probability():
    z_V = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf])
    last = 1 - 2.0**-53
    ids_B, _ = draw(z_V.expand(2, 4), torch.tensor([0.0, last], dtype=torch.float64), 1.0, 1.0)
    assert ids_B.tolist() == [1, 2]


def test_a_nucleus_of_almost_nothing_is_the_likeliest_id():
    z_BV = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    ids_B, _ = draw(z_BV, torch.linspace(0, 0.99, 50, dtype=torch.float64), 1.0, 1e-9)
    assert torch.equal(ids_B, z_BV.argmax(-1))
