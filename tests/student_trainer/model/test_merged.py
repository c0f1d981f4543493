"""A merged student computes what it computes with its adapters, and nothing of it changes meanwhile."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model.load import load_student
from student_trainer.model.merged import MergedWriter, merged_state
from tests.thorough import covering

IDS = torch.arange(3, 30)[None]


def student_of(folder, **settings):
    student = load_student(ModelConfig(path=str(folder), **{"dtype": "float32", **settings}), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    student.model.eval()
    return student


def trained(student):
    return {name: p.detach().clone() for name, p in student.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "lora"),
    covering(["qwen2", "llama", "gemma2", "granitemoe", "phi"], [None, {"rank": 4}, {"rank": 4, "fused": False}]),
)
def test_the_folder_computes_what_the_student_does(model_factory, tmp_path, family, lora):
    student = student_of(model_factory(family), lora=lora)
    weights = trained(student)
    frozen = {name: p.detach().clone() for name, p in student.model.named_parameters() if name not in weights}
    with torch.no_grad():
        own = student.model(input_ids=IDS).logits
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()  # it has gone on training: the values given are what counts
    MergedWriter(student).write(merged_state(student, weights, torch.float32), tmp_path / "merged", torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=IDS).logits, own, atol=2e-4, rtol=1e-4)
    after = dict(student.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(after[name].any() for name in weights)


def test_writing_leaves_the_default_dtype_alone_that_all_threads_share(model_factory, tmp_path, monkeypatch):
    """A run trains meanwhile: what it makes without naming a dtype would be bfloat16 (seen on a GPU: an index of 10,087 became 10,112)."""
    student = load_student(ModelConfig(path=str(model_factory("qwen2")), dtype="bfloat16", lora=None), 0)
    writer = MergedWriter(student)
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: pytest.fail(f"set to {dtype}"))
    writer.write(merged_state(student, dtype=torch.bfloat16), tmp_path / "merged", torch.bfloat16)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_ids_beyond_the_vocabulary_are_cut_off(model_factory, tmp_path, family):
    student = student_of(model_factory(family), lora=None)
    MergedWriter(student).write(
        merged_state(student, trained(student), torch.float32), tmp_path / "cut", torch.float32, vocab_rows=290
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert found.config.vocab_size == 290 and found.get_input_embeddings().weight.shape[0] == 290
    with torch.no_grad():
        torch.testing.assert_close(
            found(input_ids=IDS).logits, student.model(input_ids=IDS).logits[..., :290], atol=2e-4, rtol=1e-4
        )


def test_embeddings_with_adapters_are_merged_where_they_are_not_tied(model_factory, tmp_path):
    targets = {"rank": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    student = student_of(model_factory("llama"), lora=targets)
    with torch.no_grad():
        own = student.model(input_ids=IDS).logits
    MergedWriter(student).write(
        merged_state(student, trained(student), torch.float32), tmp_path / "merged", torch.float32
    )
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(found, own, atol=2e-4, rtol=1e-4)


def test_layers_that_are_trained_whole_beside_adapters_are_in_their_places(model_factory, tmp_path):
    """peft's modules_to_save, of an adapter that a user brings."""
    base = model_factory("llama")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    student = student_of(tmp_path / "adapter", lora={"rank": 2})
    assert any("modules_to_save" in name for name in trained(student))
    with torch.no_grad():
        own = student.model(input_ids=IDS).logits
    state = merged_state(student, trained(student))
    assert state.keys() == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
    MergedWriter(student).write(state, tmp_path / "merged", None)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(found, own, atol=2e-4, rtol=1e-4)


def test_what_cannot_be_merged_is_named(model_factory):
    student = student_of(model_factory("qwen2"), lora={"rank": 4, "target_modules": ["lm_head", "q_proj"]})
    with pytest.raises(ModelError, match=r"tie_word_embeddings"):
        merged_state(student, trained(student), torch.float32)
    weights = trained(student)
    weights["strange"] = weights.popitem()[1]
    with pytest.raises(ModelError, match=r"2 differ"):
        merged_state(student, weights, torch.float32)


def test_the_dtype_is_in_the_config_too(model_factory, tmp_path):
    student = student_of(model_factory("qwen2"), lora={"rank": 4})
    MergedWriter(student).write(
        merged_state(student, trained(student), torch.bfloat16), tmp_path / "half", torch.bfloat16
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
