"""head(states) against the model's own logits, for every way in which an architecture changes them; what is not known is refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model import logit_probe
from student_trainer.model.load import load_student
from student_trainer.model.speed import compiled

CHANGED = [
    "falcon_h1",
    "hyperclovax",
    "recurrent_gemma",
    "granite",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "nanochat",
    "granitemoe",
]
PLAIN = ["glm4", "qwen3_moe", "internlm3", "phi", "llama4_text"]


def loaded(folder, **changes):
    return load_student(ModelConfig(path=str(folder), **{"dtype": "float32", "lora": None, **changes}), 0)


@pytest.mark.parametrize("family", CHANGED + PLAIN)
def test_head_of_states_is_the_models_own_logits(model_factory, family):
    folder = model_factory(family)
    student = loaded(folder)
    ids_BL = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own_BLV = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids_BL).logits
        state_BLD = student.states(ids_BL)
        ours_BLV = student.head(300).logits(state_BLD.flatten(0, 1)).view(own_BLV.shape)
    torch.testing.assert_close(ours_BLV, own_BLV, atol=2e-4, rtol=0)
    head = student.head(300)
    assert (head.logit_scale != 1 or head.final_softcap > 0) == (family in CHANGED), "a case that shows nothing"


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bert", "by its output head from its last hidden state alone"),
        ("bert-generation", "sees tokens that come later"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_architecture_that_does_more_is_refused_by_name(model_factory, family, said, dtype):
    with pytest.raises(ModelError, match=said) as refusal:
        loaded(model_factory(family), dtype=dtype)
    assert f"model_type {family}" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", CHANGED)
@pytest.mark.parametrize("lora", [None, {"rank": 2, "target_modules": ["q_proj"]}], ids=["all", "lora"])
def test_what_the_table_does_not_know_is_found_by_the_probe(model_factory, monkeypatch, family, lora):
    monkeypatch.setattr(logit_probe, "_SENSES", {})
    with pytest.raises(ModelError, match=f"model_type {family}"):
        loaded(model_factory(family), lora=lora)


def test_a_forgotten_multiplier_is_told(model_factory, monkeypatch):
    monkeypatch.setattr(logit_probe, "_SENSES", {})
    with pytest.raises(ModelError, match=r"as if multiplied by 0\.078125"):
        loaded(model_factory("falcon_h1"))


def test_a_multiplier_below_rounding_of_single_logits_is_found_in_bfloat16(model_factory, monkeypatch):
    folder = model_factory("granite", logits_scaling=1.03)
    loaded(folder, dtype="bfloat16", lora={"rank": 2})
    monkeypatch.setattr(logit_probe, "_SENSES", {})
    with pytest.raises(ModelError, match=r"as if multiplied by 0\.97"):
        loaded(folder, dtype="bfloat16", lora={"rank": 2})


def test_a_divisor_of_zero_is_named(model_factory):
    with pytest.raises(ModelError, match="logits_scaling=0"):
        loaded(model_factory("granite", logits_scaling=0.0))


def test_weights_that_are_no_numbers_are_named(model_factory, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_factory("llama"))
    model.lm_head.weight.data[5] = float("nan")
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_factory("llama") / name).read_bytes())
    with pytest.raises(ModelError, match="not finite"):
        loaded(tmp_path)


def test_the_probe_leaves_no_trace(model_factory):
    student = loaded(model_factory("qwen2", attention_dropout=0.3), lora={"rank": 2, "dropout": 0.2})
    compiled.install(student.model, backend=_never)
    student.model.train()
    before = torch.get_rng_state()
    student.check(ModelConfig(path="here", dtype="float32"))
    assert torch.equal(torch.get_rng_state(), before), "a run would draw other numbers"
    assert all(module.training for module in student.model.modules())
    assert all(parameter.grad is None for parameter in student.model.parameters())


def _never(*_):
    raise AssertionError("the probe compiled a layer")


def test_a_head_with_adapters_is_compared_as_it_is(model_factory):
    student = loaded(model_factory("llama"), lora={"rank": 2, "target_modules": ["lm_head", "q_proj"]})
    layer = student.causal_lm.get_output_embeddings()
    layer.lora_B["default"].weight.data.normal_()
    student.check(ModelConfig(path="here", dtype="float32"))
    layer.scaling["default"] *= 2  # read in both ways
    student.check(ModelConfig(path="here", dtype="float32"))
    assert student.head(300).lora is not None
