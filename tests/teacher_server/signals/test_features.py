"""Signals of layers as a loaded model serves them, against the same model called directly under eager attention, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher_server.backends.transformers.backend import load
from teacher_server.config.backends import TransformersBackend
from teacher_server.config.features import FeaturesConfig
from teacher_server.signals.captured import AttentionInputs, Captured
from teacher_server.signals.features import attention
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.signals import SignalSpec
from teacher_wire.score.signals import Attention, Ffn, Full, Hidden, LayerStates, Relation
from teacher_wire.testing.fake_features import tokens_sent
from tests.teacher_server.backends.inside_oracle import energy, inside, quantiles

RANK = 12
LENGTHS = (9, 4, 100, 2, 80)


def rows():
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 300, n).tolist() for n in LENGTHS]
    made[4][:70] = made[2][:70]  # a prefix that packing shares
    return made


def batch_of(sequences):
    """Most rows, and of the second sequence none."""
    wanted = [
        [i < len(row) - 1 and (i % 3 > 0 or i == 65) and len(row) != 4 for i in range(len(row))] for row in sequences
    ]
    wanted[3] = [True, False]
    return TokenBatch.pack(sequences, wanted)


@pytest.fixture(scope="module")
def teachers(model_factory, tmp_path_factory):
    """family, way -> a calibrated teacher and what the eager model shows of each sequence; made once."""
    made, shown = {}, {}
    kept = tmp_path_factory.mktemp("bases")

    def get(family, **settings):
        deterministic = settings.pop("deterministic", False)
        key = (family, deterministic, *sorted(settings.items()))
        folder = model_factory(family, hidden=64)
        if key not in made:
            config = TransformersBackend(model=str(folder), dtype="float32", device="cpu", **settings)
            made[key] = load(config, deterministic=deterministic)
            made[key].calibrate(FeaturesConfig(rank=RANK, calibration_tokens=1024, folder=kept))
        if family not in shown:
            eager = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            shown[family] = [inside(eager, row) for row in rows()]
        return made[key], shown[family]

    return get


def wanted_rows(batch, per_sequence):
    """The wanted rows of tensors [L, ...] of each sequence, one behind the other, float64."""
    flags = np.split(batch.wanted_T, batch.cu_lengths_B1[1:-1])
    return torch.cat([each[torch.from_numpy(flag)] for each, flag in zip(per_sequence, flags, strict=True)]).double()


def sent_tokens(batch, per_sequence):
    flags = np.split(tokens_sent(batch), batch.cu_lengths_B1[1:-1])
    return torch.cat([each[torch.from_numpy(flag)] for each, flag in zip(per_sequence, flags, strict=True)]).double()


def pooled(map_HLL, wanted_L):
    """By the definition: heads' mean, sinks at 0, sums of 64 positions."""
    found = []
    for t in np.flatnonzero(wanted_L):
        row = map_HLL[:, t, : t + 1].double().mean(0)
        row[:4] = 0
        found += [row[start : start + 64].sum() for start in range(0, t + 1, 64)]
    return torch.stack(found) if found else torch.zeros(0).double()


def value(signals, name):
    return torch.from_numpy(signals[name].as_float32().astype(np.float64))


def ask(teacher, *signals):
    batch = batch_of(rows())
    (found,) = teacher.score([(batch, SignalSpec(300, signals))])
    return batch, found


WAYS = [{}, {"layers": "fused"}, {"packing": "off"}, {"deterministic": True}]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "internlm3"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_kind_is_what_the_eager_model_shows(teachers, family, way):
    if way.get("layers") == "fused" and family == "gemma2":
        pytest.skip("fused layers are of Llama's shape")
    teacher, shown = teachers(family, **way)
    last = teacher.facts.layers
    signals = (
        LayerStates((0, last), "none"),
        Attention((1, last)),
        Relation((last,), "none"),
        Ffn((1, last), "quantiles"),
    )
    batch, found = ask(teacher, *signals)
    flags = np.split(batch.wanted_T, batch.cu_lengths_B1[1:-1])
    for layer in (0, last):
        expected = wanted_rows(batch, [one.states[layer] for one in shown])
        torch.testing.assert_close(value(found, f"layer{layer}_state_ND"), expected, rtol=1e-4, atol=1e-4)
    for layer in (1, last):
        expected = torch.cat([pooled(one.maps[layer - 1], flag) for one, flag in zip(shown, flags, strict=True)])
        torch.testing.assert_close(value(found, f"attention{layer}_K"), expected, rtol=2**-10, atol=2e-5)
        u_NF = wanted_rows(batch, [one.ffn[layer - 1] for one in shown])
        torch.testing.assert_close(value(found, f"ffn{layer}_energy_N"), energy(u_NF), rtol=2**-10, atol=1e-3)
        parts_NQ = quantiles(u_NF)
        torch.testing.assert_close(
            value(found, f"ffn{layer}_quantiles_NQ"), parts_NQ / parts_NQ.sum(-1, keepdim=True), rtol=1e-3, atol=1e-4
        )
        assert value(found, f"ffn{layer}_quantiles_NQ").sum(-1).sub(1).abs().max() < 2e-3
    for name, seen in (("keys", [one.keys for one in shown]), ("values", [one.values for one in shown])):
        expected = sent_tokens(batch, [each[last - 1] for each in seen])
        torch.testing.assert_close(value(found, f"{name}{last}_TF"), expected, rtol=1e-4, atol=1e-4)
    assert found.payload_bytes == SignalSpec(300, signals).answer_bytes(batch, teacher._shape(SignalSpec(300, signals)))


def test_reduced_states_are_close_to_the_states(teachers):
    teacher, shown = teachers("qwen2")
    basis = LayerBasis.of(teacher.artifact(teacher.facts.artifacts[1]))
    digest = teacher.facts.artifacts[1].sha256
    batch, found = ask(teacher, LayerStates((1, 2), "pca", RANK, digest), Relation((1,)))
    for layer in (1, 2):
        state_ND = wanted_rows(batch, [one.states[layer] for one in shown])
        one = basis.layers[layer]
        state_ND[:, one.massive_M.array] = 0
        normed_ND = state_ND / (state_ND.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        expected = (normed_ND - torch.from_numpy(one.mean_D.array)) @ torch.from_numpy(one.basis_DR.array).double()
        seen = value(found, f"layer{layer}_int8_NR") * value(found, f"layer{layer}_scale_N")[:, None]
        step_N1 = expected.abs().amax(-1, keepdim=True) / 127
        assert ((seen - expected).abs() <= 0.51 * step_N1 + 1e-4).all()
    key_TF = sent_tokens(batch, [one.keys[0] for one in shown])
    seen = value(found, "keys1_int8_TF") * value(found, "keys1_scale_T")[:, None]
    assert ((seen - key_TF).abs() <= 0.51 * key_TF.abs().amax(-1, keepdim=True) / 127 + 1e-4).all()
    _, fewer = ask(teacher, LayerStates((1,), "pca", 3, digest))
    (parts_N3,) = [value(fewer, "layer1_int8_NR") * value(fewer, "layer1_scale_N")[:, None]]
    whole = value(found, "layer1_int8_NR") * value(found, "layer1_scale_N")[:, None]
    assert (parts_N3 - whole[:, :3]).abs().max() < whole.abs().max() / 60, "the first components are the same"
    _, int8 = ask(teacher, LayerStates((2,), "int8"), Hidden("int8"))
    _, plain = ask(teacher, LayerStates((2,), "none"))
    error = (value(int8, "layer2_int8_ND") * value(int8, "layer2_scales_NG").repeat_interleave(64, 1)).scatter(
        1,
        torch.from_numpy(int8["layer2_outlier_ids_NO"].array.astype(np.int64)),
        value(int8, "layer2_outlier_values_NO"),
    ) - value(plain, "layer2_state_ND")
    assert error.abs().max() < 0.01 * value(plain, "layer2_state_ND").abs().max()


def test_the_last_layer_is_before_the_final_norm_and_other_labels_keep_their_bits(teachers):
    teacher, _ = teachers("qwen2")
    alone = ask(teacher, Hidden(), Full())[1]
    beside = ask(teacher, Hidden(), Full(), LayerStates((2,), "none"), Attention((1,)), Ffn((2,)), Relation((1,)))[1]
    for name, tensor in alone.tensors.items():
        np.testing.assert_array_equal(beside[name].array, tensor.array)
    assert np.abs(beside["layer2_state_ND"].array - beside["hidden_ND"].array).max() > 0.1


def test_a_deterministic_teacher_gives_the_same_bits_in_any_company(teachers):
    teacher, _ = teachers("qwen3", deterministic=True)
    spec = SignalSpec(
        300,
        (
            LayerStates((0, 2), "pca", 8, teacher.facts.artifacts[1].sha256),
            Attention((1, 2)),
            Relation((2,)),
            Ffn((1,), "quantiles"),
        ),
    )
    batch = batch_of(rows())
    (whole,) = teacher.score([(batch, spec)])
    parts = whole.cut(batch)
    for b in (0, 2, 4):
        (alone,) = teacher.score([(batch.select([b]), spec)])
        for name, tensor in alone.tensors.items():
            np.testing.assert_array_equal(parts[b][name].array, tensor.array, err_msg=name)
    fewer = TokenBatch.pack([rows()[2]], [[t == 98 or t == 3 for t in range(100)]])
    (some,) = teacher.score([(fewer, SignalSpec(300, (Attention((2,)),)))])
    places = batch.rows_of()[batch.sequences_of_rows() == 2] - batch.cu_lengths_B1[2]
    if 98 in places:
        np.testing.assert_array_equal(some["attention2_K"].array[-2:], parts[2]["attention2_K"].array[-2:])


def random_inputs(lengths, rows_of, heads=6, groups=2, channels=8, **more):
    generator = torch.Generator().manual_seed(0)
    tokens, position = sum(lengths), np.concatenate(rows_of)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs = AttentionInputs(
        3 * draw(len(position), heads, channels), draw(tokens, groups, channels), draw(tokens, groups, channels),
        draw(tokens, groups, channels), scale=channels**-0.5, **more,
    )  # fmt: skip
    sequence = np.repeat(np.arange(len(lengths)), [len(r) for r in rows_of])
    return Captured(
        attention={1: inputs},
        cu_tokens_B1=np.concatenate([[0], np.cumsum(lengths)]),
        position_R=position,
        sequence_R=sequence,
    ), inputs


def by_definition(captured, inputs):
    found = []
    for r, (b, t) in enumerate(zip(captured.sequence_R, captured.position_R, strict=True)):
        key = inputs.key_TGd[captured.cu_tokens_B1[b] :][: t + 1].double()
        heads = []
        for h in range(inputs.query_RHd.shape[1]):
            score = (
                key[:, h // (inputs.query_RHd.shape[1] // key.shape[1])]
                @ inputs.query_RHd[r, h].double()
                * inputs.scale
            )
            if inputs.softcap:
                score = inputs.softcap * torch.tanh(score / inputs.softcap)
            if inputs.window is not None:
                score[: max(0, t + 1 - inputs.window)] = -torch.inf
            heads.append(score.softmax(0))
        mean = torch.stack(heads).mean(0)
        mean[:4] = 0
        found += [part.sum() for part in mean.split(64)]
    return torch.stack(found)


@pytest.mark.parametrize("score_bytes", [1, 50_000, 1 << 20, 1 << 28])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0, "window": 70}, {"window": 3}], ids=str)
def test_pooled_maps_are_the_definitions_however_they_are_tiled(score_bytes, more):
    lengths = (5, 200, 1, 64, 65, 130)
    rows_of = [
        np.arange(5),
        np.array([0, 3, 63, 64, 65, 127, 128, 199]),
        np.arange(0),
        np.arange(64),
        np.array([64]),
        np.arange(60, 130),
    ]
    captured, inputs = random_inputs(lengths, rows_of, **more)
    found = attention.pooled(captured, inputs, score_bytes)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), by_definition(captured, inputs), rtol=2**-10, atol=1e-6)


def test_no_tile_holds_more_scores_than_it_may(monkeypatch):
    lengths, budget = (700, 20, 21, 300), 40_000
    captured, inputs = random_inputs(lengths, [np.arange(n) for n in lengths])
    whole, seen = attention._tile, []

    def watched(captured, inputs, tile):
        seen.append(len(tile) * max(p.rows for p in tile) * max(p.keys for p in tile) * inputs.query_RHd.shape[1] * 4)
        return whole(captured, inputs, tile)

    monkeypatch.setattr(attention, "_tile", watched)
    attention.pooled(captured, inputs, budget)
    assert len(seen) > 40 and max(seen) <= budget
    assert attention.pooled(captured, inputs, 1).shape == (sum(t // 64 + 1 for n in lengths for t in range(n)),)
