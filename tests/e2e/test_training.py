"""Must show 7 and 8: two processes, kills, bad input; as a user meets them."""

import hashlib
import json
import random
import signal
import subprocess
import time

import pytest
import yaml

from student_trainer.training.metrics import TIMED
from tests.e2e.conftest import call_cli, run_cli, server_config, transformers_teacher
from tests.student_trainer.conftest import run_config
from tests.students import run_student, start_student
from tests.thorough import thorough

pytestmark = pytest.mark.ray


def write_config(folder, model, rows, address, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    tree = run_config(folder, model, rows, address, **sections)
    tree["teacher"] = {"address": address, "name": "exact", **(sections.get("teacher") or {})}
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(folder):
    entries = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in TIMED and not k.startswith("train_")} for e in entries]


def adapter_hash(folder):
    return hashlib.sha256((folder / "final" / "adapter_model.safetensors").read_bytes()).hexdigest()


STEPS = {"max_steps": 24, "batch_size": 2, "accumulation": 2, "save_steps": 3, "log_steps": 1, "learning_rate": 1e-2}


@pytest.mark.parametrize(("transport", "kept"), [("hidden", False), thorough("top_k", True)])
def test_killed_at_a_random_step_and_resumed(teachers, model_factory, rows_file, tmp_path, transport, kept):
    """With labels on disk (test_shared_training kills such a run too), and without: then it is the teacher that must answer the same again."""
    model = model_factory("qwen2")
    labels = {"transport": transport} | ({"k": 16} if transport == "top_k" else {})
    sections = {"train": STEPS, "labels": labels, "cache": {"labels": kept}}
    straight = write_config(tmp_path / "straight", model, rows_file, teachers.address, **sections)
    done = run_student("train", straight)
    assert done.returncode == 0, done.stderr
    broken = write_config(tmp_path / "broken", model, rows_file, teachers.address, **sections)
    victim_step = random.randint(2, 16)
    log = tmp_path / "broken" / "run" / "train_log.jsonl"
    process = start_student("train", broken)
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= victim_step):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "run" / "final").exists(), "it was killed before its end"
    resumed = run_cli("train", broken, "--resume", "auto")  # by an interpreter of its own, with a hash seed of its own
    assert resumed.returncode == 0, resumed.stderr
    assert adapter_hash(tmp_path / "broken" / "run") == adapter_hash(tmp_path / "straight" / "run"), (
        f"killed at {victim_step}"
    )
    assert losses(tmp_path / "broken" / "run") == losses(tmp_path / "straight" / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, thorough(signal.SIGTERM)])
def test_an_interrupted_run_ends_with_a_checkpoint_and_goes_on_to_the_same_bits(
    teachers, model_factory, rows_file, tmp_path, number
):
    """A run without `save_steps` would else lose everything; both ends write the same weights."""
    steps = {**STEPS, "max_steps": 30, "save_steps": 0, "log_steps": 3, "eval_steps": 6}
    straight, broken = (
        write_config(tmp_path / name, model_factory("qwen2"), rows_file, teachers.address, train=steps)
        for name in ("straight", "broken")
    )
    assert run_student("train", straight).returncode == 0
    process = start_student("train", broken, "train.keep_checkpoints=3", stderr=subprocess.PIPE)
    log = tmp_path / "broken" / "run" / "train_log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 4):
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    said = " ".join(stderr.split())
    (kept,) = (path for path in (tmp_path / "broken" / "run").glob("checkpoint-*"))
    assert f"{kept.name} is kept" in said and "train.keep_checkpoints=3 --resume" in said and "Traceback" not in said
    resumed = run_student("train", broken, "train.keep_checkpoints=3", "--resume")
    assert resumed.returncode == 0 and f"resuming at step {kept.name.removeprefix('checkpoint-')}" in resumed.stderr
    assert adapter_hash(tmp_path / "broken" / "run") == adapter_hash(tmp_path / "straight" / "run")
    measured = [
        [(entry["step"], entry["eval_nll_per_token"]) for entry in map(json.loads, lines) if "eval_nll_per_token" in entry]
        for lines in ((tmp_path / name / "run" / "train_log.jsonl").read_text().splitlines() for name in ("straight", "broken"))
    ]  # fmt: skip
    assert measured[0] == measured[1]


def spoil_rows(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    return str(path)


GOOD_ROW = json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (lambda t: {"overrides": ["train.learning_rat=1"]}, ["train.learning_rat", "unknown key"]),
        (lambda t: {"overrides": ["train.batch_size=zero"]}, ["train.batch_size", "zero"]),
        (lambda t: {"overrides": ["model.path=/no/such/model"]}, ["model.path", "/no/such/model"]),
        (lambda t: {"overrides": ["teacher.address=127.0.0.1:1", "teacher.wait_s=0"]}, ["127.0.0.1:1"]),
        (lambda t: {"overrides": ["teacher.address=nowhere"]}, ["nowhere", "HOST:PORT"]),
        (lambda t: {"overrides": ["teacher.name=nobody"]}, ["nobody", "exact"]),
        (lambda t: {"overrides": ["labels.transport=top_k", "labels.k=301"]}, ["labels.k=301", "300"]),
        (lambda t: {"overrides": [f"data.train=[{spoil_rows(t, '')}]"]}, ["bad.jsonl", "empty|no row"]),
        (
            lambda t: {"overrides": [f"data.train=[{spoil_rows(t, GOOD_ROW + json.dumps({'instruction': 'a'}))}]"]},
            ["bad.jsonl:2", "output"],
        ),
        (lambda t: {"overrides": [f"data.train=[{spoil_rows(t, '{')}]"]}, ["bad.jsonl:1", "JSON"]),
        (lambda t: {"overrides": ["data.train=[/no/rows.jsonl]"]}, ["/no/rows.jsonl"]),
        (lambda t: {"overrides": ["data.max_tokens=9"]}, ["rows.jsonl:1", "max_tokens"]),
        (lambda t: {"overrides": ["train=5"]}, ["train"]),
        (lambda t: {"overrides": ["nonsense"]}, ["nonsense", "section.field=value"]),
        (
            lambda t: {"overrides": ["loss.output.temperature=2", "labels.transport=top_k"]},
            ["temperature", "tempered_head"],
        ),
    ],
)
def test_bad_input_is_one_clear_line(teachers, model_factory, rows_file, tmp_path, capsys, monkeypatch, changes, named):
    import re

    config = write_config(tmp_path, model_factory("qwen2"), rows_file, teachers.address, train=STEPS)
    code, stderr = call_cli(capsys, monkeypatch, "train", config, *changes(tmp_path)["overrides"])
    assert code == (75 if "127.0.0.1:1" in named else 2), stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("student-trainer: ") and "Traceback" not in stderr
    for pattern in named:
        assert re.search(pattern, last), last
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_a_sequence_above_the_teachers_limit(teachers, model_factory, tmp_path):
    rows = tmp_path / "long.jsonl"
    rows.write_text(GOOD_ROW + json.dumps({"instruction": "a", "output": "z" * 200}) + "\n")
    config = write_config(
        tmp_path,
        model_factory("qwen2"),
        rows,
        teachers.address,
        data={"train": [str(rows)], "eval": [], "max_tokens": 1000},
    )
    result = run_student("train", config)
    assert result.returncode == 2
    assert "long.jsonl:2" in result.stderr and "128" in result.stderr


def test_a_teacher_with_another_tokenizer(teachers, model_factory, rows_file, tmp_path):
    import shutil

    from tests.tiny import make_tokenizer

    model = shutil.copytree(model_factory("qwen2"), tmp_path / "other")
    make_tokenizer(model, seed_text="quite other words for other merges")
    config = write_config(
        tmp_path,
        model,
        rows_file,
        teachers.address,
        teacher={"address": teachers.address, "cross_tokenizer": {"min_coverage": 0}},
    )
    result = run_student("train", config)
    assert result.returncode == 0, result.stderr
    assert "has another tokenizer than the student" in result.stderr and "one to one" in result.stderr
    assert "kl_to_teacher" in result.stderr


def embedded_config(model_factory, rows_file, tmp_path):
    server = tmp_path / "server.yaml"
    server.write_text(yaml.safe_dump(server_config(transformers_teacher("exact", model_factory("qwen2", seed=5)))))
    teacher = {"embedded": str(server), "address": None}
    return write_config(tmp_path, model_factory("qwen2"), rows_file, None, teacher=teacher)


@pytest.mark.thorough  # tests/deploy/test_examples.py runs the example of one
def test_one_command_with_an_embedded_teacher(model_factory, rows_file, tmp_path):
    result = run_cli("train", embedded_config(model_factory, rows_file, tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


def test_an_embedded_teacher_without_a_config_is_one_clear_line(
    model_factory, rows_file, tmp_path, capsys, monkeypatch
):
    config = embedded_config(model_factory, rows_file, tmp_path)
    code, stderr = call_cli(capsys, monkeypatch, "train", config, "teacher.embedded=/no/such.yaml")
    assert code == 2 and "/no/such.yaml" in stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
