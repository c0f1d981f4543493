"""A new loss term with a tap and parameters of its own, plugged in by one line in `TERMS`: trained, logged, checkpointed, dropped."""

import inspect
import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError, RunError
from student_trainer.losses.term import Mean, Needs, TermResult
from student_trainer.model.speed import cuda_recorder
from student_trainer.training import trainer as trainer_module
from student_trainer.training.objective import TERMS
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from teacher_wire.score.signals import Hidden
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.model.test_cuda_graphs import Rerun, Rerunner
from tests.student_trainer.training.test_train import adapter_hash, losses

QUIET = Console(file=io.StringIO())


class GuessedState(nn.Module):
    """The student's first block shall know the direction of the teacher's last state, through a projector."""

    name = "guess"

    def __init__(self, objective, student):
        super().__init__()
        self.to_teacher = nn.Linear(student.body.config.hidden_size, 24)

    def needs(self):
        return Needs(signals=(Hidden(),), taps=(1,))

    def term(self, outputs, labels, rows, normalizer, step):
        weights_N = rows.weights_N.to(rows.index_N.device)
        guess_ND = self.to_teacher(rows.of(outputs.taps[1]))
        cosine_N = nn.functional.cosine_similarity(guess_ND, labels.named["hidden_ND"].float())
        off = ((1 - cosine_N) * weights_N).sum()
        total = off * (0.5 if step < 4 else 0.25) / normalizer
        return TermResult(total, {"guess_loss": Mean(off.detach().double(), weights_N.double().sum())})


@pytest.fixture
def plugged(monkeypatch):
    monkeypatch.setitem(TERMS, "guess", GuessedState)


@pytest.fixture
def run(tmp_path, model_factory, rows_file):
    """name, sections -> the folder of a run of 8 steps against a fake teacher of width 24."""
    with serve(fake_for(model_factory("qwen2"))) as server:

        def go(name, *, resume=False, **sections):
            where = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}
            tree = run_config(tmp_path, model_factory("qwen2"), rows_file, server.address, run=where, **sections)
            tree["train"] |= {"max_steps": 8, "save_steps": 4}
            return train(parse_config(tree, "test"), resume=resume, console=QUIET).output_dir

        yield go


def test_it_is_short():
    assert len(inspect.getsource(GuessedState).splitlines()) < 40


def test_it_is_trained_logged_checkpointed_and_dropped(run, monkeypatch):
    plain = run("plain")
    monkeypatch.setitem(TERMS, "guess", GuessedState)
    folder = run("plugged", loss={"sft_weight": 0.1})
    log = [entry for entry in losses(folder) if "loss" in entry]
    assert log[-1]["guess_loss"] < log[0]["guess_loss"]
    for entry, weight in ((log[0], 0.5), (log[-1], 0.25)):
        parts = entry["kd_loss"] + 0.1 * entry["sft_loss"] + weight * entry["guess_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-4)
    kept = load_file(folder / "checkpoint-8" / "projectors.safetensors")
    assert {name: tuple(t.shape) for name, t in kept.items()} == {
        "guess.to_teacher.weight": (24, 32),
        "guess.to_teacher.bias": (24,),
    }
    *usual, own = json.loads((folder / "checkpoint-8" / "training_state.json").read_text())["param_groups"]
    assert (own["initial_lr"], own["weight_decay"]) == (usual[0]["initial_lr"], 0.0)  # which is above 1e-3
    assert not list((folder / "final").glob("projectors*")) and not list(plain.rglob("projectors*"))
    names = [load_file(f / "final" / "adapter_model.safetensors").keys() for f in (plain, folder)]
    assert names[0] == names[1] and adapter_hash(plain) != adapter_hash(folder)


def test_the_request_holds_every_signal_that_the_terms_need(run, plugged):
    """The output loss learns from top-k logits, this term from states: one request, one forward pass."""
    log = [entry for entry in losses(run("both", labels={"transport": "top_k", "k": 8})) if "loss" in entry]
    assert log[-1]["guess_loss"] < log[0]["guess_loss"] and "kd_loss" in log[0]


def test_a_resumed_run_is_the_uninterrupted_one(run, plugged):
    straight, broken = run("straight"), run("broken")
    shutil.rmtree(broken / "checkpoint-8")
    shutil.rmtree(broken / "final")
    (broken / "result.json").unlink()
    run("broken", resume=True)
    assert adapter_hash(broken) == adapter_hash(straight) and losses(broken) == losses(straight)
    for name in ("projectors", "optimizer"):
        one, other = (load_file(f / "checkpoint-8" / f"{name}.safetensors") for f in (broken, straight))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_without_its_projectors_is_refused(run, plugged, monkeypatch):
    folder = run("run")
    monkeypatch.delitem(TERMS, "guess")
    other = run("other")
    shutil.rmtree(other / "final")
    (other / "result.json").unlink()
    monkeypatch.setitem(TERMS, "guess", GuessedState)
    with pytest.raises(RunError, match=r"checkpoint-8/projectors\.safetensors cannot be read"):
        run("other", resume=True)
    assert (folder / "final").is_dir()


def test_recorded_passes_carry_its_tap(run, plugged, monkeypatch):
    model = {"lora": {"rank": 4}, "gradient_checkpointing": True}
    logs = [losses(run("plain", model=model))]
    plain = DistillationTrainer.__init__

    def with_recordings(self, config, student, *args, **kwargs):
        student.is_graphed = True
        plain(self, config, student, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "CudaRecorder", Rerunner)
    monkeypatch.setattr(trainer_module.cuda_graphs, "WORTH_RECORDING", 2)
    monkeypatch.setattr(trainer_module.cuda_graphs.GraphedBody.__init__, "__defaults__", (lambda: True, 2))
    monkeypatch.setattr(DistillationTrainer, "__init__", with_recordings)
    made = Rerun.made
    logs.append(losses(run("recorded", model=model)))
    assert Rerun.made > made and cuda_recorder.CudaRecorder is not Rerunner
    for one, other in zip(*logs, strict=True):
        one.pop("total_flos", None), other.pop("total_flos", None)  # padding counts too
        assert other == pytest.approx(one, rel=1e-3)


class Gaze(Hidden):
    """A kind that no teacher gives."""

    kind = "gaze"


@pytest.mark.parametrize(
    ("needs", "named"),
    [
        (
            Needs((Gaze(),)),
            r"loss\.guess: needs the signal gaze, which teacher 'fake' does not give; it gives attention, ffn, full",
        ),
        (Needs(taps=(1, 7)), r"loss\.guess: taps block 7 of the student, whose blocks are 1\.\.2"),
        (Needs(taps=(-1,)), r"loss\.guess: taps block -1"),
    ],
)
def test_what_it_lacks_is_refused_by_its_name_before_there_is_a_folder(
    run, plugged, monkeypatch, tmp_path, needs, named
):
    monkeypatch.setattr(GuessedState, "needs", lambda self: needs)
    with pytest.raises(ConfigError, match=named):
        run("refused")
    assert not (tmp_path / "refused").exists()


def test_two_terms_that_log_the_same_are_refused(run, plugged, monkeypatch):
    class Twin(GuessedState):
        name = "twin"

    monkeypatch.setitem(TERMS, "twin", Twin)
    with pytest.raises(ConfigError, match=r"loss\.twin: another term logs guess_loss too"):
        run("twice")
