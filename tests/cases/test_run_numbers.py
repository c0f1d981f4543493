"""Case 06: a run whose numbers are none any more is no success, and learns nothing from them.

Reported as ainode#186, mlx-lm#1658, axolotl#1191.
"""

import io
import json
import math
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from student_trainer.errors import ModelError, NonFiniteError
from student_trainer.evaluation import heldout
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from tests.cases.material import INPUTS, MODELS, case_config, train_case


def quiet():
    return Console(file=io.StringIO(), width=300)


def log_of(folder):
    """Entries of the log, as a reader that holds to JSON sees them."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (folder / "run" / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def weights(folder):
    return load_file(folder / "model.safetensors")


def is_finite(folder):
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights(folder).values())


@pytest.fixture
def spoil(monkeypatch):
    """What is computed for a micro-batch at given steps (from 1): the loss as `make` changes it."""

    def spoil_at(steps, make):
        plain = DistillationTrainer.compute_loss

        def spoiled(self, model, inputs, *args, **kwargs):
            loss = plain(self, model, inputs, *args, **kwargs)
            return make(loss) if self.state.global_step + 1 in steps else loss

        monkeypatch.setattr(DistillationTrainer, "compute_loss", spoiled)

    return spoil_at


class _InfiniteGradient(torch.autograd.Function):
    """A loss that looks right, with a gradient that is not."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


SPOILED = {"nan loss": lambda loss: loss * torch.nan, "infinite loss": lambda loss: loss * torch.inf, "gradient": _InfiniteGradient.apply}  # fmt: skip


def test_the_case_ends_with_code_1_and_one_line_and_is_not_done(tmp_path):
    ended = train_case(tmp_path, "train.learning_rate=1e20", "train.max_steps=5", "train.save_steps=1")
    said = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and "done" not in ended.stderr and "Traceback" not in ended.stderr
    assert "step 2: the loss is not finite" in said and "rows.jsonl:" in said and "train.learning_rate=1e+20" in said
    assert "the newest checkpoint is checkpoint-1" in said
    assert not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "result.json").exists()
    assert [entry["step"] for entry in log_of(tmp_path)] == [1]


@pytest.mark.parametrize("kind", SPOILED)
def test_a_step_without_numbers_is_not_taken_and_the_last_checkpoint_stays(tmp_path, spoil, kind):
    spoil({3}, SPOILED[kind])
    config = case_config(tmp_path, "train.max_steps=5", "train.save_steps=2")
    with pytest.raises(NonFiniteError, match=r"step 3: .*rows\.jsonl:1") as ended:
        train(config, console=quiet())
    assert "checkpoint-2" in str(ended.value)
    assert is_finite(tmp_path / "run" / "checkpoint-2") and log_of(tmp_path)[-1]["step"] == 2


def test_the_weights_in_memory_are_those_before_the_bad_step(tmp_path, spoil, monkeypatch):
    taken = {}
    plain = DistillationTrainer._get_grad_norm

    def watched(self, model, grad_norm=None):
        taken[self.state.global_step + 1] = {n: p.detach().clone() for n, p in model.named_parameters()}
        taken["model"] = model
        return plain(self, model, grad_norm)

    monkeypatch.setattr(DistillationTrainer, "_get_grad_norm", watched)
    spoil({3}, SPOILED["gradient"])
    with pytest.raises(NonFiniteError):
        train(case_config(tmp_path, "train.max_steps=5"), console=quiet())
    for name, parameter in taken["model"].named_parameters():
        assert torch.equal(parameter, taken[3][name]), name


@pytest.mark.parametrize("kind", SPOILED)
def test_skip_leaves_the_step_out_counts_it_and_resumes_to_the_same_bits(tmp_path, spoil, kind):
    spoil({2, 5}, SPOILED[kind])
    settings = ("train.nonfinite=skip", "train.max_steps=6", "train.log_steps=2", "train.save_steps=2")
    train(case_config(tmp_path, *settings), console=quiet())
    log = [entry for entry in log_of(tmp_path) if "loss" in entry]
    assert [entry["skipped_steps"] for entry in log] == [1, 0, 1]
    assert all(
        math.isfinite(entry["loss"]) and entry["loss"] == pytest.approx(entry["sft_loss"], rel=1e-5) for entry in log
    )
    assert is_finite(tmp_path / "run" / "final")
    straight = weights(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "result.json").unlink()
    train(case_config(tmp_path, *settings), resume=True, console=quiet())
    assert all(torch.equal(value, straight[name]) for name, value in weights(tmp_path / "run" / "final").items())
    again = [entry for entry in log_of(tmp_path) if "loss" in entry]
    assert [(e["loss"], e["skipped_steps"]) for e in again] == [(e["loss"], e["skipped_steps"]) for e in log]


def test_an_entry_of_skipped_steps_alone_is_null_in_the_log_and_they_are_not_skipped_forever(tmp_path, spoil):
    spoil(set(range(2, 9)), SPOILED["nan loss"])
    config = case_config(tmp_path, "train.nonfinite=skip", "train.max_skipped=3", "train.max_steps=9")
    with pytest.raises(NonFiniteError, match=r"step 5: .*step 4 in a row \(train\.max_skipped=3\)"):
        train(config, console=quiet())
    log = log_of(tmp_path)
    assert [entry["loss"] for entry in log[1:]] == [None] * 3 and log[0]["loss"] > 0
    assert [entry["skipped_steps"] for entry in log] == [0, 1, 1, 1]


def test_a_stopped_run_may_go_on_with_skip(tmp_path, spoil):
    spoil({3}, SPOILED["nan loss"])
    with pytest.raises(NonFiniteError):
        train(case_config(tmp_path, "train.max_steps=4", "train.save_steps=2"), console=quiet())
    on = case_config(tmp_path, "train.max_steps=4", "train.save_steps=2", "train.nonfinite=skip")
    assert train(on, resume=True, console=quiet()).steps == 4


def test_an_update_that_breaks_the_weights_is_not_saved_over_good_ones(tmp_path, monkeypatch):
    """Finite gradients, and an update beyond what the dtype holds: at the last step nothing else would tell."""
    plain = DistillationTrainer._maybe_log_save_evaluate

    def broken(self, *args, **kwargs):
        if self.state.global_step == 2:
            next(self.model.parameters()).data.view(-1)[3] = torch.inf
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "_maybe_log_save_evaluate", broken)
    config = case_config(tmp_path, "train.max_steps=2", "train.save_steps=1", "train.keep_checkpoints=1")
    with pytest.raises(NonFiniteError, match=r"step 2: .*not saved; weights are not finite \(model\.embed_tokens"):
        train(config, console=quiet())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert is_finite(tmp_path / "run" / "checkpoint-1") and not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_before_there_is_a_folder(tmp_path, value):
    model = shutil.copytree(MODELS / "qwen2", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"model\.path .*not finite, {name}"):
        train(case_config(tmp_path, f"model.path={model}"), console=quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_held_out_figures_that_are_none_are_said(tmp_path, monkeypatch, policy):
    figures = {"nll_per_byte": math.nan, "nll_per_token": math.nan, "acc1": 0.0, "acc3": 0.0}
    monkeypatch.setattr(heldout, "measure", lambda *args, **kwargs: figures)
    shown = quiet()
    config = case_config(tmp_path, f"data.eval=[{INPUTS}/rows.jsonl]", f"train.nonfinite={policy}")
    if policy == "stop":
        with pytest.raises(NonFiniteError, match="held-out figures after step 2 are not finite: eval_nll_per_byte"):
            train(config, console=shown)
        assert (tmp_path / "run" / "final").is_dir() and not (tmp_path / "run" / "result.json").exists()
    else:
        result = train(config, console=shown)
        assert "held-out figures after step 2 are not finite" in shown.file.getvalue()
        assert math.isnan(result.metrics["nll_per_byte"]) and result.metrics["acc1"] == 0
        assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["nll_per_byte"] is None
    assert log_of(tmp_path)[-1 if policy == "stop" else -2]["step"] == 2
