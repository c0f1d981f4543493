"""What is trained is float32, whatever the weights are kept and computed in; float16 is refused; a run of it resumes bit by bit."""

import hashlib
import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ModelError
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.model import precision
from student_trainer.model.load import load_student
from student_trainer.training.run import train
from tests.cases.material import MODELS, case_config

QUIET = Console(file=io.StringIO(), width=200)
STEPS = ("train.max_steps=40", "train.learning_rate=1e-5", "model.dtype=bfloat16")


@pytest.fixture(params=[False, True], ids=["emulated", "native"])
def native(request, monkeypatch):
    """Whether the machine is said to multiply bfloat16: both ways are to be right anywhere."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda on_gpu: request.param)
    return request.param


def test_weights_trained_whole_are_float32_and_move(tmp_path, native):
    config = case_config(tmp_path, *STEPS, "train.save_steps=40")
    told = Console(file=io.StringIO(), width=400)
    result = train(config, console=told)
    before = load_file(MODELS / "qwen2" / "model.safetensors")
    kept = load_file(result.output_dir / "checkpoint-40" / "model.safetensors")
    moved = sum(int((kept[name] != before[name]).sum()) for name in kept)
    total = sum(tensor.numel() for tensor in kept.values())
    assert moved > 0.97 * total, f"{moved} of {total} weights moved"
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    final = load_file(result.output_dir / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16}
    assert final.keys() == kept.keys(), "a tied head is written once"
    assert all(torch.equal(final[name], kept[name].bfloat16()) for name in final)
    assert json.loads((result.output_dir / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(result.output_dir / "final", dtype="auto")
    assert next(again.parameters()).dtype == torch.bfloat16
    said = "computed in bfloat16" if native else "computed in float32, since this CPU only emulates bfloat16"
    assert said in told.file.getvalue() and "GiB" in told.file.getvalue()


def test_a_resumed_run_of_narrowed_weights_is_the_uninterrupted_one(tmp_path, native):
    hashes = []
    for name in ("whole", "halves"):
        config = case_config(
            tmp_path, *STEPS, f"run.output_dir={tmp_path}/{name}", "train.max_steps=4", "train.save_steps=2"
        )
        result = train(config, console=QUIET)
        if name == "halves":
            for gone in ("final", "checkpoint-4"):
                shutil.rmtree(result.output_dir / gone)
            (result.output_dir / "result.json").unlink()
            train(config, resume=True, console=QUIET)
        hashes.append(
            [
                hashlib.sha256((result.output_dir / part / "model.safetensors").read_bytes()).hexdigest()
                for part in ("checkpoint-4", "final")
            ]
        )
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("family", ["qwen2", "llama", "phi", "gemma2"])
def test_gradients_of_narrowed_weights_are_those_of_float32_but_for_rounding(model_factory, monkeypatch, family):
    """Tied, untied, with a bias, with a soft-cap."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda on_gpu: True)
    ids_BL = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    labels_N, gradients, totals = ids_BL.roll(-1, 1).flatten(), [], []
    for dtype in ("float32", "bfloat16"):
        folder = model_factory(family, hidden=64)
        student = load_student(ModelConfig(path=str(folder), dtype=dtype, lora=None), 0)
        assert student.narrowed == (torch.bfloat16 if dtype == "bfloat16" else None)
        state_ND = student.states(ids_BL).flatten(0, 1)
        assert state_ND.dtype == student.head(300).weight_VD.dtype == getattr(torch, dtype)
        loss = output_loss(
            state_ND,
            student.head(300),
            None,
            labels_N,
            torch.ones(48),
            48.0,
            OutputLossSpec(kd_weight=0.0, sft_weight=1.0),
        )
        loss.total.backward()
        totals.append(float(loss.total))
        gradients.append({name: p.grad for name, p in student.model.named_parameters()})
        assert all(p.dtype == torch.float32 for p in student.model.parameters())
    assert totals[1] == pytest.approx(totals[0], rel=0.02)
    for name, exact in gradients[0].items():
        found = gradients[1][name]
        assert found.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.97, name


def test_adapters_over_a_bfloat16_base_are_float32(model_factory):
    student = load_student(ModelConfig(path=str(model_factory("llama")), dtype="bfloat16", lora={"rank": 2}), 0)
    trained = {p.dtype for p in student.model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in student.model.parameters() if not p.requires_grad}
    assert trained == {torch.float32} and frozen == {torch.bfloat16} and student.narrowed is None


@pytest.mark.parametrize("lora", ["null", "{rank: 4}"])
def test_float16_is_refused_before_anything_is_read(tmp_path, lora):
    config = case_config(tmp_path, "model.dtype=float16", f"model.lora={lora}", "model.path=/nowhere")
    with pytest.raises(ModelError, match=r"model\.dtype=float16.*bfloat16"):
        train(config, console=QUIET)
    assert not config.run.output_dir.exists()
    with pytest.raises(ModelError, match=r"model\.dtype=float16"):
        load_student(config.model, 0)


def test_a_checkpoint_of_float32_weights_is_as_it_was(tmp_path):
    result = train(case_config(tmp_path), console=QUIET)
    final = load_file(result.output_dir / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in final.values()} == {torch.float32}
