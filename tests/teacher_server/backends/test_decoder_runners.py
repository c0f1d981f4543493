"""Ways to run a body against the model called directly, row for row, for mixed lengths; and what none of them may take.

Tolerances as in test_transformers_backend: float32 2e-4 on logits of magnitude ~10, bfloat16 three steps.
"""

import logging

import numpy as np
import pytest
import torch

from teacher_server.backends.transformers import attention, decoder_runners
from teacher_server.backends.transformers.fused import FusedBody
from teacher_wire.core.batch import TokenBatch
from teacher_wire.score.signals import spec_of
from tests.teacher_server.backends.test_transformers import FAMILIES, TOLERANCE, backend, direct_logits, sequences
from tests.thorough import covering

PROMPT = sequences(seed=7, lengths=(40,))[0]
MIXED = [*sequences(lengths=(3, 40, 2, 17)), *(PROMPT + tail for tail in sequences(seed=8, lengths=(2, 5, 30, 5)))]
FULL = spec_of("full", 300)


def logits(teacher, rows):
    (signals,) = teacher.score([(TokenBatch.pack(rows), FULL)])
    return torch.from_numpy(signals["logits_NV"].as_float32())


@pytest.mark.parametrize(
    ("runner", "mode"),
    covering(
        [(family, "packed") for family in FAMILIES if family != "gemma2"]
        + [(family, "fused") for family in ("qwen2", "llama", "internlm3")]
        + [("gemma2", "padded")],
        [("float32", 0), ("bfloat16", 16), ("float32", 16), ("bfloat16", 0)],  # 0: prefixes apart
    ),
)
def test_states_are_the_models_own(model_factory, runner, mode):
    (family, way), (dtype, shared) = runner, mode
    folder = model_factory(family)
    layers = "fused" if way == "fused" else "transformers"
    teacher = backend(folder, dtype, layers=layers, prefix_min_tokens=shared)
    assert teacher._body.name == way
    before = teacher.computed_tokens
    found = logits(teacher, MIXED)
    torch.testing.assert_close(found, direct_logits(folder, MIXED, dtype), atol=TOLERANCE[dtype], rtol=0)
    saved = 3 * len(PROMPT) if shared and way != "padded" else 0
    assert teacher.computed_tokens - before == sum(map(len, MIXED)) - saved


def test_norms_of_queries_and_keys_are_fused_too(tmp_path):
    """Qwen3's layers: like Qwen2's, with a norm of every head."""
    import transformers as tf

    config = tf.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = tf.Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids = [np.arange(9, dtype=np.int32), np.arange(3, 24, dtype=np.int32)]
    rows = [np.arange(len(row)) for row in ids]
    with torch.inference_mode():
        plain = torch.cat([model.model(torch.from_numpy(row)[None]).last_hidden_state[0] for row in ids])
        body = decoder_runners.PackedBody("fused", FusedBody(model.model), torch.device("cpu"), 1000, 0)
        torch.testing.assert_close(body.states(ids, rows), plain, atol=1e-4, rtol=1e-4)


def test_the_models_modules_keep_their_weights(model_factory):
    """The joined weights are the model's own, held once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_factory("qwen2"), dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = FusedBody(model.model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    joined = fused._layers[0].qkv.weight_ND.untyped_storage().data_ptr()
    assert model.model.layers[0].self_attn.v_proj.weight.untyped_storage().data_ptr() == joined


@pytest.mark.parametrize("layers", ["transformers", "fused"])
def test_long_batches_are_cut_between_sequences(model_factory, layers):
    folder = model_factory("qwen2")
    teacher = backend(folder, layers=layers)
    teacher._body._max_tokens = 45
    torch.testing.assert_close(logits(teacher, MIXED), direct_logits(folder, MIXED), atol=2e-4, rtol=0)


def test_a_way_that_finds_other_states_is_not_taken(model_factory, monkeypatch, caplog):
    """Attention that looks across sequences: the probe sees it, and the model is run padded, with a line in the log."""

    def leaking(query, key, value, packing, scale):
        whole = attention.Packing(None, None, None, 0, 0, None, (((0, len(query)), (0, len(query))),))
        return attention._attend_by_segment(query, key, value, whole, scale)

    folder = model_factory("qwen2")
    monkeypatch.setattr(attention, "attend", leaking)
    monkeypatch.setattr("teacher_server.backends.transformers.fused.attend", leaking)
    with caplog.at_level(logging.INFO):
        teacher = backend(folder, layers="fused")
    assert teacher._body.name == "padded"
    assert "is not run fused: its states differ" in caplog.text and "is not run packed: its states" in caplog.text
    torch.testing.assert_close(logits(teacher, MIXED), direct_logits(folder, MIXED), atol=2e-4, rtol=0)


def test_prefixes_are_not_shared_if_that_changes_the_states(model_factory, monkeypatch, caplog):
    whole = decoder_runners.pack
    monkeypatch.setattr(
        decoder_runners, "pack", lambda ids, least: _misplaced(whole(ids, least)) if least else whole(ids, 0)
    )
    with caplog.at_level(logging.INFO):
        teacher = backend(model_factory("qwen2"), prefix_min_tokens=16)
    assert "prefixes are not shared" in caplog.text
    before = teacher.computed_tokens
    logits(teacher, MIXED)
    assert teacher.computed_tokens - before == sum(map(len, MIXED))


def _misplaced(layout):
    layout.positions_T[:] = 0
    return layout


@pytest.mark.parametrize("setting", [{"sliding_window": 8}, {"softcap": 5.0}, {"s_aux": torch.ones(4)}])
def test_attention_refuses_what_it_does_not_compute(setting):
    x = torch.randn(1, 4, 6, 8)
    packing = attention.Packing(None, None, None, 6, 6, None, (((0, 6), (0, 6)),))
    module = torch.nn.Module()
    found, _ = attention.packed_attention(module, x, x, x, None, packing=packing)
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    with pytest.raises(attention.NotPackableError, match=next(iter(setting))):
        attention.packed_attention(module, x, x, x, None, packing=packing, **setting)


@pytest.mark.parametrize(
    "changes",
    [{"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 16}],
)
def test_layers_with_windows_are_run_padded(model_factory, changes):
    folder = model_factory("qwen2", **changes)
    teacher = backend(folder, layers="fused")
    assert teacher._body.name == "padded"
    torch.testing.assert_close(logits(teacher, MIXED), direct_logits(folder, MIXED), atol=2e-4, rtol=0)


def test_rotary_embeddings_of_the_longest_sequence_run_each_by_itself(model_factory):
    """Dynamic scaling goes by the longest sequence of a pass: company beyond the limit would move a short one's labels."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = model_factory("qwen2", rope_parameters=rope, max_position_embeddings=32)
    rows = sequences(lengths=(40, 31))  # similar enough to share a pass, on both sides of the limit
    for packing in ("auto", "off"):
        teacher = backend(folder, packing=packing)
        torch.testing.assert_close(logits(teacher, rows)[39:], direct_logits(folder, rows[1:]), atol=2e-4, rtol=0)
