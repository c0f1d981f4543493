"""Terms on layers on a real GPU: compiled layers and recorded passes give the plain gradients, and no step waits for the device."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from student_trainer.config.model import ModelConfig
from student_trainer.config.run import parse_config
from student_trainer.losses.features import attention
from student_trainer.losses.term import FfnTap
from student_trainer.model.attention_reader import AttentionReader
from student_trainer.model.load import load_student
from student_trainer.model.speed import compiled
from student_trainer.model.speed.cuda_graphs import GraphedBody
from student_trainer.model.speed.cuda_recorder import CudaRecorder
from student_trainer.training import trainer as trainer_module
from student_trainer.training.run import train
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.losses.worlds import grid_of
from tests.tiny import WORDS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
QUIET = Console(file=io.StringIO())
TAPS = (0, 1, FfnTap(1), FfnTap(2, quantiles=True))
LOSS = {
    "hidden": {"weight": 1.0, "layers": [1, 3], "rank": 6},
    "attention": {"weight": 0.3, "layers": [2]},
    "ffn": {"weight": 0.2, "layers": [3]},
}


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_recorded_passes_with_taps_inside_of_blocks_give_the_plain_gradients(model_factory, lora):
    folder = model_factory("qwen2", hidden=64)
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
    rows = torch.tensor([20, 40, 47], device="cuda")
    ways = [(graphed, AttentionReader(student.body, student.computing)), (plain.forward, AttentionReader(plain.body, plain.computing))]  # fmt: skip
    for _ in range(4):
        ids_BL = torch.randint(0, 300, (2, 48), device="cuda")
        for run, reader in ways:
            outputs = run(ids_BL, TAPS)
            loss = sum((value.float() * torch.linspace(-1, 1, value.numel(), device="cuda").view_as(value)).sum() for value in outputs.tensors())  # fmt: skip
            logp_RP = attention.pooled_logp(reader(2, outputs.taps[1]), grid_of(rows, 1), 16)
            (loss + (logp_RP.exp() * torch.linspace(-1, 1, 9, device="cuda").view(3, 3)).sum()).backward()
    assert graphed.recorded == 1 and not told
    expected = {n: p.grad for n, p in plain.model.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in student.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("objective", ["pooled", "capped", "relation"])
def test_attention_terms_in_half_precision_have_the_gradients_of_float64(objective):
    """Over several chunks of rows of sequences of different lengths; 2 percent of the norm is what bfloat16 rounds."""
    generator = torch.Generator().manual_seed(0)
    position = np.concatenate([np.arange(1, 300), np.arange(3, 700, 2)])
    sequence = np.repeat([0, 1], [299, 349])
    shapes = [(2, 700, heads, 64) for heads in (12, 2)]
    query, key = (torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)
    weight = torch.rand(len(position), generator=generator)
    theirs = torch.randn(2, 700, 512, generator=generator)
    more = {"softcap": 20.0, "window": 300} if objective == "capped" else {}

    def gradients(device, dtype):
        ours = [x.to(device, dtype, copy=True).requires_grad_() for x in (query, key)]
        grid = attention.RowGrid.of(position, sequence, torch.device(device))
        if objective == "relation":
            found = attention.relation_kl(
                ours[1][:, : grid.tokens].flatten(-2), theirs[:, : grid.tokens].to(device), grid, 8
            )
        else:
            logp_NP = attention.pooled_logp(attention.AttentionStates(*ours, *ours, 0.125, **more), grid, 64)
            found = torch.where(logp_NP > -1e29, logp_NP, 0).mean(-1)
        (found * weight.to(device, found.dtype)).sum().backward()
        return [x.grad.double().cpu() for x in ours if x.grad is not None]

    for found, expected in zip(gradients("cuda", torch.bfloat16), gradients("cpu", torch.float64), strict=True):
        assert (found - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("graphs", [False, "auto"])
def test_no_step_waits_for_the_device(tmp_path, model_factory, graphs, monkeypatch):
    folder = model_factory("qwen2", hidden=64, num_hidden_layers=4)
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(24):
            answer = " ".join(WORDS[(i * 5 + k * k) % len(WORDS)] for k in range(48 + i % 4))
            file.write(json.dumps({"prompt": " ".join(WORDS[i % 9 : i % 9 + 3]), "completion": " " + answer}) + "\n")
    original = trainer_module.DistillationTrainer.get_batch_samples

    def watched(self, *args):
        torch.cuda.set_sync_debug_mode("error" if 30 <= self.state.global_step < 38 else "default")
        return original(self, *args)

    monkeypatch.setattr(trainer_module.DistillationTrainer, "get_batch_samples", watched)
    with serve(fake_for(folder, layers=6, basis_rank=8)) as server:
        tree = run_config(
            tmp_path, folder, path, server.address, loss=LOSS, cache={"labels": False},
            model={"dtype": "bfloat16", "lora": {"rank": 4}, "gradient_checkpointing": True, "graphs": graphs},
        )  # fmt: skip
        tree["data"] |= {"eval": [], "max_tokens": 128}
        tree["train"] |= {"bf16": True, "accumulation": 1, "log_steps": 50, "save_steps": 0, "max_steps": 40}
        try:
            train(parse_config(tree, "test"), console=QUIET)
        finally:
            torch.cuda.set_sync_debug_mode("default")
