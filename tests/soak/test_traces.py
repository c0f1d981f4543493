"""Must show 3 and 4 of the trace pipeline: a trained teacher writes traces that verify, and they teach more than answers do.

Real: a trained model behind engine, gRPC and grammar; `student-trainer traces`; whole training runs. Both arms of a seed
start from the same weights, see the same problems, and make the same number of steps.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from student_trainer.config.files import parse_as
from student_trainer.config.run import parse_config
from student_trainer.config.traces import TracesConfig
from student_trainer.data.trace_schema import parse
from student_trainer.traces.run import make_traces
from student_trainer.traces.verify import verify
from student_trainer.training.run import train
from teacher_server.config.server import TeacherConfig
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.testing.loopback import serve
from tests.e2e.classroom import EngineService, paired, table
from tests.soak import steps

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not os.environ.get("LYCEUM_SOAK"), reason="takes minutes: run make soak"),
]
PROBLEMS, SAMPLES, EVALUATED, STEPS = 1000, 4, 256, 600
LONGER = 4  # a step on traces takes as long as four on answers
SEEDS = range(10, 15)
SHAPE = steps.LlamaShape(steps.VOCAB, 64, 2, 2, 1, 160, max_positions=256, tied=False, init_std=0.06)
ARMS = {"answers alone": ["answer"], "traces": ["reason", "answer"]}
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def made(folder):
    """Traces of all problems, drawn from the teacher over the wire; nobody tells it or us the answers."""
    torch.set_num_threads(1)
    pairs = steps.problems(PROBLEMS, steps.TRAIN_STREAM)
    rows = folder / "questions.jsonl"
    rows.write_text("".join(json.dumps({"prompt": steps.question(a, b)}) + "\n" for a, b in pairs))
    backend = {"kind": "transformers", "model": str(steps.teacher()), "dtype": "float32", "device": "cpu"}
    engine = TeacherEngine(TeacherConfig.model_validate({"name": "adder", "backend": backend}))
    service = EngineService(engine)
    with serve(service) as server:
        tree = {
            "output_dir": str(folder / "out"), "tokenizer": backend["model"], "teacher": {"address": server.address},
            "data": {"sources": [str(rows)], "instruction": ""}, "prompts_per_call": 32, "calls": 3,
            "sampling": {"samples": SAMPLES, "temperature": 0.7, "max_new_tokens": 120, "fit_budget": False},
            "style": "offsets", "caps": {"steps": 6, "evidence": 4, "step_bytes": 32, "evidence_bytes": 8, "answer_bytes": 8},
        }  # fmt: skip
        result = make_traces(parse_as(TracesConfig, tree, "test"), console=QUIET)
        service.stop()
    return result, pairs


def test_a_trained_teacher_writes_traces_that_verify(made, capsys):
    result, pairs = made
    with capsys.disabled():
        print(f"\n{result.stats.describe()}")
    assert result.stats.rate >= 0.9
    rows = [json.loads(line) for line in (result.output_dir / "traces.jsonl").read_text().splitlines()]
    assert len(rows) >= 0.95 * PROBLEMS
    answers = {steps.question(a, b): str(a + b) for a, b in pairs}
    right = 0
    for row in rows:
        trace, prompt = parse(json.dumps(row["trace"])), row["conversation"][-1]["content"]
        right += trace.answer.normalized == answers[prompt]
        assert all(prompt.encode()[q.start : q.end].decode() == q.text for q in trace.evidence)
    assert right >= 0.99 * len(rows), "what was accepted is right, though nobody knew the answers"


PLANTED = {
    "wrong_answer": lambda t: t | {"answer": {"text": "7"}},
    "invented_evidence": lambda t: t | {"evidence": [q | {"text": "xyz"} for q in t["evidence"]]},
    "cyclic_dependency": lambda t: t | {"steps": [t["steps"][0] | {"depends_on": [3]}, *t["steps"][1:]]},
    "wrong_arithmetic": lambda t: t | {"steps": [t["steps"][0] | {"text": "1+1=3"}, *t["steps"][1:]]},
    "too_long": lambda t: t | {"steps": [t["steps"][0] | {"text": "a" * 2000}, *t["steps"][1:]]},
    "nul": lambda t: t | {"steps": [t["steps"][0] | {"text": "\0"}, *t["steps"][1:]]},
    "wrong_prompt": lambda t: t | {"prompt_sha256": "0" * 64},
    "schema": lambda t: {"steps": t["steps"], "answer": t["answer"]},
    "broken_json": lambda t: t,
}


@pytest.mark.parametrize("reason", PLANTED)
def test_faults_planted_in_its_traces_are_rejected(made, reason):
    _, pairs = made
    for a, b in pairs[:50]:
        text = json.dumps(PLANTED[reason](steps.trace(a, b)))
        text = text[:-1] if reason == "broken_json" else text
        assert verify(steps.written(a, b), steps.question(a, b), gold=str(a + b)).accepted
        assert verify(text, steps.question(a, b), gold=str(a + b)).reason == reason


def student(folder: Path, arm: str, seed: int, rows: Path, steps_made: int = STEPS) -> LlamaForCausalLM:
    """A student after its steps."""
    start = folder / f"start-{seed}"
    if not start.exists():
        SHAPE.build(1000 + seed).save_pretrained(start)
        steps.tokenizer().save_pretrained(start)
    tree = {
        "run": {"output_dir": str(folder / f"{arm}-{seed}-{steps_made}".replace(" ", "-")), "seed": seed, "cache_dir": str(folder)},
        "model": {"path": str(start), "dtype": "float32", "lora": None},
        "data": {"train": [str(rows)], "traces": {"tasks": ARMS[arm]}, "max_tokens": 200},
        "loss": {"output": None, "sft_weight": 1.0},
        "train": {
            "batch_size": 64, "accumulation": 1, "max_steps": steps_made, "learning_rate": 3e-3, "betas": [0.9, 0.98],
            "weight_decay": 0.01, "warmup_steps": 30, "min_lr_share": 0.05, "log_steps": 50,
        },
    }  # fmt: skip
    result = train(parse_config(tree, "test"), console=QUIET)
    return LlamaForCausalLM.from_pretrained(result.output_dir / "final").eval()


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, prefix: str) -> float:
    """Share of fresh problems whose greedy answer is right, in the mode that `prefix` chooses."""
    pairs = steps.problems(EVALUATED, steps.EVALUATION_STREAM)
    ids_BL = torch.tensor(steps.encode([f"{prefix}{steps.question(a, b)}\n" for a, b in pairs]))
    end = steps.tokenizer().eos_token_id
    written = model.generate(
        ids_BL, attention_mask=torch.ones_like(ids_BL), max_new_tokens=100, do_sample=False,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    texts = steps.tokenizer().batch_decode(written[:, ids_BL.shape[1] :], skip_special_tokens=True)
    found = [text.rpartition("</think>\n")[2] == str(a + b) for text, (a, b) in zip(texts, pairs, strict=True)]
    return sum(found) / len(found)


def test_traces_teach_more_than_answers(made, folder, capsys):
    rows = made[0].output_dir / "traces.jsonl"
    longer = f"answers alone, {LONGER}x the steps"
    found: dict[str, list[float]] = {"answers alone": [], longer: [], "traces": [], "traces, answering at once": []}
    for seed in SEEDS:
        found[longer].append(exact_match(student(folder, "answers alone", seed, rows, LONGER * STEPS), "[answer] "))
        found["answers alone"].append(exact_match(student(folder, "answers alone", seed, rows), "[answer] "))
        taught = student(folder, "traces", seed, rows)
        found["traces"].append(exact_match(taught, "[reason] "))
        found["traces, answering at once"].append(exact_match(taught, "[answer] "))
    mean, low, high = paired(found["traces"], found["answers alone"])
    with capsys.disabled():
        print(f"\naddition with written steps, share of exact answers after {STEPS} steps of 64\n{table(found)}")
        print(f"traces - answers alone, paired: {mean:.3f} [{low:.3f}, {high:.3f}]")
    assert mean >= 0.3
    assert low > 0
    assert all(a > b for a, b in zip(found["traces"], found["answers alone"], strict=True))
