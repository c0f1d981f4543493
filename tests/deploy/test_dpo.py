"""The hand-over to TRL's DPO (docs/after/dpo.md), with the real package, on a tiny student that this house has trained and merged."""

import json

import pytest
import torch

from deploy.examples.dpo import dpo
from student_trainer.config.model import ModelConfig
from student_trainer.model.load import load_student
from student_trainer.model.merged import MergedWriter, merged_state
from student_trainer.model.saving import save_student

pytest.importorskip("trl")


@pytest.fixture
def merged(tmp_path, model_factory):
    """A student with adapters that are not nothing, merged into one folder, and the logits it has by itself."""
    student = load_student(ModelConfig(path=str(model_factory("qwen2")), dtype="float32", lora={"rank": 2}), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    folder = tmp_path / "merged"
    MergedWriter(student).write(merged_state(student), folder, torch.float32)
    student.tokenizer.save_pretrained(folder)
    return student, folder


def test_an_exported_student_goes_on_in_dpo_and_loads_again(merged, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, folder = merged
    ids = torch.tensor([[5, 9, 17, 30, 2]])
    student.model.eval()
    with torch.no_grad():
        own = student.model(input_ids=ids).logits
        read = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    assert torch.allclose(own, read, atol=1e-4), "what is handed over is what was trained"

    rows = [
        {"prompt": [{"role": "user", "content": "the cat"}], "chosen": [{"role": "assistant", "content": "sat on a mat"}],
         "rejected": [{"role": "assistant", "content": word}]}
        for word in ("run", "by the old dog", "an", "saw")
    ]  # fmt: skip
    file = tmp_path / "preferences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "dpo"
    dpo(str(folder), str(file), str(out), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        bf16=False, save_strategy="no", logging_steps=1, disable_tqdm=True)  # fmt: skip

    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    conversation = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert after.chat_template == before.chat_template == student.tokenizer.chat_template
    said = [t.apply_chat_template(conversation, tokenize=False) for t in (student.tokenizer, after)]
    assert said[0] == said[1] and after.eos_token_id == student.tokenizer.eos_token_id
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.eos_token_id == AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id
    moved = sum(
        (p - q).abs().sum().item()
        for (_, p), (_, q) in zip(
            loaded.named_parameters(), AutoModelForCausalLM.from_pretrained(folder).named_parameters(), strict=True
        )
    )
    assert moved > 0, "two steps were made"
    again = load_student(
        ModelConfig(path=str(out), dtype="float32", lora=None), seed=0
    )  # and this house takes it up again
    assert torch.isfinite(again.model(input_ids=ids).logits).all()


def test_what_a_run_of_all_weights_leaves_needs_no_merge(model_factory, tmp_path):
    from transformers import AutoModelForCausalLM

    student = load_student(ModelConfig(path=str(model_factory("qwen2")), dtype="float32", lora=None), seed=0)
    save_student(student, tmp_path / "final", exported=True)
    ids = torch.tensor([[5, 9, 17]])
    with torch.no_grad():
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "final")(input_ids=ids).logits
        assert torch.equal(read, student.model.eval()(input_ids=ids).logits)
