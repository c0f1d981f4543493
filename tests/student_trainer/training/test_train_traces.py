"""Runs on traces: weights reach both terms and Z, one request brings soft labels for the same tokens, resumption is exact."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from student_trainer.config.run import parse_config
from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows.sources import DataSource
from student_trainer.data.trace_schema import Answer, Evidence, Step, Trace, prompt_sha256, to_fields
from student_trainer.model.load import load_student
from student_trainer.training.run import train
from teacher_wire.core.batch import TokenBatch
from tests.student_trainer.conftest import run_config

QUIET = Console(file=io.StringIO())


@pytest.fixture
def trace_rows(tmp_path):
    """Six rows; the last has no trace."""
    rows = []
    for number in range(6):
        prompt = f"the cat saw {number} dogs"
        steps = (Step(1, "extract", "the dog", (0,), (), 0.5), Step(2, "compute", f"{number}+1", (), (1,), 0.9))
        trace = Trace(
            steps, (Evidence(0, 0, 7, "the cat"),), Answer("a mat", "a mat", 0.25 + number / 10), prompt_sha256(prompt)
        )
        rows.append({
            "conversation": [{"role": "user", "content": prompt}], "trace": to_fields(trace) if number < 5 else None,
            "answer": "a mat", "source": f"x:{number}",
        })  # fmt: skip
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder, model, rows, address, **sections):
    sections = {
        "model": {"lora": None}, "data": {"train": [str(rows)], "eval": [], "max_tokens": 128},
        "train": {"batch_size": 3, "accumulation": 2, "max_steps": 2, "log_steps": 1, "save_steps": 1}, **sections,
    }  # fmt: skip
    return parse_config(run_config(folder, model, rows, address, **sections), "test")


def expected_first_losses(settings, fake):
    """(kd, ce) of the first step in float64: sums of w D over the sum of w, over all micro-batches of the window."""
    from student_trainer.data.batch_plan import RunOrder

    student = load_student(settings.model, settings.run.seed)
    data = build_dataset([DataSource(str(settings.data.train[0].path))], student.tokenizer, max_tokens=128)
    order = RunOrder(len(data), batch_size=3, accumulation=2, epochs=1, max_steps=2, seed=settings.run.seed)
    model = AutoModelForCausalLM.from_pretrained(settings.model.path).double().eval()
    rows = min(300, len(student.tokenizer))
    sums = np.zeros(3)
    for index in [*order.batch(0), *order.batch(1)]:
        example = data[index].example
        ids = torch.from_numpy(example.token_ids).long()
        wanted = np.flatnonzero(example.loss_mask) - 1
        with torch.no_grad():
            log_q = model(ids[None]).logits[0, wanted, :rows].log_softmax(-1)
        states = fake.states(TokenBatch.pack([example.token_ids.tolist()]))[wanted]
        log_p = torch.from_numpy(states @ fake.weight_VD[:rows].T).double().log_softmax(-1)
        weights = torch.from_numpy(example.target_weights).double()
        ce = -log_q.gather(-1, ids[wanted + 1][:, None])[:, 0]
        kd = (log_p.exp() * (log_p - log_q)).sum(-1)
        sums += [float(weights @ kd), float(weights @ ce), float(weights.sum())]
    return sums[:2] / sums[2]


def test_weights_reach_both_terms_and_the_normaliser(tmp_path, model_factory, trace_rows, server, fake):
    settings = config(tmp_path, model_factory("qwen2"), trace_rows, server.address, loss={"sft_weight": 0.5})
    first = train(settings, console=QUIET).curve[0]
    kd, ce = expected_first_losses(settings, fake)
    assert first["kd_loss"] == pytest.approx(kd, rel=1e-4)
    assert first["sft_loss"] == pytest.approx(ce, rel=1e-4)
    assert first["loss"] == pytest.approx(kd + 0.5 * ce, rel=1e-4)
    assert fake.calls >= 2, "one request a micro-batch, and its soft labels are of the trace's own tokens"


def test_a_run_on_traces_needs_no_teacher_and_resumes_bit_for_bit(tmp_path, model_factory, trace_rows):
    folder = model_factory("qwen2")
    sections = {"loss": {"output": None, "sft_weight": 1.0}, "train": {"max_steps": 4, "batch_size": 2, "accumulation": 2,
                "log_steps": 1, "save_steps": 2, "learning_rate": 1e-2}}  # fmt: skip
    runs = []
    for name in ("straight", "broken"):
        run = {"run": {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}}
        settings = config(tmp_path, folder, trace_rows, None, **sections, **run)
        runs.append((settings, train(settings, console=QUIET)))
    broken = tmp_path / "broken"
    for gone in ("checkpoint-4", "final"):
        shutil.rmtree(broken / gone)
    (broken / "result.json").unlink()
    train(runs[1][0], resume=True, console=QUIET)
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("straight", "broken")]
    assert weights[0] == weights[1]
    answers = config(tmp_path, folder, trace_rows, None, **sections, data={"train": [str(trace_rows)], "eval": [], "traces": {"tasks": ["answer"]}},
                     run={"output_dir": str(tmp_path / "answers"), "cache_dir": str(tmp_path / "cache")})  # fmt: skip
    assert train(answers, console=QUIET).curve[0]["sft_loss"] != runs[0][1].curve[0]["sft_loss"]
