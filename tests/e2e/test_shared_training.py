"""Must show 1 of issue 4: four trainers and their latecomers cost the teacher each sequence once; labels on disk make a run repeat."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from teacher_wire.labels.store import LabelStore
from tests.e2e.conftest import run_cli, server_config, serving, transformers_teacher
from tests.e2e.test_training import adapter_hash, losses
from tests.student_trainer.conftest import run_config
from tests.students import StudentProcess, run_student, start_student

pytestmark = pytest.mark.ray
STEPS = {"max_steps": 12, "batch_size": 2, "accumulation": 2, "save_steps": 2, "log_steps": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, model_factory):
    """One server that keeps its labels on disk; its teacher batches across callers, so two passes give two sets of bits."""
    folder = tmp_path_factory.mktemp("shared")
    config = server_config(transformers_teacher("shared", model_factory("qwen2", seed=5, hidden=48)))
    config["edge"]["store"] = {"memory_mb": 1, "folder": str(folder / "store")}
    with serving(folder, config) as server:
        yield server


def write(folder: Path, model: Path, rows: Path, address: str, seed: int, **sections) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tree = run_config(folder, model, rows, address, train=STEPS, **sections)
    tree["run"]["seed"] = seed
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path) -> StudentProcess:
    return start_student("train", config, stderr=subprocess.PIPE)


def forward_tokens(server) -> int:
    """The teacher's own count, once two reports in a row agree: replicas report every second."""
    counts = [-1]
    while len(counts) < 30:
        time.sleep(2.5)
        done = run_cli("status", "--address", server.address, "--json", house="teacher_server")
        assert done.returncode == 0, done.stderr
        (teacher,) = json.loads(done.stdout)["teachers"]
        counts.append(teacher["forward_tokens"])
        if counts[-1] == counts[-2]:
            return counts[-1]
    raise AssertionError(f"the count does not come to rest: {counts}")


def labels(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (cache / "labels").rglob("*.safetensors")}


def test_computed_once_for_four_trainers_and_whoever_comes_later(shared, model_factory, rows_file, tmp_path):
    model = model_factory("qwen2")
    configs = [write(tmp_path / str(n), model, rows_file, shared.address, seed=n) for n in range(4)]
    runs = [train(config) for config in configs]
    for run in runs:
        _, stderr = run.communicate(timeout=200)
        assert run.returncode == 0, stderr
    caches = [labels(tmp_path / str(n) / "cache") for n in range(4)]
    everything = {name: blob for cache in caches for name, blob in cache.items()}
    assert sum(map(len, caches)) > 3 * len(everything), "the four are to want the same"
    for cache in caches:
        assert all(everything[name] == blob for name, blob in cache.items())
    unique = unique_tokens(tmp_path, everything)
    assert forward_tokens(shared) == unique

    same_machine = write(tmp_path / "fifth", model, rows_file, shared.address, seed=2)
    elsewhere = write(tmp_path / "elsewhere", model, rows_file, shared.address, seed=3)
    tree = yaml.safe_load(same_machine.read_text())
    tree["run"]["cache_dir"] = str(tmp_path / "2" / "cache")
    same_machine.write_text(yaml.safe_dump(tree))
    for config in (same_machine, elsewhere):
        done = run_student("train", config)
        assert done.returncode == 0, done.stderr
    assert forward_tokens(shared) == unique
    assert labels(tmp_path / "elsewhere" / "cache") == caches[3]
    assert adapter_hash(tmp_path / "fifth" / "run") == adapter_hash(tmp_path / "2" / "run")
    assert adapter_hash(tmp_path / "elsewhere" / "run") == adapter_hash(tmp_path / "3" / "run")


def unique_tokens(tmp_path: Path, blobs: dict[str, bytes]) -> int:
    """Tokens of the distinct sequences, as the product's own inventory counts them."""
    folder = tmp_path / "everything"
    for name, blob in blobs.items():
        (folder / name[:2]).mkdir(parents=True, exist_ok=True)
        (folder / name[:2] / name).write_bytes(blob)
    shelves, unreadable = LabelStore(folder).scan()
    assert not unreadable
    return sum(shelf.tokens for shelf in shelves)


def test_with_labels_on_disk_a_killed_run_repeats_to_the_bit(shared, model_factory, rows_file, tmp_path):
    """Though the teacher is not deterministic: nothing that was learned from is computed again."""
    model = model_factory("qwen2")
    straight = write(tmp_path / "straight", model, rows_file, shared.address, seed=7)
    assert run_student("train", straight).returncode == 0
    broken = write(tmp_path / "broken", model, rows_file, shared.address, seed=7)
    run = train(broken)
    log = tmp_path / "broken" / "run" / "train_log.jsonl"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not (tmp_path / "broken" / "run" / "final").exists(), "it was killed before its end"
    done = run_cli("train", broken, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert adapter_hash(tmp_path / "broken" / "run") == adapter_hash(tmp_path / "straight" / "run")
    assert losses(tmp_path / "broken" / "run") == losses(tmp_path / "straight" / "run")
