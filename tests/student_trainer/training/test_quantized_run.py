"""Whole runs with a base in 4 bit: they learn, are resumed to the bit, measure what they train, and write their own samples."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from student_trainer.export.run import Export, export
from student_trainer.inference.load import load_student as load_asked
from student_trainer.model.load import load_student
from student_trainer.training.metrics import TIMED
from student_trainer.training.run import train

pytest.importorskip("bitsandbytes")


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in TIMED and not k.startswith("train_")} for e in entries]


def test_a_quantised_run_learns_and_is_resumed_to_the_bit(config_of, tmp_path):
    shown = Console(file=io.StringIO(), width=300)
    sections = {"model": {"quantize": "nf4"}, "loss": {"sft_weight": 0.1}, "train": {"max_steps": 8, "eval_steps": 4}}
    runs = [
        config_of(run={"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}, **sections)
        for name in ("straight", "broken")
    ]
    result = train(runs[0], console=shown)
    logged = [e for e in result.curve if "loss" in e]
    assert logged[-1]["kd_loss"] < logged[0]["kd_loss"]
    assert "kept in 4 bit (nf4, double)" in shown.file.getvalue()
    assert not (result.output_dir / "final" / "model.safetensors").exists()
    train(runs[1], console=Console(file=io.StringIO()))
    for name in ("checkpoint-8", "final"):
        shutil.rmtree(tmp_path / "broken" / name)
    (tmp_path / "broken" / "result.json").unlink()
    train(runs[1], resume=True, console=Console(file=io.StringIO()))
    adapters = [
        (tmp_path / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("straight", "broken")
    ]
    assert adapters[0] == adapters[1]
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "broken")
    asked_as_it_was_trained(tmp_path / "straight", runs[0], tmp_path / "exported")


def asked_as_it_was_trained(run, config, exported):
    """`infer` computes with the base in 4 bit, and `export` merges into what that base is: both are the function that was trained."""
    trained = load_student(config.model.model_copy(update={"path": str(run / "final")}), seed=0)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = trained.model.eval()(ids).logits
        asked, _ = load_asked(run)
        torch.testing.assert_close(asked(ids).logits, expected, rtol=0, atol=1e-5)
        export(Export(run, exported, "merged", prompts=2, max_new_tokens=4), Console(file=io.StringIO()))
        merged = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
        plain = load_student(config.model.model_copy(update={"path": str(run / "final"), "quantize": None}), seed=0)
        assert (plain.model.eval()(ids).logits - expected).abs().max() > 1e-2, (
            "over the plain base it is another function"
        )


def test_a_quantised_student_writes_its_own_samples(config_of):
    config = config_of(
        model={"quantize": "nf4", "lora": {"rank": 4}},
        on_policy={"share": 1.0, "max_new_tokens": 8},
        train={"max_steps": 3, "save_steps": 0},
        data={"eval": []},
    )
    result = train(config, console=Console(file=io.StringIO()))
    assert result.steps == 3 and all(e["on_policy_share"] == 1 for e in result.curve if "loss" in e)
