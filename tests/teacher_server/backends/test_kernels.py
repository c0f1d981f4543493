"""The Triton kernels against their plain versions, on a CUDA device; elsewhere there is nothing to test."""

import numpy as np
import pytest
import torch

from teacher_server.backends.transformers import attention, attention_kernel, kernels, layer_ops
from teacher_server.backends.transformers.packing import pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize(("heads", "groups", "channels"), [(4, 2, 32), (6, 2, 64), (28, 4, 128)])
def test_attention_over_segments(shared, heads, groups, channels):
    generator = np.random.default_rng(0)
    sequences = [generator.integers(0, 9, n).astype(np.int32) for n in (200, 130, 64, 300, 2, 127)]
    for ids in (sequences[1], sequences[3]):
        ids[:100] = sequences[0][:100]
    layout = pack(sequences, shared)
    packing = attention.Packing.of(layout, CUDA)
    torch.manual_seed(0)
    rows = torch.randn(layout.tokens, heads + 2 * groups, channels, device=CUDA, dtype=torch.bfloat16)
    query, key, value = rows.split([heads, groups, groups], dim=1)
    assert attention_kernel.usable(query)
    found = attention.attend(query, key, value, packing, channels**-0.5).float()
    expected = attention.attend(query.float(), key.float(), value.float(), packing, channels**-0.5)
    assert (found - expected).norm() / expected.norm() < 4e-3


@pytest.mark.parametrize("width", [200, 3584])
def test_steps_of_a_layer(width):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 50, width, device=CUDA, dtype=torch.bfloat16)
    weight = torch.rand(width, device=CUDA, dtype=torch.bfloat16)
    near = {"atol": 0.02, "rtol": 0.01}
    for other in (None, residual):
        found, expected = (module.add_rms_norm(x, other, weight, 1e-6) for module in (kernels, layer_ops))
        torch.testing.assert_close(found[0], expected[0], **near)
        assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(kernels.silu_mul(x)[0], layer_ops.silu_mul(x)[0], **near)
    cos, sin = torch.rand(2, 50, 8, device=CUDA, dtype=torch.bfloat16)
    turned, plain = x.view(50, -1, 8).clone(), x.view(50, -1, 8).clone()
    kernels.rotate(turned[:, :5], cos, sin)
    layer_ops.rotate(plain[:, :5], cos, sin)
    torch.testing.assert_close(turned, plain, **near)
    assert torch.equal(turned[:, 5:], x.view(50, -1, 8)[:, 5:])


def test_float8_rows_are_the_plain_ones():
    torch.manual_seed(0)
    x = torch.randn(50, 400, device=CUDA, dtype=torch.bfloat16)
    for make in (lambda m: m.to_float8(x), lambda m: m.silu_mul(x, float8=True)):
        (found, scale), (expected, plain_scale) = make(kernels), make(layer_ops)
        torch.testing.assert_close(scale, plain_scale)
        torch.testing.assert_close(found.float() * scale, expected.float() * plain_scale, atol=0.02, rtol=0.07)
