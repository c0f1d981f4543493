"""SmolLM2-135M-Instruct behind Ray Serve and gRPC: its labels are the model's own, and a student learns from it through the two commands."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.labels.device_transfer import to_torch
from student_trainer.labels.rows_on_device import head_on
from student_trainer.teachers.artifact_cache import fetch_head
from teacher_wire.core.batch import TokenBatch
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from tests.e2e.conftest import run_cli, server_config, serving, transformers_teacher

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
V = 49_152
TEXTS = (
    "What is the capital of Norway?",
    "def add(a, b):\n    return a + b\n",
    "Ein Stein, 一块石头, \N{ROCK} and a line\r\nbreak.",
)


@pytest.fixture(scope="module")
def served(real, tmp_path_factory):
    """`teacher-server up` with the real model in float32."""
    config = server_config(transformers_teacher("smollm2", real / "smollm2", deterministic=True))
    with serving(tmp_path_factory.mktemp("server"), config) as server:
        yield server


async def test_labels_are_the_models_own(real, served, tmp_path):
    """All transports of real texts beside the model called directly, in float32; log-probabilities within 2e-4 nats."""
    tokenizer = AutoTokenizer.from_pretrained(real / "smollm2")
    rows = [tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False) for text in TEXTS]
    model = AutoModelForCausalLM.from_pretrained(real / "smollm2", dtype=torch.float32).eval()
    with torch.no_grad():
        logits_NV = torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in rows]).double()
    expected_NV = torch.log_softmax(logits_NV, -1)
    batch = TokenBatch.pack(rows)
    specs = (
        spec_of("hidden", V),
        spec_of("top_k", V, k=64),
        spec_of("full", V),
        spec_of("hidden", V, reduction="int8"),
    )
    async with TeacherClient(served.address) as client:
        info = await client.teacher("smollm2")
        head = head_on(await fetch_head(client, info, tmp_path), V, torch.device("cpu"))
        hidden, top, full, small = await asyncio.gather(*(client.score(info, spec, batch) for spec in specs))
    seen_NV = torch.log_softmax(head.logits(to_torch(hidden["hidden_ND"])).double(), -1)
    np.testing.assert_allclose(seen_NV, expected_NV, atol=2e-4)
    np.testing.assert_allclose(torch.log_softmax(to_torch(full["logits_NV"]).double(), -1), expected_NV, atol=2e-4)
    ids_NK = torch.from_numpy(top["topk_ids_NK"].array.astype(np.int64))
    logp_NK = to_torch(top["topk_logits_NK"]).double() - to_torch(top.lse_N).double()[:, None]
    np.testing.assert_allclose(logp_NK, expected_NV.gather(1, ids_NK), atol=2e-4)
    assert (ids_NK[:, 0] == expected_NV.argmax(-1)).all()
    tail_N = 1 - expected_NV.gather(1, ids_NK).exp().sum(-1)
    np.testing.assert_allclose(to_torch(top["tail_logp_N"]).double().exp(), tail_N, atol=2e-5)
    labels_N = torch.from_numpy(batch.labels_N()).long()
    own_N = expected_NV.gather(1, labels_N[:, None])[:, 0]
    for answer in (hidden, top, full):
        np.testing.assert_allclose(to_torch(answer.label_logp_N).double(), own_N, atol=2e-4)
    # What travels compressed is described as it travels: 0.024 nats off at most here.
    np.testing.assert_allclose(to_torch(small.label_logp_N).double(), own_N, atol=0.1)


def run_of(folder, real, address):
    """A short run of the 15-layer student on real rows, every weight trained."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    pairs = [
        ("What is the capital of France?", "Paris."),
        ("Name a colour.", "Blue."),
        ("2 + 2?", "4."),
        ("Say hello.", "Hello there!"),
    ]
    rows.write_text(
        "".join(json.dumps({"instruction": f"{q} ({i})", "output": a}) + "\n" for i in range(4) for q, a in pairs)
    )
    tree = {
        "run": {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"path": str(real / "smollm2-15"), "dtype": "float32", "lora": {"rank": 4}},
        "data": {"train": [str(rows)], "eval": [f"{rows}#2"], "max_tokens": 128},
        "teacher": {"address": address},
        "loss": {"output": {"divergence": "forward_kl"}, "sft_weight": 0.5},
        "train": {"batch_size": 1, "accumulation": 1, "max_steps": 8, "log_steps": 1, "save_steps": 2, "learning_rate": 1e-3},
    }  # fmt: skip
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def digest(folder):
    return hashlib.sha256((folder / "run" / "final" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_killed_student_ends_with_the_same_bits(real, served, tmp_path):
    """Through `student-trainer train` in a process of its own, SIGKILL in the middle, `--resume`, against the uninterrupted run."""
    straight = run_of(tmp_path / "straight", real, served.address)
    done = run_cli("train", straight, timeout=600)
    assert done.returncode == 0, done.stderr
    broken = run_of(tmp_path / "broken", real, served.address)
    log = tmp_path / "broken" / "run" / "train_log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "student_trainer.cli", "train", str(broken)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "run" / "final").exists(), "it was killed before its end"
    resumed = run_cli("train", broken, "--resume", "auto", timeout=600)
    assert resumed.returncode == 0, resumed.stderr
    assert digest(tmp_path / "broken") == digest(tmp_path / "straight")
