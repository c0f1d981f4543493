"""The student's quick ways on a real GPU: recorded passes equal plain ones, no step waits for the device, bad labels teach nothing.

On a machine without pytest's plugins: python3 -m pytest -c /dev/null --rootdir . --import-mode=importlib tests/gpu
"""

import copy
import io

import pytest
import torch
from rich.console import Console

from student_trainer.config.model import ModelConfig
from student_trainer.config.run import parse_config
from student_trainer.labels.device_transfer import ahead
from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.model.load import load_student
from student_trainer.model.speed import compiled
from student_trainer.model.speed.cuda_graphs import GraphedBody
from student_trainer.model.speed.cuda_recorder import CudaRecorder
from student_trainer.training import trainer as trainer_module
from student_trainer.training.run import train
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
QUIET = Console(file=io.StringIO())
SHAPES = [(2, 32), (2, 32), (2, 32), (2, 48), (2, 48), (2, 32), (2, 48), (3, 64)]


@pytest.fixture
def folder(model_factory):
    return model_factory("qwen2", hidden=64)


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_recorded_passes_give_the_plain_gradients_over_windows_and_shapes(folder, lora):
    config = ModelConfig(
        path=str(folder), dtype="float32", lora=lora, gradient_checkpointing=True, compiled=True, graphs=True
    )
    student = load_student(config, 0)
    assert student.is_graphed
    student.model.train()
    plain = copy.deepcopy(student)
    compiled.uninstall(plain.model)
    body = student.causal_lm.get_decoder()
    told = []
    trained = [p for p in body.parameters() if p.requires_grad]
    graphed = GraphedBody(student.forward, trained, CudaRecorder(), told.append, worth=2)
    generator = torch.Generator(device="cuda").manual_seed(0)
    for _ in range(3):  # gradients of a window add up, and are taken away at its end
        for shape in SHAPES:
            ids_BL = torch.randint(0, 300, shape, device="cuda", generator=generator)
            weight_BLD = torch.randn(*shape, 64, device="cuda", generator=generator)
            for run in (graphed, plain.forward):
                (run(ids_BL).final_BLD * weight_BLD).sum().backward()
        found = {n: p.grad for n, p in student.model.named_parameters() if p.grad is not None}
        expected = {n: p.grad for n, p in plain.model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))
        for one in (student, plain):
            one.model.zero_grad(set_to_none=True)
    assert not told and graphed.recorded == 3, told


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_recorded_passes_carry_taps_and_what_flows_back_through_them(folder, lora):
    config = ModelConfig(
        path=str(folder), dtype="float32", lora=lora, gradient_checkpointing=True, compiled=True, graphs=True
    )
    student = load_student(config, 0)
    student.model.train()
    plain = copy.deepcopy(student)
    compiled.uninstall(plain.model)
    told = []
    trained = [p for p in student.body.parameters() if p.requires_grad]
    graphed = GraphedBody(student.forward, trained, CudaRecorder(), told.append, worth=2)
    generator = torch.Generator(device="cuda").manual_seed(0)
    for number in range(9):
        taps = ((0, 1, 2), (), (2,))[number % 3]
        ids_BL = torch.randint(0, 300, (2, 32), device="cuda", generator=generator)
        found = []
        for forward in (graphed, plain.forward):
            outputs = forward(ids_BL, taps)
            slope_BLD = torch.linspace(-1, 1, outputs.final_BLD.numel(), device="cuda").view_as(outputs.final_BLD)
            sum((output_BLD * slope_BLD).sum() for output_BLD in outputs.tensors()).backward()
            found.append([output_BLD.detach().clone() for output_BLD in outputs.tensors()])
            del outputs  # no graph of another pass may be alive while one is recorded
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        grads = dict(plain.model.named_parameters())
        for name, parameter in student.model.named_parameters():
            if grads[name].grad is not None:
                scale = float(grads[name].grad.abs().max())
                torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-3, atol=1e-3 * scale)
        for one in (student, plain):
            one.model.zero_grad(set_to_none=True)
    assert not told and graphed.recorded == 3, told


def test_a_replay_gives_the_very_bits_of_the_plain_passes(folder):
    """Else a resumed run, which records anew, would not be the run without a break."""
    config = ModelConfig(path=str(folder), dtype="bfloat16", lora={"rank": 4}, gradient_checkpointing=True)
    student = load_student(config, 0)
    assert student.is_graphed, "by itself on a GPU"
    student.model.train()
    trained = [p for p in student.causal_lm.get_decoder().parameters() if p.requires_grad]
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def run(ids_BL, taps=()):
        with torch.autocast("cuda", torch.bfloat16):
            return student.forward(ids_BL, taps)

    told = []
    graphed = GraphedBody(run, trained, CudaRecorder(), told.append, worth=2)
    generator = torch.Generator(device="cuda").manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for length in (256, 256, 512, 512, 256):
            ids_BL = torch.randint(0, 300, (2, length), device="cuda", generator=generator)
            weight_BLD = torch.randn(2, length, 64, device="cuda", generator=generator)
            found = []
            for forward in (graphed, run):
                student.model.zero_grad(set_to_none=True)
                for _ in range(2):  # a window
                    state_BLD = forward(ids_BL).final_BLD
                    (state_BLD * weight_BLD).sum().backward()
                    kept_BLD = state_BLD.detach().clone()
                    del state_BLD  # no graph of another pass may be alive while one is recorded
                found.append([kept_BLD, *(p.grad.clone() for p in trained if p.grad is not None)])
            assert len(found[0]) == len(found[1]) > 10
            assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not told and graphed.recorded == 2, told


def test_what_cannot_be_recorded_is_told_and_run_as_ever(folder):
    student = load_student(ModelConfig(path=str(folder), dtype="float32", lora={"rank": 4}), 0)
    student.model.train()

    def asks_the_device(ids_BL, taps=()):
        assert int(ids_BL.sum()) >= 0
        return student.forward(ids_BL, taps)

    told = []
    trained = [p for p in student.model.parameters() if p.requires_grad]
    graphed = GraphedBody(asks_the_device, trained, CudaRecorder(), told.append, worth=2)
    stream = torch.cuda.current_stream()
    ids_BL = torch.ones(2, 16, dtype=torch.int64, device="cuda")
    drawn = []
    for attempt in (graphed, student.forward):
        torch.manual_seed(3)
        torch.randn(5, device="cuda")
        for _ in range(4):
            torch.testing.assert_close(attempt(ids_BL).final_BLD, student.states(ids_BL), rtol=1e-3, atol=1e-3)
        drawn.append(torch.randn(5, device="cuda"))  # a bad recording must not hold on to the generator, nor change it
    assert torch.equal(*drawn) and torch.cuda.current_stream() == stream
    assert len(told) == 1 and "cannot be recorded" in told[0]


def test_what_there_is_no_memory_for_is_not_recorded(folder, monkeypatch):
    student = load_student(ModelConfig(path=str(folder), dtype="float32", lora={"rank": 4}), 0)
    student.model.train()
    told = []
    trained = [p for p in student.model.parameters() if p.requires_grad]
    graphed = GraphedBody(student.forward, trained, CudaRecorder(), told.append, worth=2)
    ids_BL = torch.ones(2, 16, dtype=torch.int64, device="cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1 << 40)  # what a step has needed before
    for _ in range(3):
        torch.testing.assert_close(graphed(ids_BL).final_BLD, student.states(ids_BL), rtol=1e-3, atol=1e-3)
    assert graphed.recorded == 0 and len(told) == 1 and "GiB of the GPU are free" in told[0]


class Spoiling(FakeTeacher):
    """Wrong about one sequence alone."""

    bad: bytes = b""

    async def score(self, call):
        self.mistake = "state" if self.bad and self.bad in call.batch.token_ids_T.tobytes() else ""
        return await super().score(call)


@pytest.fixture
def teacher(folder):
    fake = fake_for(folder, hidden_size=32)
    names = ("vocab_rows", "hidden_size", "tokenizer_sha256", "chat_template_sha256")
    return Spoiling(**{name: getattr(fake, name) for name in names})


def config_for(tmp_path, folder, rows_file, address, graphs="auto", **sections):
    tree = run_config(
        tmp_path, folder, rows_file, address,
        model={"dtype": "bfloat16", "lora": {"rank": 4}, "gradient_checkpointing": True, "graphs": graphs},
        cache={"labels": False}, **sections,
    )  # fmt: skip
    tree["data"]["eval"] = []
    tree["train"] |= {"bf16": True, "accumulation": 1, "log_steps": 50, "save_steps": 0, "schedule": "constant"}
    return parse_config(tree, "test")


@pytest.mark.parametrize("graphs", [False, "auto"])
@pytest.mark.parametrize("transport", ["hidden", "top_k"])
def test_no_step_waits_for_the_device(tmp_path, folder, rows_file, teacher, transport, graphs, monkeypatch):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):  # the test can fail
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain = trainer_module.DistillationTrainer.get_batch_samples
    recorded = []

    def watched(self, *args):
        recorded.append(getattr(self._learner.passes, "recorded", 0))
        torch.cuda.set_sync_debug_mode("error" if 30 <= self.state.global_step < 38 else "default")
        return plain(self, *args)

    monkeypatch.setattr(trainer_module.DistillationTrainer, "get_batch_samples", watched)
    with serve(teacher) as server:
        config = config_for(
            tmp_path,
            folder,
            rows_file,
            server.address,
            graphs=graphs,
            labels={"transport": transport} | ({"k": 20} if transport == "top_k" else {}),
            train={"max_steps": 40},
        )
        try:
            train(config, console=QUIET)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert recorded[30:] == [2 if graphs == "auto" else 0] * 10


def test_bad_labels_teach_nothing_though_they_are_known_late(tmp_path, folder, rows_file, teacher, monkeypatch):
    taken = {}
    plain = trainer_module.DistillationTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        step = self.state.global_step
        taken[step] = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        if step == 4:
            taken["names"] = inputs["batch"].request.names
            taken["tokens"] = inputs["batch"].request.batch.token_ids_T.tobytes()
        taken["trainer"] = self
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_module.DistillationTrainer, "compute_loss", watched)
    with serve(teacher) as server:
        good = config_for(tmp_path / "good", folder, rows_file, server.address, train={"max_steps": 12})
        train(good, console=QUIET)
        before, names = taken[4], taken["names"]
        teacher.bad = taken["tokens"]
        with pytest.raises(TeacherHeadMismatch) as refused:
            train(
                config_for(tmp_path / "bad", folder, rows_file, server.address, train={"max_steps": 12}), console=QUIET
            )
    assert any(name in note for name in names for note in refused.value.__notes__)
    trained = {n: p for n, p in taken["trainer"].model.named_parameters() if p.requires_grad}
    for name, weight in before.items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=0)
    assert taken["trainer"].state.global_step <= 4 + 4


def test_copies_ahead_are_whole(folder):
    """Under load on the working stream, many times: a copy that is read before it has come would show."""
    busy = torch.randn(2048, 2048, device="cuda")
    for number in range(50):
        host = torch.full((1 << 20,), number, dtype=torch.int64)
        busy = (busy @ busy).clamp_(-1, 1)
        moved = ahead({"x": host}, torch.device("cuda"))["x"]
        assert torch.equal(moved.cpu(), host)
