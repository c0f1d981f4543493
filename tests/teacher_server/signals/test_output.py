"""Device reductions against their definitions in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.signals import output, state
from teacher_server.signals.base import Rows
from teacher_server.signals.reduce import OutputHead, reduce
from teacher_server.signals.transfer import HostRows, ToHost
from teacher_wire.core.axes import Axis
from teacher_wire.score.signals import spec_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 299, 300])
def test_top_k_is_exact_in_ids_values_and_tail(dtype, k):
    torch.manual_seed(0)
    z = (torch.randn(20, 300) * 4).to(dtype)
    lse, _ = output.lse_and_label(z, torch.zeros(20, dtype=torch.long))
    ids, values, fast_lse, tail = output.top_k(z, k)
    torch.testing.assert_close(fast_lse, lse)
    wide = z.double().numpy()
    order = np.lexsort((np.broadcast_to(np.arange(300), wide.shape), -wide), axis=-1)  # falling logit, then rising id
    np.testing.assert_array_equal(ids.numpy(), order[:, :k])
    np.testing.assert_array_equal(values.double().numpy(), np.take_along_axis(wide, order[:, :k], -1))
    probabilities = np.exp(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))
    rest = np.take_along_axis(probabilities, order[:, k:], -1).sum(-1)
    np.testing.assert_allclose(np.exp(tail.double().numpy()), rest, atol=1e-6)
    if k == 300:
        assert (tail == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "k"), [(5000, 1), (5003, 64), (4096, 64), (9999, 200), (700, 699)])
def test_two_stages_find_what_one_sort_finds(dtype, vocab, k):
    """With ties everywhere, zeros of both signs, infinities, and a vocabulary that no block divides."""
    generator = torch.Generator().manual_seed(vocab)
    z = (torch.randn(6, vocab, generator=generator) * 3).to(dtype)
    z[0] = z[0].round()
    z[1], z[1, ::3] = 0.0, -0.0
    z[2, : vocab // 2] = -torch.inf
    z[3] = torch.arange(vocab).to(dtype)
    z[4] = -z[3]
    wide = z.double().numpy()
    order = np.lexsort((np.broadcast_to(np.arange(vocab), wide.shape), -wide), axis=-1)
    np.testing.assert_array_equal(output.largest_ids(z, k).numpy(), np.sort(order[:, :k], axis=-1))


def test_a_tiny_tail_keeps_its_digits():
    """log(1 - sum) would say 0 or nothing; the tail is a sum of what is left."""
    z = torch.full((1, 100), -30.0)
    z[0, 3] = 30.0
    _, _, _, tail = output.top_k(z, 1)
    assert float(tail) == pytest.approx(np.log(99) - 60, rel=1e-5)


@given(st.lists(st.integers(-2, 2), min_size=5, max_size=30), st.integers(1, 5))
def test_ties_keep_the_lower_ids(values, k):
    z = torch.tensor([values], dtype=torch.bfloat16)
    ids, _, _, _ = output.top_k(z, k)
    assert ids[0].tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def test_label_and_lse_are_float32_of_the_whole_vocabulary():
    z = torch.randn(5, 50, dtype=torch.bfloat16) * 5
    labels = torch.tensor([0, 10, 49, 3, 3])
    lse, logp = output.lse_and_label(z, labels)
    expected = z.double().log_softmax(-1)
    assert lse.dtype == logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected[torch.arange(5), labels], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_named_ids_are_kept_beside_the_likeliest_others(dtype):
    torch.manual_seed(1)
    z = (torch.randn(12, 50) * 3).to(dtype)
    extra = torch.stack([torch.randperm(50)[:4] for _ in range(12)])
    ids, values, _, tail = output.top_k(z, 6, extra)
    wide = z.double().numpy()
    for row in range(12):
        named = set(extra[row].tolist())
        others = sorted(set(range(50)) - named, key=lambda i: (-wide[row, i], i))[:6]
        kept = sorted(named | set(others), key=lambda i: (-wide[row, i], i))
        assert ids[row].tolist() == kept
        np.testing.assert_array_equal(values[row].double().numpy(), wide[row, kept])
        p = np.exp(wide[row] - np.log(np.exp(wide[row]).sum()))
        np.testing.assert_allclose(np.exp(float(tail[row])), 1 - p[kept].sum(), atol=1e-6)


@pytest.mark.parametrize("width", [8, 16, 128, 200, 3584])
@pytest.mark.parametrize("loud", [False, True], ids=["even", "outlier_channels"])
def test_a_packed_state_is_within_half_a_step_of_its_block(width, loud):
    torch.manual_seed(0)
    states = torch.randn(7, width)
    if loud:
        states[:, :: max(1, width // 8)] *= 30
    packed = state.pack(states)
    seen = packed.unpack(torch.float32)
    step = packed.scales_CG.float().repeat_interleave(128, dim=1)[:, :width]
    outliers = torch.zeros_like(states, dtype=torch.bool).scatter(1, packed.outlier_ids_CO, True)
    error = (seen - states).abs()
    assert (error[~outliers] <= 0.505 * step[~outliers] + 1e-7).all()
    assert (error[outliers] <= states[outliers].abs() * 2**-8).all()
    assert (packed.int8_CD[outliers] == 0).all()
    if loud and width >= 128:  # the loud channels are apart: the rest keeps the resolution it would have without them
        assert step.max() < 5 / 127


def test_a_zero_state_stays_zero():
    assert (state.pack(torch.zeros(2, 130)).unpack(torch.float32) == 0).all()


@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
@pytest.mark.parametrize(
    "spec",
    [
        spec_of("full", 300),
        spec_of("top_k", 300, k=5, extra=2),
        spec_of("hidden", 300),
        spec_of("hidden", 300, reduction="int8"),
        spec_of("hidden", 300, "sampled"),
    ],
)
def test_rows_handed_over_in_chunks_are_those_gathered_at_once(spec, chunk_rows):
    torch.manual_seed(0)
    head = OutputHead(torch.randn(300, 256), None, 1.0, 0.0)
    hidden, labels = torch.randn(40, 256), torch.randint(0, 300, (40,))
    extra = torch.randperm(300)[:80].view(40, 2) if spec.extra_ids else None
    chunk_bytes = chunk_rows * 300 * 4
    for kept in (None, np.arange(40) % 3 == 0, np.ones(40, np.bool_)):
        rows_kept = np.ones(40, np.bool_) if kept is None else kept
        checked = rows_kept & (np.arange(40) % 5 == 0)
        asked = Rows(hidden, labels, extra, None, kept, checked if spec.check == "sampled" else None)
        expected = ToHost(reduce(head, asked, spec, chunk_bytes)).wait()
        rows = HostRows({Axis.ROW: 2 * int(rows_kept.sum()), Axis.CHECKED: 2 * int(checked.sum())}, held_bytes=0)
        for _ in range(2):  # two sequences of one answer
            assert reduce(head, asked, spec, chunk_bytes, rows) == {}
        found = rows.end().wait()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], torch.cat([tensor, tensor])), name


def test_an_answer_that_lacks_rows_is_our_own_fault():
    rows = HostRows({Axis.ROW: 3}, held_bytes=0)
    rows.add({"lse_N": torch.zeros(2)})
    with pytest.raises(AssertionError, match="lse_N"):
        rows.end()


@pytest.mark.parametrize("vocab", [1, 63, 64, 200, 290, 300])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_logits_of_some_ids_are_those_among_all(vocab, cap):
    """More are multiplied, so that rows begin at aligned places; none of them is seen."""
    generator = torch.Generator().manual_seed(0)
    weight_VD, bias_V, state_CD = (torch.randn(*size, generator=generator) for size in ((300, 16), (300,), (7, 16)))
    head = OutputHead(weight_VD, bias_V, 0.5, cap)
    found = head.logits(state_CD, vocab)
    expected = 0.5 * (state_CD @ weight_VD.T + bias_V)
    expected = cap * torch.tanh(expected / cap) if cap else expected
    assert found.shape == (7, vocab) and found.stride() == (min(300, -(-vocab // 64) * 64), 1)
    torch.testing.assert_close(found, expected[:, :vocab])
