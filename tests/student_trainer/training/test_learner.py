"""The learner: its names, where it narrows, and what the log makes of its figures."""

import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.errors import RunError
from student_trainer.losses.term import Mean, Needs
from student_trainer.model.load import load_student
from student_trainer.training.learner import Learner
from student_trainer.training.metrics import Meter
from student_trainer.training.objective import TERMS, output_term
from student_trainer.training.run import train


class Idle(nn.Module):
    """A term that is only there."""

    def __init__(self, name="idle"):
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.ones(3))

    def needs(self):
        return Needs()


class Plain:
    """A term without parameters."""

    name = "plain"

    def needs(self):
        return Needs()


@pytest.fixture
def student(model_factory):
    config = ModelConfig(path=str(model_factory("qwen2")), dtype="float32", lora=LoraSettings(rank=4))
    return load_student(config, 0)


def test_the_students_parameters_come_first_in_their_order(student):
    own = list(student.model.parameters())
    learner = Learner(student, [Plain(), Idle()])
    found = list(learner.named_parameters())
    assert [id(p) for _, p in found[:-1]] == [id(p) for p in own] and found[-1][0] == "projectors.idle.weight"
    assert learner.config is student.model.config and learner.device.type == "cpu"
    learner.eval()
    assert not student.model.training and not learner.projectors["idle"].training


def test_projectors_are_kept_and_read_back(student, tmp_path):
    learner = Learner(student, [Idle("a"), Idle("b")])
    learner.projectors["a"].weight.data.fill_(7.0)
    learner.save_projectors(tmp_path)
    other = Learner(student, [Idle("a"), Idle("b")])
    other.load_projectors(tmp_path)
    assert other.projectors["a"].weight.tolist() == [7.0] * 3
    with pytest.raises(RunError, match=r"projectors\.safetensors cannot be read"):
        Learner(student, [Idle("c")]).load_projectors(tmp_path)
    (tmp_path / "projectors.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match="cannot be read"):
        other.load_projectors(tmp_path)


def test_projectors_learn_faster_than_the_student_within_a_bound(student):
    learner = Learner(student, [Idle("a")])
    rates = {rate: learner.projector_group(rate) for rate in (1e-5, 3e-4, 5e-3)}
    assert {rate: group["lr"] for rate, group in rates.items()} == pytest.approx({1e-5: 1e-4, 3e-4: 1e-3, 5e-3: 5e-3})
    assert all(group["weight_decay"] == 0 for group in rates.values())


def test_without_projectors_nothing_is_written_nor_grouped(student, tmp_path):
    learner = Learner(student, [Plain()])
    learner.save_projectors(tmp_path)
    learner.load_projectors(tmp_path)
    assert not list(tmp_path.iterdir()) and learner.projector_group(1e-3) is None


def test_autocast_narrows_the_passes_and_never_the_losses(config_of, monkeypatch):
    """accelerate would put it around the whole learner."""
    seen = []

    def watched(objective, student):
        term = output_term(objective, student)
        plain = term.term

        def asked(outputs, *args):
            seen.append((torch.is_autocast_enabled("cpu"), outputs.final_BLD.dtype))
            return plain(outputs, *args)

        term.term = asked
        return term

    monkeypatch.setitem(TERMS, "output", watched)
    forward = Learner.plain
    passes = []

    def passed(self, *args):
        with self._autocast():
            passes.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args)

    monkeypatch.setattr(Learner, "plain", passed)
    train(config_of(train={"bf16": True, "max_steps": 2}, data={"eval": []}), console=Console(file=io.StringIO()))
    assert len(seen) == 4 and not any(on for on, _ in seen) and all(passes)


def test_the_log_divides_as_the_terms_say():
    meter, one = Meter(), torch.tensor(1.0, dtype=torch.float64)
    for left_out in (0.0, 1.0, 0.0):  # the second step is not learned from
        for factor in (1, 3):
            scale = factor * (1 + 100 * left_out)
            meter.add({"x_loss": Mean(scale * one, 2 * one), "acc": Mean(0 * one, 0 * one)}, torch.tensor(0.5))
        meter.end_window(torch.tensor(left_out))
    figures = meter.figures()
    assert (figures["loss"], figures["x_loss"], figures["acc"]) == (1.0, 1.0, 0.0)
    assert list(figures) == ["loss", "x_loss", "acc", "tokens_per_s", "wait_share"]
    meter = Meter()
    meter.add({"x_loss": Mean(one, one)}, one)
    meter.end_window(torch.tensor(1.0))
    assert math.isnan(meter.figures()["x_loss"]) and math.isnan(meter.figures()["loss"])
