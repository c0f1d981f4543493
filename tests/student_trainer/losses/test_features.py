"""Losses on features against formulas written out in numpy, float64, and their gradients against differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from student_trainer.errors import ConfigError
from student_trainer.losses.features import attention, ffn, labels, states
from student_trainer.losses.features.attention import AttentionStates
from student_trainer.losses.features.attention_term import AttentionTerm
from student_trainer.losses.features.ffn_term import FfnTerm
from student_trainer.losses.features.hidden_term import Basis, HiddenTerm, Projector, sample
from student_trainer.losses.features.layers import LayerPair, pairs_of, teacher_layers, uniform
from student_trainer.losses.features.term import FeatureWeight
from student_trainer.losses.term import FfnTap, StudentOutputs, SupervisedRows, TeacherLabels
from teacher_wire.core.batch import TokenBatch
from teacher_wire.score.signals import Attention, Ffn, LayerStates
from teacher_wire.testing.fake_features import pack_state
from tests.student_trainer.losses.worlds import grid_of

NEAR = dict(rtol=1e-9, atol=1e-11)


def noise(*shape, seed=0, grad=False):
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.requires_grad_(grad)


def checks(function, *tensors):
    """That gradients are those of differences."""
    assert torch.autograd.gradcheck(function, tensors)


# ------------------------------------------------------------- hidden states


def cosines(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_projected_objectives_are_their_formulas():
    guess, target = noise(7, 5, grad=True), noise(7, 5, seed=1)
    g, t = guess.detach().numpy(), target.numpy()
    np.testing.assert_allclose(states.proj_cos(guess, target).detach(), 1 - (cosines(g) * cosines(t)).sum(-1), **NEAR)
    step = np.abs(cosines(g) - cosines(t)) * math.sqrt(5)
    huber = np.where(step < 1, step**2 / 2, step - 0.5).mean(-1)
    np.testing.assert_allclose(states.proj_sl1(guess, target).detach(), huber, rtol=1e-5)  # 1e-6 below its roots
    checks(lambda x: states.proj_cos(x, target), guess)
    checks(lambda x: states.proj_sl1(x, target), guess)
    assert (
        float(states.proj_cos(3 * target, target).abs().max()) < 1e-12
        and float(states.proj_sl1(3 * target, target).max()) < 1e-9
    )


def test_the_sampled_objectives_are_their_formulas_and_know_no_width():
    ours, theirs = noise(9, 4, grad=True), noise(9, 6, seed=1)
    x, y = ours.detach().numpy(), theirs.numpy()
    centred = [cosines(z - z.mean(0)) for z in (x, y)]
    kernels = [z @ z.T for z in centred]
    np.testing.assert_allclose(states.gram(ours, theirs).detach(), ((kernels[0] - kernels[1]) ** 2).mean(), **NEAR)
    pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
    apart = [np.array([np.linalg.norm(z[i] - z[j]) for i, j in pairs]) for z in (x, y)]
    step = np.abs(apart[0] / apart[0].mean() - apart[1] / apart[1].mean())
    np.testing.assert_allclose(
        states.rkd(ours, theirs).detach(), np.where(step < 1, step**2 / 2, step - 0.5).mean(), **NEAR
    )
    for objective in (states.gram, states.cka, states.rkd):
        checks(lambda x, of=objective: of(x, theirs), ours)
        turned = torch.linalg.qr(noise(6, 6, seed=2)).Q
        assert float(objective(theirs @ turned * 2.5, theirs)) < 1e-9  # rotation and scale do not count


def hsic(x, y):
    """Song et al. 2012, equation 5, summed out: over all distinct i, j, q, r."""
    k, m = x @ x.T, y @ y.T
    n, total = len(x), 0.0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_cka_is_the_unbiased_estimator():
    x, y = noise(7, 3), noise(7, 4, seed=1)
    y[:, :3] += x
    a, b = x.numpy(), y.numpy()
    expected = hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))
    np.testing.assert_allclose(float(states.debiased_cka(x, y)), expected, rtol=1e-9)


@pytest.mark.parametrize("rows", [64, 256])
def test_debiased_cka_of_noise_is_near_nothing_where_the_plain_one_is_near_one(rows):
    found, plain = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(rows, width, generator=generator) for width in (512, 1024))
        found.append(float(states.debiased_cka(x, y)))
        x, y = x - x.mean(0), y - y.mean(0)
        plain.append(float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())))
    assert abs(np.mean(found)) < 0.03 and min(plain) > 0.6
    assert float(states.debiased_cka(x, x)) == pytest.approx(1, abs=1e-4)
    assert float(states.debiased_cka(x * 1e-6, x * 1e6)) == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------- attention


def attending(seed=0, *, softcap=0.0, window=None, tokens=150, grad=True):
    """Two key heads, four query heads."""
    query, key, plain, value = (
        noise(2, tokens, heads, 3, seed=seed + place, grad=grad) for place, heads in enumerate((4, 2, 2, 2))
    )
    return AttentionStates(query, key, plain, value, 0.7, softcap, window)


def maps(found, sequence, tokens):
    """[T, T] averaged over heads, by loops."""
    mean = np.zeros((tokens, tokens))
    for head in range(4):
        for row in range(tokens):
            low = 0 if found.window is None else max(0, row - found.window + 1)
            keys = found.key_BLGd[sequence, low : row + 1, head // 2].detach().numpy()
            scores = keys @ found.query_BLHd[sequence, row, head].detach().numpy() * found.scale
            if found.softcap:
                scores = found.softcap * np.tanh(scores / found.softcap)
            share = np.exp(scores - scores.max())
            mean[row, low : row + 1] += share / share.sum() / 4
    return mean


def pooled(mean, rows, block):
    tokens = len(mean)
    mean = mean.copy()
    mean[:, :4] = 0
    return np.stack([np.add.reduceat(mean[row], np.arange(0, tokens, block)) for row in rows])


@pytest.mark.parametrize("kind", [{}, {"softcap": 2.0}, {"window": 70}])
def test_pooled_maps_are_those_of_the_whole_matrix(kind, monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK_BYTES", 4 * 4 * 130 * 7)  # chunks of seven rows
    found, rows = attending(**kind), torch.tensor([5, 64, 80, 81, 82, 83, 100, 101, 129])
    mass = pooled(maps(found, 1, 130), rows.tolist(), 16)
    logp_RP = attention.pooled_logp(found, grid_of(rows, 1), 16)
    there = mass > 0
    expected = np.log(np.where(there, mass, 1) / mass.sum(-1, keepdims=True))
    np.testing.assert_allclose(logp_RP.detach().numpy()[there], expected[there], rtol=1e-9, atol=1e-10)
    assert (logp_RP.detach().numpy()[~there] < -1e29).all()
    teacher = attending(9)
    theirs = pooled(maps(teacher, 0, 130), rows.tolist(), 16)
    theirs = np.where(there, theirs, 0)
    kl_R, enough_R = attention.pooled_kl(logp_RP, torch.from_numpy(pooled(maps(teacher, 0, 130), rows.tolist(), 16)))
    share = theirs / theirs.sum(-1, keepdims=True)
    by_hand = (share * (np.log(np.where(there, share, 1)) - np.where(there, expected, 0))).sum(-1)
    np.testing.assert_allclose(kl_R.detach(), by_hand, rtol=1e-8, atol=1e-10)
    assert enough_R.all() and (kl_R > -1e-12).all()
    assert not attention.pooled_kl(logp_RP, torch.full((9, 9), 0.004).double())[1].any()  # all mass at the sinks


@pytest.mark.parametrize("at_a_time", [1, 3, 4, 9, 1000])
def test_rows_of_several_sequences_are_each_as_alone(at_a_time, monkeypatch):
    """However the scores are cut: by rows of a sequence, whole sequences, or not at all."""
    found = attending(tokens=40)
    positions, sequences = np.array([6, 30, 5, 17, 21, 33]), np.array([0, 0, 1, 1, 1, 1])
    plain_BTF = found.plain_key_BLGd.flatten(-2)
    theirs_BTF = noise(2, 40, 12)
    alone = [grid_of(torch.from_numpy(positions[sequences == b]), b) for b in (0, 1)]
    maps_alone = [attention.pooled_logp(found, grid, 8) for grid in alone]
    kl_alone = [attention.relation_kl(plain_BTF[b : b + 1, : alone[b].tokens], theirs_BTF[b : b + 1, : alone[b].tokens], alone[b], 2) for b in (0, 1)]  # fmt: skip
    monkeypatch.setattr(attention, "_CHUNK_BYTES", 4 * 4 * 34 * at_a_time)
    grid = attention.RowGrid.of(positions, sequences, torch.device("cpu"))
    together = attention.pooled_logp(found, grid, 8)
    assert together.shape == (6, 5) and grid.tokens == 34
    for part, own in zip(together.split([2, 4]), maps_alone, strict=True):
        torch.testing.assert_close(part[:, : own.shape[1]].clamp_min(-1e9), own.clamp_min(-1e9), rtol=1e-10, atol=1e-10)
        assert (part[:, own.shape[1] :] < -1e29).all()
    torch.testing.assert_close(attention.relation_kl(plain_BTF[:, :34], theirs_BTF[:, :34], grid, 2), torch.cat(kl_alone), rtol=1e-10, atol=1e-10)  # fmt: skip


@pytest.mark.parametrize("kind", [{}, {"softcap": 2.0}, {"window": 12}])
def test_the_gradients_of_pooled_maps_are_those_of_differences(kind):
    found, rows = attending(tokens=26, **kind), torch.tensor([0, 6, 21, 25])
    teacher_RP = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).double()

    def run(query, key):
        given = AttentionStates(query, key, key, key, found.scale, found.softcap, found.window)
        return attention.pooled_kl(attention.pooled_logp(given, grid_of(rows, 0), 8), teacher_RP)[0][1:]

    checks(run, found.query_BLHd[:1].detach().requires_grad_(), found.key_BLGd[:1].detach().requires_grad_())
    loss = attention.pooled_logp(found, grid_of(rows, 0), 8).clamp_min(-50).sum()
    loss.backward()
    assert found.query_BLHd.grad.isfinite().all() and found.key_BLGd.grad.isfinite().all()  # of the row among sinks too


@pytest.mark.parametrize("at_a_time", [2, 1000])
@pytest.mark.parametrize("kind", [{}, {"softcap": 2.0, "window": 9}])
def test_the_gradients_of_several_sequences_are_those_of_differences_however_the_scores_are_cut(
    kind, at_a_time, monkeypatch
):
    """Of three sequences the second has no row; rows in no order of length, some alone at the end of a block of keys."""
    monkeypatch.setattr(attention, "_CHUNK_BYTES", 4 * 4 * 18 * at_a_time)
    grid = attention.RowGrid.of(np.array([4, 7, 8, 15, 5, 17]), np.array([0, 0, 0, 0, 2, 2]), torch.device("cpu"))
    query, key = noise(3, 18, 4, 1, grad=True), noise(3, 18, 2, 1, seed=1, grad=True)
    weight_NP = noise(6, 5, seed=2)

    def run(query, key):
        found = attention.pooled_logp(AttentionStates(query, key, key, key, 0.7, **kind), grid, 4)
        return (torch.where(found > -1e29, found, 0) * weight_NP).sum()

    checks(run, query, key)
    theirs = noise(2, 18, 6, seed=3)
    checks(lambda x: (attention.relation_kl(x[[0, 2], :18].flatten(-2), theirs, grid, 2) * weight_NP[:, 0]).sum(), noise(3, 19, 2, 1, seed=4, grad=True))  # fmt: skip


def test_blocks_of_next_to_no_mass_keep_their_logarithm_and_their_gradient():
    """In float32 a probability below 1e-38 is 0: the sums are of logarithms."""
    query, key = torch.zeros(1, 40, 4, 3), torch.zeros(1, 40, 2, 3)
    query[..., 0], key[:, :20, :, 0] = 300.0, 1.0
    query, key = query.requires_grad_(), key.requires_grad_()
    logp_RP = attention.pooled_logp(AttentionStates(query, key, key, key, 1.0), grid_of(torch.tensor([39]), 0), 20)
    assert float(logp_RP[0, 1].detach()) == pytest.approx(-300 + math.log(20 / 16), rel=1e-6)
    logp_RP[0, 1].backward()
    assert float(key.grad[0, 20:, :, 0].sum()) == pytest.approx(300, rel=1e-3)  # a nat per unit of score


@pytest.mark.parametrize("objective", ["pooled", "relation"])
def test_maps_are_not_held_for_the_backward_pass(objective):
    found, rows = attending(tokens=128), torch.arange(64, 128)
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if objective == "pooled":
            attention.pooled_logp(found, grid_of(rows, 0), 64)
        else:
            attention.relation_kl(found.value_BLGd[:1].flatten(-2), noise(1, 128, 6), grid_of(rows, 0), 2)
    one_map = 64 * 128 * 8
    assert sum(saved.values()) < one_map, "queries, keys and positions alone"


def test_relations_are_minilms_and_need_no_equal_heads(monkeypatch):
    ours, theirs, rows = noise(12, 8, grad=True), noise(12, 16, seed=1), torch.tensor([2, 7, 11])
    assert attention.relation_heads(8, 16) == 8 and attention.relation_heads(6, 16) == 2
    expected = []
    for row in rows.tolist():
        total = 0.0
        for head in range(4):
            each = []
            for x in (theirs.numpy(), ours.detach().numpy()):
                width = x.shape[1] // 4
                part = x[: row + 1, head * width : (head + 1) * width]
                score = part @ part[row] / math.sqrt(width)
                each.append(score - score.max() - math.log(np.exp(score - score.max()).sum()))
            total += (np.exp(each[0]) * (each[0] - each[1])).sum() / 4
        expected.append(total)
    np.testing.assert_allclose(
        attention.relation_kl(ours[None], theirs[None], grid_of(rows, 0), 4).detach(), expected, **NEAR
    )
    monkeypatch.setattr(attention, "_CHUNK_BYTES", 4 * 4 * 12)  # one row
    np.testing.assert_allclose(
        attention.relation_kl(ours[None], theirs[None], grid_of(rows, 0), 4).detach(), expected, **NEAR
    )
    checks(lambda x: attention.relation_kl(x[None], theirs[None], grid_of(rows, 0), 4), ours)
    assert float(attention.relation_kl(theirs[None], theirs[None], grid_of(rows, 0), 4).abs().max()) < 1e-12


# ---------------------------------------------------------------------- FFN


def test_energies_and_profiles_are_their_formulas():
    u = noise(6, 40, grad=True)
    x = u.detach().numpy()
    np.testing.assert_allclose(
        ffn.energy(u).detach(), np.log(np.linalg.norm(x, axis=-1) / math.sqrt(40) + 1e-6), **NEAR
    )
    share = -np.sort(-np.abs(x), axis=-1) / np.abs(x).sum(-1, keepdims=True)
    expected = np.stack([part.mean(-1) for part in np.array_split(share, 16, axis=-1)], -1)
    np.testing.assert_allclose(ffn.profile(u).detach(), expected, **NEAR)
    theirs = ffn.profile(noise(6, 80, seed=1))
    found = ffn.quantile_distance(ffn.profile(u), theirs)
    a, b = expected / expected.sum(-1, keepdims=True), theirs.numpy() / theirs.numpy().sum(-1, keepdims=True)
    np.testing.assert_allclose(found.detach(), np.abs(a - b).sum(-1), **NEAR)
    checks(ffn.energy, u)
    checks(lambda u: ffn.quantile_distance(ffn.profile(u), theirs), u)
    assert ffn.energy(torch.zeros(2, 4)).isfinite().all()


def test_the_energy_loss_is_one_minus_pearson_within_each_sequence():
    ours, theirs = noise(20, grad=True), noise(20, seed=1)
    sequence = torch.tensor([0] * 9 + [1] * 11)
    weights = torch.rand(20, generator=torch.Generator().manual_seed(2)).double()
    weights[3] = 0
    found = ffn.uncorrelated(ours, theirs, weights, sequence, 2)
    for number in range(2):
        x, y, w = (t.detach().numpy()[sequence == number] for t in (ours, theirs, weights))
        x, y = x - (x * w).sum() / w.sum(), y - (y * w).sum() / w.sum()
        expected = 1 - (w * x * y).sum() / math.sqrt((w * x * x).sum() * (w * y * y).sum())
        assert float(found[number].detach()) == pytest.approx(expected, abs=1e-9)
    checks(lambda x: ffn.uncorrelated(x, theirs, weights, sequence, 2), ours)
    scaled = ffn.uncorrelated(3 * theirs + 5, theirs, weights, sequence, 2)
    assert float(scaled.detach().abs().max()) < 1e-9
    flat = torch.ones(20, dtype=torch.float64, requires_grad=True)
    loss = ffn.uncorrelated(flat, theirs, weights, sequence, 2)
    loss.sum().backward()
    assert loss.tolist() == [1, 1] and flat.grad.isfinite().all()


# ------------------------------------------------------------ names on the wire


def named(parts):
    return {
        name: torch.from_numpy(t.array.astype(np.float32) if t.dtype != "bfloat16" else t.as_float32())
        for name, t in parts.items()
    }


def test_states_come_back_whichever_way_they_travelled():
    state_ND = noise(5, 200).float()
    wanted = states.rms_normed(state_ND)
    assert torch.equal(labels.layer_states({"layer3_state_ND": state_ND}, 3), wanted)
    packed = {f"layer3_{name.removeprefix('state_')}": t for name, t in pack_state(state_ND.numpy())[0].items()}
    assert float((labels.layer_states(named(packed), 3) - wanted).abs().max()) < 0.03
    pca = {"layer3_int8_NR": torch.tensor([[100, -50]], dtype=torch.int8), "layer3_scale_N": torch.tensor([0.5]).half()}
    assert labels.layer_states(pca, 3).tolist() == [[50, -25]]


def test_ragged_maps_become_rows():
    position_N = np.array([3, 64, 0, 200])
    given = {"attention2_K": torch.arange(1, 9).half()}
    found = labels.pooled_maps(given, 2, position_N, 64)
    assert found.tolist() == [[1, 0, 0, 0], [2, 3, 0, 0], [4, 0, 0, 0], [5, 6, 7, 8]]


def test_keys_and_values_come_back_whichever_way_they_travelled():
    given = {
        "keys2_int8_TF": torch.tensor([[2, -4]], dtype=torch.int8),
        "keys2_scale_T": torch.tensor([0.25]).half(),
        "values2_TF": torch.ones(1, 2),
    }
    key_TF, value_TF = labels.keys_and_values(given, 2)
    assert key_TF.tolist() == [[0.5, -1]] and value_TF.tolist() == [[1, 1]]


# -------------------------------------------------------------- which blocks


def test_blocks_are_spread_evenly_and_end_before_the_last():
    assert uniform(3, 15) == (5, 10, 14) and uniform(3, 28) == (9, 19, 27) and uniform(1, 2) == (1,)
    for blocks in range(2, 40):
        for count in range(1, blocks):
            found = uniform(count, blocks)
            assert (
                found == tuple(sorted(set(found))) and len(found) == count and found[0] >= 1 and found[-1] == blocks - 1
            )


def test_pairs_are_mapped_by_depth_or_taken_as_they_are():
    def of(layers, first=0):
        return pairs_of(layers, 15, 30, setting="loss.hidden.layers", first=first)

    assert of("uniform(3)") == (LayerPair(5, 10), LayerPair(10, 20), LayerPair(14, 28))
    assert of([15, 0, 3]) == (LayerPair(0, 0), LayerPair(3, 6), LayerPair(15, 30))
    assert of([(4, 9), 7]) == (LayerPair(4, 9), LayerPair(7, 14))
    assert pairs_of([1, 5, 12], 28, 28, setting="s", first=0) == tuple(LayerPair(n, n) for n in (1, 5, 12))
    assert teacher_layers([LayerPair(1, 9), LayerPair(2, 3), LayerPair(3, 9)]) == (3, 9)
    for layers, first, said in [
        (
            [16],
            0,
            r"loss\.hidden\.layers: block 16 of the student is out of range: its blocks are 1\.\.15 \(0: the embedding\)",
        ),
        ([(3, 31)], 0, "block 31 of the teacher is out of range: its blocks are 1..30"),
        ([0], 1, r"block 0 of the student is out of range: its blocks are 1\.\.15$"),
        ([3, (3, 9)], 0, "block 3 of the student is named twice"),
        ([], 0, "is empty"),
        ("uniform(15)", 0, r"at most uniform\(14\)"),
        ("uniform(0)", 0, r"at most uniform\(14\)"),
    ]:
        with pytest.raises(ConfigError, match=said):
            of(layers, first)


# ------------------------------------------------------------------ the terms

BATCH = TokenBatch.pack([list(range(9)), list(range(30))], [[0] * 2 + [1] * 6 + [0], [0] * 3 + [1] * 26 + [0]])


def supervised(batch=BATCH, length=30):
    sequence_N = batch.sequences_of_rows()
    position_N = batch.rows_of() - batch.cu_lengths_B1[sequence_N]
    weights_N = torch.rand(batch.rows, generator=torch.Generator().manual_seed(0))
    index_N = torch.from_numpy(sequence_N * length + position_N).long()
    return SupervisedRows(
        index_N,
        torch.from_numpy(batch.labels_N()).long(),
        weights_N,
        position_N.astype(np.int64),
        sequence_N.astype(np.int64),
    )


@pytest.mark.parametrize("objective", ["proj_cos", "gram"])
def test_the_hidden_term_weighs_rows_and_leaves_out_the_first_four_positions(objective):
    rows = supervised()
    pairs = (LayerPair(1, 2), LayerPair(3, 5))
    taps = {pair.student: noise(2, 30, 8, seed=pair.student).float().requires_grad_() for pair in pairs}
    torch.manual_seed(0)
    projectors = {pair.student: Projector(8, 5, None, 6) for pair in pairs} if objective == "proj_cos" else {}
    term = HiddenTerm(objective, pairs, FeatureWeight(3.0), LayerStates((2, 5), "none"), projectors)
    given = {f"layer{pair.teacher}_state_ND": noise(BATCH.rows, 5, seed=9 + pair.teacher).float() for pair in pairs}
    found = term.term(StudentOutputs(torch.zeros(2, 30, 8), taps), TeacherLabels(None, given), rows, 40.0, 7)
    kept = torch.from_numpy(rows.position_N >= 4)
    weights = rows.weights_N * kept
    assert sample(rows).tolist() == kept.nonzero()[:, 0].tolist()
    expected = {}
    for pair in pairs:
        state, target = rows.of(taps[pair.student]), states.rms_normed(given[f"layer{pair.teacher}_state_ND"])
        if objective == "gram":
            expected[pair.student] = float(states.gram(states.rms_normed(state)[kept], target[kept]) * weights.sum())
        else:
            guess = projectors[pair.student].linear(states.rms_normed(state))
            expected[pair.student] = float((states.proj_cos(guess, target) * weights).sum().detach())
    assert float(found.total) == pytest.approx(3.0 * sum(expected.values()) / 2 / 40, rel=1e-5)
    means = {name: float(mean.sum / mean.over) for name, mean in found.parts.items()}
    per_block = {block: value / float(weights.sum()) for block, value in expected.items()}
    assert means == pytest.approx(
        {"hidden_loss": sum(per_block.values()) / 2, "hidden_loss_1": per_block[1], "hidden_loss_3": per_block[3]},
        rel=1e-5,
    )
    found.total.backward()
    first = taps[1].grad.view(60, 8)[rows.index_N]
    assert not first[~kept].any() and first[kept].any(-1).all()
    assert (len(list(term.parameters())) == 2) == (objective == "proj_cos")


def test_a_weight_anneals_as_half_a_cosine_by_step_alone_and_then_costs_no_gradient():
    weight = FeatureWeight(6.0, 10)
    assert [weight.at(step) for step in (0, 10, 11, 500)] == [6.0, 0.0, 0.0, 0.0]
    assert [weight.at(step) for step in range(11)] == pytest.approx(
        [6 * 0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(11)]
    )
    assert FeatureWeight(6.0).at(10**6) == 6.0
    rows, tap = supervised(), noise(2, 30, 4).float().requires_grad_()
    term = HiddenTerm("proj_cos", (LayerPair(1, 1),), weight, LayerStates((1,), "none"), {1: Projector(4, 4, None, 4)})
    given = TeacherLabels(None, {"layer1_state_ND": noise(BATCH.rows, 4, seed=1).float()})
    after = term.term(StudentOutputs(torch.zeros(2, 30, 4), {1: tap}), given, rows, 1.0, 10)
    assert float(after.total) == 0 and not after.total.requires_grad and float(after.parts["hidden_loss"].sum) > 0


def test_a_projector_begins_as_what_the_teacher_did_where_widths_are_equal():
    basis = Basis(0.1 * noise(12).float(), torch.linalg.qr(noise(12, 5)).Q.float(), torch.tensor([2, 7]))
    h = noise(6, 12, seed=3).float()
    plain = h.clone()
    plain[:, [2, 7]] = 0
    target = (plain / (plain.square().mean(-1, keepdim=True) + 1e-6).sqrt() - basis.mean_D) @ basis.basis_DR
    torch.testing.assert_close(Projector(12, 5, basis, 12)(h), target)
    assert float(states.proj_cos(Projector(12, 12, None, 12)(h), states.rms_normed(h)).abs().max()) < 1e-6
    other = Projector(8, 5, basis, 12)  # a student of another width
    turned = other.linear.weight @ other.linear.weight.T
    torch.testing.assert_close(turned, torch.eye(5), atol=1e-5, rtol=0)
    assert set(Projector(12, 5, basis, 12).state_dict()) == {"linear.weight"}


def test_the_attention_term_reads_the_block_before_and_counts_rows_from_64_on():
    batch = TokenBatch.pack(
        [list(range(150)), list(range(90))], [[20 < i < 149 for i in range(150)], [50 < i < 89 for i in range(90)]]
    )
    rows = supervised(batch, 150)
    found = attending()
    term = AttentionTerm("pooled_kl", (LayerPair(2, 3),), FeatureWeight(1.0), Attention((3,)), lambda block, tap: found)
    assert term.needs().taps == (1,)
    theirs = [pooled(maps(attending(9), b, 150), range(150), 64) for b in range(2)]
    entries = np.concatenate(
        [theirs[s][t, : t // 64 + 1] for s, t in zip(rows.sequence_N, rows.position_N, strict=True)]
    )
    given = TeacherLabels(None, {"attention3_K": torch.from_numpy(entries).half()})
    answered = term.term(StudentOutputs(torch.zeros(2, 150, 3), {1: torch.zeros(2, 150, 3)}), given, rows, 10.0, 0)
    own = [pooled(maps(found, b, 150), range(150), 64) for b in range(2)]
    expected = 0.0
    for weight, s, t in zip(rows.weights_N.tolist(), rows.sequence_N, rows.position_N, strict=True):
        ours = own[s][t, : t // 64 + 1]
        a, b = theirs[s][t, : t // 64 + 1], ours
        a, b = a / a.sum(), b / b.sum()
        expected += weight * (a * np.log(a / b)).sum() * (t >= 64)
    assert float(answered.total) == pytest.approx(expected / 10, rel=2e-3)  # the teacher's came as float16
    counted = rows.weights_N[torch.from_numpy(rows.position_N >= 64)].sum()
    assert float(answered.parts["attention_loss_2"].over) == pytest.approx(float(counted), rel=1e-5)


def test_the_ffn_term_leaves_out_sequences_that_say_nothing():
    batch = TokenBatch.pack([list(range(7)), list(range(30))], [[0] * 3 + [1] * 3 + [0], [0] * 3 + [1] * 26 + [0]])
    rows, tap = supervised(batch), FfnTap(2)
    energy = noise(2, 30, 1).float().requires_grad_()
    term = FfnTerm("energy", (LayerPair(2, 3),), FeatureWeight(1.0), Ffn((3,)))
    assert term.needs().taps == (tap,)
    given = TeacherLabels(None, {"ffn3_energy_N": noise(batch.rows, seed=1).half()})
    found = term.term(StudentOutputs(torch.zeros(2, 30, 4), {tap: energy}), given, rows, 1.0, 0)
    found.total.backward()
    assert not energy.grad[0].any() and energy.grad[1].any()
    assert float(found.parts["ffn_loss"].over) == pytest.approx(float(rows.weights_N[4:].sum()), rel=1e-5)
