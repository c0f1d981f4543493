"""Weights replaced in a written file against the same file written whole."""

import pytest
import torch
from safetensors.torch import load_file

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model.load import load_student
from student_trainer.model.merged import MergedWriter, merged_state
from student_trainer.rollout.engines.merged_file import MergedFile
from tests.thorough import covering

LORA = {"rank": 4, "target_modules": "all-linear"}


def student_of(folder, lora, dtype="float32", **settings):
    return load_student(ModelConfig(path=str(folder), dtype=dtype, lora=lora, **settings), 0)


def shaken(student, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in student.model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize(
    ("family", "lora", "dtype", "vocab_rows"),
    covering(["qwen2", "llama", "gemma2"], [LORA, None], ["float32", "bfloat16"], [None, 290]),
)
def test_new_weights_are_those_of_a_file_written_whole(model_factory, tmp_path, family, lora, dtype, vocab_rows):
    student = student_of(model_factory(family), lora, dtype)
    writer, wanted = MergedWriter(student), getattr(torch, dtype)
    writer.write(merged_state(student, None, wanted), tmp_path / "file", wanted, vocab_rows=vocab_rows)
    file = tmp_path / "file" / "model.safetensors"
    opened, before = MergedFile.of(student, file), {name: t.clone() for name, t in load_file(file).items()}
    assert opened is not None
    for seed in (1, 2):
        trained = shaken(student, seed)
        opened.update(trained)
        writer.write(merged_state(student, trained, wanted), tmp_path / "whole", wanted, vocab_rows=vocab_rows)
        found, expected = load_file(file), load_file(tmp_path / "whole" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert any(not torch.equal(found[name], value) for name, value in before.items())


def test_a_base_in_four_bit(model_factory, tmp_path):
    pytest.importorskip("bitsandbytes")
    student = student_of(model_factory("qwen2", hidden=64), {"rank": 4}, "bfloat16", quantize="nf4")
    writer = MergedWriter(student)
    writer.write(merged_state(student, None, torch.bfloat16), tmp_path, torch.bfloat16)
    opened, trained = MergedFile.of(student, tmp_path / "model.safetensors"), shaken(student, 1)
    assert opened is not None
    opened.update(trained)
    expected = merged_state(student, trained, torch.bfloat16)
    assert all(torch.equal(value, expected[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


def test_weights_of_another_student_are_refused(model_factory, tmp_path):
    student = student_of(model_factory("qwen2"), LORA)
    MergedWriter(student).write(merged_state(student), tmp_path, None)
    opened = MergedFile.of(student, tmp_path / "model.safetensors")
    assert opened is not None
    with pytest.raises(ModelError, match="1 differ"):
        opened.update(dict(list(shaken(student, 1).items())[1:]))


def test_a_file_that_holds_its_experts_apart_is_not_taken(model_factory, tmp_path):
    """transformers keeps the experts of a layer as one tensor and writes each by itself."""
    student = student_of(model_factory("qwen3_moe"), None)
    MergedWriter(student).write(merged_state(student), tmp_path, None)
    assert MergedFile.of(student, tmp_path / "model.safetensors") is None
