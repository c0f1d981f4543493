"""Cases 07 and 10, and their kind: what would fail at the end fails before step 0, and what fails on the way is one line.

Reported as transformers#29988, LLaMA-Factory#2767; Tk-Instruct#5.
"""

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from student_trainer import files
from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.files import disk_trouble_named
from student_trainer.model import saving
from student_trainer.training import checks, run_folder
from student_trainer.training.checkpoints import checkpoint, checkpoint_rotation
from student_trainer.training.run import train
from student_trainer.training.tracking import trackers
from student_trainer.training.trainer import DistillationTrainer
from tests.cases.material import INPUTS, MODELS, ROOT, base_file, case_config, train_case


def quiet():
    return Console(file=io.StringIO(), width=300)


def said(console):
    return console.file.getvalue()


# ---------------------------------------------------------------- case 07: what transformers reads and does not write


@pytest.mark.parametrize(
    "said_in_file",
    [
        {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2},
        {"top_k": 20, "eos_token_id": [2, 0]},
        {"do_sample": False, "temperature": 0.0, "min_p": 0.1},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    ],
    ids=["the case", "top_k alone", "temperature 0", "beams"],
)
@pytest.mark.parametrize("lora", ["null", "{rank: 2}"], ids=["full", "lora"])
def test_a_model_is_saved_with_the_generation_config_that_it_came_with(tmp_path, said_in_file, lora):
    model = shutil.copytree(MODELS / "gen", tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(said_in_file))
    config = case_config(tmp_path, f"model.path={model}", f"model.lora={lora}", "train.save_steps=1")
    folder = train(config, console=quiet()).output_dir
    if lora == "null":
        for saved in (folder / "final", folder / "checkpoint-2"):
            AutoModelForCausalLM.from_pretrained(saved)
            kept = GenerationConfig.from_pretrained(saved)
            assert {name: getattr(kept, name) for name in said_in_file} == said_in_file
    else:
        assert (folder / "final" / "adapter_model.safetensors").is_file()
    (folder / "result.json").unlink()
    train(config, resume=True, console=quiet())


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["everything but the weights", "whole"])
@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_what_cannot_be_saved_is_said_before_step_0(tmp_path, monkeypatch, what, limit):
    """Also of a model too large to be saved twice."""
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    def fails(*args, **kwargs):
        raise ValueError("this cannot be\nwritten")

    monkeypatch.setattr(saving, "_TRIED_BYTES", limit)
    monkeypatch.setattr(PreTrainedConfig if what == "model" else PreTrainedTokenizerBase, "save_pretrained", fails)
    with pytest.raises(ModelError, match=r"could not be saved, so no step was made: this cannot be written"):
        train(case_config(tmp_path), console=quiet())
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- case 10: trackers


@pytest.mark.parametrize(("name", "told"), [("wandb", "wandb"), ("tensorbord", "only .*tensorboard"), ("[none, tensorboard]", "none is no tracker"), ("[tensorboard, mlflow]", "'mlflow'")])  # fmt: skip
def test_a_tracker_that_is_missing_or_misspelt_is_one_line_and_leaves_no_folder(tmp_path, name, told):
    with pytest.raises(ConfigError, match=rf"train\.report_to: .*{told}"):
        train(case_config(tmp_path, f"train.report_to={name}"), console=quiet())
    assert not (tmp_path / "run").exists()
    train(case_config(tmp_path), console=quiet())


class _Failing(TrainerCallback):
    at = "on_train_begin"

    def _fail(self, event):
        if event == self.at:
            raise ConnectionError("nobody answers\nat this address")

    def on_train_begin(self, *args, **kwargs):
        self._fail("on_train_begin")

    def on_log(self, *args, **kwargs):
        self._fail("on_log")

    def on_train_end(self, *args, **kwargs):
        self._fail("on_train_end")


@pytest.mark.parametrize("at", ["on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_does_not_begin_ends_the_run_before_step_0_and_later_only_itself(tmp_path, monkeypatch, at):
    monkeypatch.setattr(_Failing, "at", at)
    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda names: [_Failing])
    shown = quiet()
    config = case_config(tmp_path, "train.report_to=tensorboard", "train.max_steps=3")
    if at == "on_train_begin":
        with pytest.raises(
            RunError, match="'tensorboard' does not begin: ConnectionError: nobody answers at this address"
        ):
            train(config, console=shown)
        assert not (tmp_path / "run").exists()
    else:
        assert train(config, console=shown).steps == 3
        assert said(shown).count("is told nothing more") == 1


def test_a_tracker_is_told_the_epoch_of_the_log(tmp_path):
    """To transformers the run is one epoch; the data are seen four times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = case_config(
        tmp_path, "train.report_to=tensorboard", "train.max_steps=4", f"data.eval=[{INPUTS}/rows.jsonl]"
    )
    folder = train(config, console=quiet()).output_dir
    logged = {e["step"]: e["epoch"] for e in map(json.loads, (folder / "train_log.jsonl").read_text().splitlines())}
    seen = {}
    for events in folder.rglob("events.out.tfevents*"):
        told = EventAccumulator(str(events))
        told.Reload()
        seen |= {e.step: e.value for tag in told.Tags()["scalars"] if tag.endswith("epoch") for e in told.Scalars(tag)}
    assert seen == pytest.approx(logged)
    assert logged == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_several_processes_are_refused_before_there_is_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(RunError, match=f"{name}=2: several processes"):
        train(case_config(tmp_path), console=quiet())
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_them_with_one_line(tmp_path):
    ended = train_case(tmp_path, env={"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and "WORLD_SIZE=2" in ended.stderr


# ---------------------------------------------------------------- disks


def test_a_disk_without_room_is_refused_before_step_0(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "free_bytes", lambda folder: 400_000)
    with pytest.raises(
        ConfigError, match=r"run\.output_dir .*: 0\.4 MiB are free, and 3 checkpoints .*train\.keep_checkpoints=2"
    ):
        train(case_config(tmp_path, "train.save_steps=1"), console=quiet())
    assert not (tmp_path / "run").exists()
    train(case_config(tmp_path), console=quiet())  # the model alone fits


def test_the_room_asked_for_is_what_is_taken(tmp_path, monkeypatch):
    asked = {}

    def watched(folder, checkpoint_bytes, final_bytes, keep, **_):
        asked.update(checkpoint=checkpoint_bytes, final=final_bytes)
        return ()

    monkeypatch.setattr("student_trainer.training.run.check_room", watched)
    folder = train(case_config(tmp_path, "train.save_steps=2"), console=quiet()).output_dir
    assert (folder / "final" / "model.safetensors").stat().st_size == pytest.approx(asked["final"], rel=0.05)
    taken = sum(file.stat().st_size for file in (folder / "checkpoint-2").glob("*.safetensors"))
    assert taken == pytest.approx(asked["checkpoint"], rel=0.06)


def test_a_disk_that_is_full_at_a_checkpoint_is_one_line_and_the_last_one_stays(tmp_path):
    """The limit of a process on its files stands for the disk: the model fits, its optimizer does not."""
    train(case_config(tmp_path, "train.max_steps=4", "train.save_steps=2"), console=quiet())
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "result.json").unlink()
    path = os.pathsep.join([str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-m", "student_trainer.cli", "train", str(base_file(tmp_path)), "train.max_steps=4", "train.save_steps=2", "--resume", "auto"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)),
    )  # fmt: skip
    line = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and "done" not in ended.stderr
    assert "checkpoint-4: cannot be written: " in line and "File too large" in line and "(from checkpoint-2)" in line
    assert checkpoint.damage_of(tmp_path / "run" / "checkpoint-2") == ""
    assert not (tmp_path / "run" / ".unfinished").exists() and not (tmp_path / "run" / "checkpoint-4").exists()
    assert (
        train(case_config(tmp_path, "train.max_steps=4", "train.save_steps=2"), resume=True, console=quiet()).steps == 4
    )


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("student_trainer.training.trainer.LOG_NAME", "/dev/full"),
        ("student_trainer.training.checkpoints.checkpoint_rotation.save_student", "checkpoint-1"),
        ("student_trainer.training.checkpoints.checkpoint.save_file", "checkpoint-1"),
        ("student_trainer.training.checkpoints.checkpoint.write_whole", "checkpoint-1"),
        ("student_trainer.training.checkpoints.checkpoint_rotation.sync_tree", "final"),
        ("student_trainer.training.run_folder.write_whole", "run.output_dir"),
    ],
)
def test_a_full_disk_is_one_line_wherever_it_shows(tmp_path, monkeypatch, where, what):
    monkeypatch.setattr(where, "/dev/full" if where.endswith("LOG_NAME") else full)
    with pytest.raises(RunError, match=rf"{what}.*: cannot be written: No space left on device; make room") as ended:
        train(case_config(tmp_path, "train.save_steps=1"), console=quiet())
    assert ended.value.exit_code == 2
    assert not (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / ".unfinished").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_room_is_no_advice_for_a_folder_that_cannot_be_written(number):
    with (
        pytest.raises(RunError, match=r"--out x: cannot be written: .*; choose another folder"),
        disk_trouble_named("--out x"),
    ):
        raise OSError(number, os.strerror(number))


def test_the_model_is_whole_and_on_disk_before_the_result_says_so(tmp_path, monkeypatch):
    order = []
    plain = {"sync_tree": files.sync_tree, "finish": run_folder.finish}

    def synced(folder):
        order.append(("synced", folder.name, sorted(path.name for path in folder.iterdir())))
        plain["sync_tree"](folder)

    def finished(folder, *args):
        order.append(("finish", (folder / "final" / "model.safetensors").is_file(), (folder / "result.json").exists()))
        return plain["finish"](folder, *args)

    monkeypatch.setattr(checkpoint_rotation, "sync_tree", synced)
    monkeypatch.setattr("student_trainer.training.run.finish", finished)
    folder = train(case_config(tmp_path), console=quiet()).output_dir
    assert [entry[:2] for entry in order] == [("synced", "final"), ("finish", True)] and order[1][2] is False
    assert order[0][2] == sorted(
        path.name for path in (folder / "final").iterdir() if path.name != "README.md"
    )  # the card


# ---------------------------------------------------------------- memory

TRAINING = "out of memory in step 2 .2 sequences, padded to .* tokens.: .*lower train.batch_size=2 .*model.gradient_checkpointing=true"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB free."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["cuda", "python", "host", "cublas"],
)
@pytest.mark.parametrize("when", ["step", "optimizer", "measure"])
def test_memory_that_runs_out_is_one_line_with_what_to_lower(tmp_path, monkeypatch, error, when):
    def fails(*args, **kwargs):
        raise error

    if when == "measure":
        monkeypatch.setattr("student_trainer.evaluation.heldout.measure", fails)
        named = "out of memory while measuring the held-out rows after step 1: .*lower train.eval_batch_size=8"
    else:
        name, named = {"step": "compute_loss", "optimizer": "_get_grad_norm"}[when], TRAINING
        plain = getattr(DistillationTrainer, name)

        def spoiled(self, *args, **kwargs):
            return fails() if self.state.global_step == 1 else plain(self, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, name, spoiled)
    settings = ("train.max_steps=3", "train.save_steps=1", "train.eval_steps=1", f"data.eval=[{INPUTS}/rows.jsonl]")
    if when != "measure":
        monkeypatch.setattr("student_trainer.evaluation.heldout.measure", lambda *a, **k: {"nll_per_token": 1.0})
    with pytest.raises(RunError, match=named) as ended:
        train(case_config(tmp_path, *settings), console=quiet())
    assert "\n" not in str(ended.value) and ended.value.exit_code == 2
    if when != "measure":
        assert checkpoint.damage_of(tmp_path / "run" / "checkpoint-1") == ""


def test_another_runtime_error_is_left_as_it_is(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(DistillationTrainer, "compute_loss", fails)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(case_config(tmp_path), console=quiet())


# ---------------------------------------------------------------- random state of other machines


class _OneGpu:
    """torch.cuda of a machine with one GPU, as far as random numbers go."""

    def __init__(self, monkeypatch, available=True):
        self.state = torch.arange(16, dtype=torch.uint8)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: self.state)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)

        def unavailable(*_):
            raise AssertionError("there is one GPU")

        monkeypatch.setattr(torch.cuda, "set_rng_state_all", unavailable)

    def _set(self, state, device=0):
        self.state = state


def test_fewer_gpus_than_at_saving(tmp_path, monkeypatch):
    """Of a checkpoint that an earlier version wrote beside three others: the run computes on one."""
    torch.manual_seed(5)
    states = {f"cuda{i}": torch.full((16,), i, dtype=torch.uint8) for i in range(4)}
    save_file({"cpu": torch.get_rng_state(), **states}, tmp_path / "random.safetensors")
    expected = torch.rand(3)
    gpu = _OneGpu(monkeypatch)
    assert checkpoint.load_random(tmp_path) == ""
    assert torch.equal(gpu.state, states["cuda0"]) and torch.equal(torch.rand(3), expected)
    checkpoint.save_random(tmp_path)
    assert set(load_file(tmp_path / "random.safetensors")) == {"cpu", "cuda0"}


def test_no_gpu_where_there_was_one_is_told_and_the_other_way_round(tmp_path, monkeypatch):
    with monkeypatch.context() as there:
        _OneGpu(there)
        checkpoint.save_random(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "resumed without one" in checkpoint.load_random(tmp_path)
    checkpoint.save_random(tmp_path)
    _OneGpu(monkeypatch)
    assert "saved without a GPU" in checkpoint.load_random(tmp_path)
