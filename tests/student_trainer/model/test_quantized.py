"""A base in 4 bit: its products are those of the dequantised weights, and its adapters learn as on a plain model that holds these."""

import json
import math

import pytest
import torch
from torch import nn

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ConfigError, ModelError
from student_trainer.model.adapters import adapt
from student_trainer.model.load import load_student
from student_trainer.model.merged import MergedWriter, merged_state
from student_trainer.model.quantized import weights as quantized
from student_trainer.model.saving import save_student
from student_trainer.model.speed import compiled
from tests.thorough import covering

pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[5, 9, 200, 17, 3, 44, 250, 8], [7, 7, 1, 90, 33, 2, 0, 0]])


def settings(path, **changes):
    tree = {"path": str(path), "dtype": "float32", "lora": {"rank": 4}, "quantize": "nf4", "compiled": False} | changes
    return ModelConfig.model_validate(tree)


def plain_twin(student, config):
    """The same base as plain layers with the dequantised weights, and the same adapters, computed by peft alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.path, dtype=torch.float32)
    modules = dict(model.named_modules())
    for name, layer in quantized.layers_of(student.causal_lm):
        own = modules[name.removesuffix(".base_layer")]
        own.weight = nn.Parameter(quantized.weight_of(layer).clone(), requires_grad=False)
    twin = adapt(
        model,
        config.model_copy(update={"quantize": None, "lora": config.lora.model_copy(update={"fused": False})}),
        None,
    )
    values = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values[name])
    return twin


def stirred(student):
    """Adapters that do something: B starts at 0."""
    torch.manual_seed(3)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return student


def gradients(model, head):
    states = model.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state
    (states @ head.T).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "quantized"),
    covering(
        ["qwen2", "llama"],
        [("nf4", True), ({"kind": "nf4", "double": False}, True), ("nf4", False), ("fp4", True)],
    ),
)
def test_forward_and_gradients_are_those_of_the_dequantised_weights(model_factory, family, quantized):
    quantize, fused = quantized
    config = settings(model_factory(family, hidden=64), quantize=quantize, lora={"rank": 4, "fused": fused})
    student = stirred(load_student(config, 0))
    twin = plain_twin(student, config)
    with torch.no_grad():
        ours, theirs = student.states(IDS), twin.get_base_model().model(input_ids=IDS).last_hidden_state
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    head = student.head(student.vocab_rows).weight_VD.detach()
    student.model.train(), twin.train()
    made, expected = gradients(student.model, head), gradients(twin, head)
    assert made.keys() == expected.keys() and made
    for name, gradient in expected.items():
        assert (made[name] - gradient).norm() <= 2e-6 * gradient.norm().clamp(min=1e-6), name


def test_what_is_kept_in_4_bit_and_what_is_not(model_factory):
    student = load_student(settings(model_factory("qwen2", hidden=64)), 0)
    names = {name for name, _ in quantized.layers_of(student.causal_lm)}
    assert len(names) == 2 * 7 and not any("lm_head" in name or "embed" in name for name in names)
    assert student.head(300).weight_VD.dtype == torch.float32
    assert student.causal_lm.get_output_embeddings().weight is student.causal_lm.get_input_embeddings().weight
    assert any("14 linear layers are kept in 4 bit (nf4, double)" in note for note in student.notes)
    assert "a base in 4 bit" in student.computed_by
    trained = [name for name, p in student.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    plain = sum(
        p.numel()
        for p in load_student(settings(model_factory("qwen2", hidden=64), quantize=None), 0).causal_lm.parameters()
    )
    assert quantized.parameter_count(student.causal_lm) == plain


def test_the_digest_reads_the_scales_too(model_factory, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = model_factory("qwen2", hidden=64)
    first = load_student(settings(folder), 0).sha256
    assert load_student(settings(folder), 0).sha256 == first
    other = tmp_path / "doubled"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(
        {**state, name: state[name] * 2}, other / "model.safetensors", {"format": "pt"}
    )  # the same 4-bit numbers, other scales
    assert load_student(settings(other), 0).sha256 != first


def test_measuring_does_not_repack_the_weights(model_factory):
    student = load_student(settings(model_factory("qwen2", hidden=64)), 0)
    before = [layer.weight.data.clone() for _, layer in quantized.layers_of(student.causal_lm)]
    student.model.eval()
    with torch.no_grad():
        student.states(IDS)
    for (_, layer), packed in zip(quantized.layers_of(student.causal_lm), before, strict=True):
        assert torch.equal(layer.weight.data, packed)


def test_a_merged_model_is_the_function_that_was_trained(model_factory, tmp_path):
    from transformers import AutoModelForCausalLM

    student = stirred(load_student(settings(model_factory("qwen2", hidden=64)), 0))
    MergedWriter(student).write(merged_state(student), tmp_path, torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    student.model.eval()
    with torch.no_grad():
        own, theirs = student.model(input_ids=IDS).logits, merged(input_ids=IDS).logits
    assert (own - theirs).norm() <= 1e-5 * own.norm()


def test_a_saved_adapter_goes_on(model_factory, tmp_path):
    student = stirred(load_student(settings(model_factory("qwen2", hidden=64)), 0))
    save_student(student, tmp_path, exported=True)
    assert not (tmp_path / "model.safetensors").exists()
    again = load_student(settings(tmp_path), 1)
    with torch.no_grad():
        student.model.eval(), again.model.eval()
        assert torch.equal(student.states(IDS), again.states(IDS))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_keep_no_dequantised_weight(model_factory, checkpointing):
    """The compiler sees a product as one operator: what it keeps for the way back are activations and packed weights."""
    config = settings(model_factory("llama", hidden=64), gradient_checkpointing=checkpointing)
    student = stirred(load_student(config, 0))
    head = student.head(student.vocab_rows).weight_VD.detach()
    student.model.train()
    plain = gradients(student.model, head)
    student.model.zero_grad()
    assert compiled.install(student.model, backend="aot_eager") == 2
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t):
        found = gradients(student.model, head)
    for name, gradient in plain.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-6), name
    weights = {tuple(layer.weight.quant_state.shape) for _, layer in quantized.layers_of(student.causal_lm)}
    assert not [shape for shape, dtype in kept if dtype.is_floating_point and tuple(shape) in weights]


def test_refusals_name_the_setting(model_factory, tmp_path, monkeypatch):
    folder = model_factory("qwen2", hidden=64)
    with pytest.raises(ValueError, match=r"quantize=nf4 .* lora is null"):
        settings(folder, lora=None)
    with pytest.raises(ValueError, match="kind"):
        settings(folder, quantize="int3")
    stored = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match=r"quantised \(gptq\), and only 4-bit weights of bitsandbytes"):
        quantized.check_as_stored(settings(folder), stored)
    ours = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
    }
    with pytest.raises(ModelError, match=r"set model.quantize=nf4, which trains adapters on it"):
        quantized.check_as_stored(settings(folder, quantize=None), ours)
    with pytest.raises(ModelError, match="double=False"):
        quantized.check_as_stored(settings(folder), ours)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, .* 'lyceum-distill\[qlora\]'"):
        quantized.check_quantizable(settings(folder))


def test_4_bit_is_near_what_it_stands_for(model_factory):
    """NF4 rounds a normal weight by about 0.09 of its deviation: neither nothing (not quantised) nor noise (read wrongly)."""
    folder = model_factory("qwen2", hidden=64)
    plain = dict(load_student(settings(folder, quantize=None), 0).causal_lm.named_modules())
    for name, layer in quantized.layers_of(load_student(settings(folder), 0).causal_lm):
        weight = plain[name].weight
        off = float((quantized.weight_of(layer) - weight).norm() / weight.norm())
        assert 0.03 < off < 0.2 and math.isfinite(off), name
