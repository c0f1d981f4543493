"""Recorded passes without a GPU: a recorder of the tests runs again what CUDA would replay; tests/gpu has the real one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from rich.console import Console

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model.load import load_student
from student_trainer.model.speed import cuda_graphs
from student_trainer.training import trainer as trainer_module
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from tests.student_trainer.training.test_train import losses

SHAPES = [(2, 32), (2, 32), (2, 32), (2, 48), (2, 48), (2, 32), (2, 48), (3, 64)]


class Rerun:
    """Passes that compute again what was recorded, into the same tensors."""

    made = 0

    def __init__(self, run, gradients, ids_BL, fault):
        Rerun.made += 1
        self._run, self._gradients, self._fault = run, gradients, fault
        self._outputs = run(ids_BL)
        self.ids_BL, self.outputs = ids_BL, tuple(output.detach().clone() for output in self._outputs)
        self.grads = tuple(torch.zeros_like(output) for output in self.outputs)

    def forward(self):
        if self._fault == "breaks":
            raise torch.OutOfMemoryError("CUDA out of memory")
        with torch.enable_grad():
            self._outputs = self._run(self.ids_BL)
        factor = {"wrong": 1.1, "rounds": 1 + 1e-6}.get(self._fault, 1)
        for kept, output in zip(self.outputs, self._outputs, strict=True):
            kept.copy_(output.detach() * factor)

    def backward(self):
        grads = cuda_graphs.gradients_of(self._outputs, self.grads, self._gradients.parameters)
        if self._fault == "forgets":
            smallest = min(
                range(len(grads)), key=lambda i: float("inf") if grads[i] is None else float(grads[i].norm())
            )
            grads = [None if i == smallest else grad for i, grad in enumerate(grads)]
        for _ in range(2 if self._fault == "twice" else 1):
            self._gradients.add(grads)
        if self._fault == "breaks back":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self._fault == "no number":
            self._gradients.add([grad * float("nan") for grad in grads])


class Rerunner:
    """A recorder for machines without a GPU."""

    def __init__(self, fault=""):
        self.fault, self.rooms, self.settled = fault, 0, 0

    def check_room(self):
        self.rooms += 1
        if self.fault == "full" and self.rooms < 3:
            raise cuda_graphs.NoRoomError("0.1 GiB of the GPU are free")

    def record(self, run, gradients, ids_BL):
        if self.fault == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.fault == "odd":
            raise TypeError("torch has no such interface")
        if self.fault == "refused":
            raise ModelError("model.compiled=true: the layers cannot be compiled here")
        return Rerun(run, gradients, ids_BL, self.fault)

    def settle(self):
        self.settled += 1


def student_of(folder, lora):
    settings = None if lora is None else LoraSettings(**lora)
    config = ModelConfig(path=str(folder), dtype="float32", lora=settings, gradient_checkpointing=True)
    student = load_student(config, 0)
    student.model.train()
    return student


def trained(student):
    return [p for p in student.causal_lm.get_decoder().parameters() if p.requires_grad]


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_the_plain_gradients_over_windows_and_shapes(model_factory, lora):
    student = student_of(model_factory("qwen2"), lora)
    plain = copy.deepcopy(student)
    told = []
    body = cuda_graphs.GraphedBody(student.forward, trained(student), Rerunner(), told.append, worth=2)
    generator = torch.Generator().manual_seed(0)
    for window in range(3):  # gradients of a window add up, and are taken away at its end
        for shape in SHAPES:
            ids_BL = torch.randint(0, 300, shape, generator=generator)
            weight_BLD = torch.randn(*shape, 32, generator=generator)
            for run in (body, plain.forward):
                (run(ids_BL).final_BLD * weight_BLD).sum().backward()
        expected = {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None}
        found = dict(student.model.named_parameters())
        for name, grad in expected.items():
            torch.testing.assert_close(found[name].grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))
        assert body.recorded == (2 if window == 0 else 3), "the last shape comes once a window"
        for one in (student, plain):
            one.model.zero_grad(set_to_none=True)
    assert not told


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [("refuses", "capturing"), ("odd", "no such interface"), ("breaks", "memory"), ("breaks back", "memory"), ("no number", "nan"), ("wrong", "states differ"),
     ("twice", "gradients differ"), ("forgets", "gradients differ")],
)  # fmt: skip
def test_what_cannot_be_recorded_or_replays_wrongly_is_told_and_run_as_ever(model_factory, fault, said, lora):
    """Trying leaves nothing behind in the gradients of the window it falls into."""
    student = student_of(model_factory("qwen2"), lora)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:  # zero at first: then nothing would reach A
            torch.nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(student)
    told = []
    recorder = Rerunner(fault)
    body = cuda_graphs.GraphedBody(student.forward, trained(student), recorder, told.append, worth=2)
    for number in range(4):
        ids_BL = torch.arange(32).reshape(2, 16) + number
        for run in (body, plain.forward):
            (run(ids_BL).final_BLD ** 2).sum().backward()
    for one, other in zip(trained(student), trained(plain), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert body.recorded == 0 and recorder.settled == 1
    assert len(told) == 1 and said in told[0]


def test_what_a_user_has_to_mend_is_not_hidden(model_factory):
    student = student_of(model_factory("qwen2"), {"rank": 4})
    body = cuda_graphs.GraphedBody(student.forward, trained(student), Rerunner("refused"), pytest.fail, worth=1)
    with pytest.raises(ModelError):
        body(torch.arange(32).reshape(2, 16))


def test_what_there_is_no_room_for_is_recorded_when_there_is(model_factory):
    student = student_of(model_factory("qwen2"), {"rank": 4})
    told, recorder, ready = [], Rerunner("full"), [False]
    body = cuda_graphs.GraphedBody(
        student.forward, trained(student), recorder, told.append, is_ready=lambda: ready[0], worth=2
    )
    for number in range(1, 12):
        body(torch.arange(32).reshape(2, 16))
        assert body.recorded == (number >= 9), "ready at the fourth; then full, full two later, and recorded two later"
        ready[0] = number >= 4
    assert len(told) == 1 and "memory is short: 0.1 GiB" in told[0]


@pytest.mark.parametrize("fault", ["", "rounds"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_replays_that_round_otherwise_are_told_of_where_bits_matter(model_factory, fault, deterministic):
    student = student_of(model_factory("qwen2"), {"rank": 4})
    told = []
    body = cuda_graphs.GraphedBody(student.forward, trained(student), Rerunner(fault), told.append, worth=1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        for length in (16, 20):
            body(torch.arange(2 * length).reshape(2, length))
    finally:
        torch.use_deterministic_algorithms(before)
    assert body.recorded == 2
    assert ["round otherwise" in told_ for told_ in told] == ([True] if fault and deterministic else [])


def test_a_run_with_recorded_passes_is_the_run_without(config_of, tmp_path, monkeypatch):
    """The whole trainer around them: windows, clipping, gradients that it takes away, lengths padded to a few."""
    sections = {
        "model": {"lora": {"rank": 4}, "gradient_checkpointing": True},
        "data": {"eval": []},
        "train": {"max_steps": 12},
    }
    logs = {}
    plain = DistillationTrainer.__init__

    def with_recordings(self, config, student, *args, **kwargs):
        student.is_graphed = True
        plain(self, config, student, *args, **kwargs)

    for name in ("plain", "recorded"):
        if name == "recorded":
            monkeypatch.setattr(trainer_module, "CudaRecorder", Rerunner)
            monkeypatch.setattr(DistillationTrainer, "__init__", with_recordings)
        config = config_of(run={"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}, **sections)
        made = Rerun.made
        train(config, console=Console(file=io.StringIO()))
        logs[name] = losses(tmp_path / name)
        assert (Rerun.made > made) == (name == "recorded")
    assert len(logs["plain"]) == len(logs["recorded"])
    for one, other in zip(logs["plain"], logs["recorded"], strict=True):
        for entry in (one, other):
            entry.pop("total_flos", None)  # padding counts too
        assert other == pytest.approx(one, rel=1e-4)


def test_few_lengths():
    lengths = {cuda_graphs.padded_length(n) for n in range(2, 4097)}
    assert len(lengths) <= cuda_graphs.MOST_SHAPES and cuda_graphs.padded_length(2048) == 2048
    for n in range(2, 4097):
        assert n <= cuda_graphs.padded_length(n) <= max(n + 4, n * 1.13)
        assert cuda_graphs.padded_length(cuda_graphs.padded_length(n)) == cuda_graphs.padded_length(n)
