"""Labels on disk between real processes and a served model: trainings at once and later, a kill while labelling."""

import contextlib
import random
import re
import signal
import subprocess
import time

import pytest
import yaml

from teacher_wire.labels.store import LabelStore
from tests.e2e.conftest import run_cli
from tests.e2e.test_training import STEPS, adapter_hash, losses, write_config
from tests.students import run_student, start_student

pytestmark = pytest.mark.ray
SHORT = {**STEPS, "max_steps": 6}


def config_in(folder, cache, teachers, model, rows, name="shared", **sections):
    """A run of its own with a cache that others share; `shared` batches across callers: its bits depend on the company."""
    path = write_config(folder, model, rows, teachers.address, teacher={"name": name}, **sections)
    tree = yaml.safe_load(path.read_text())
    tree["teacher"]["name"], tree["run"]["cache_dir"] = name, str(cache)
    path.write_text(yaml.safe_dump(tree))
    return path


def blobs(cache):
    return {path.name: path.read_bytes() for path in (cache / "labels").rglob("*.safetensors")}


def test_two_students_of_a_machine_train_on_the_same_bytes_and_a_third_asks_nothing(
    teachers, model_factory, rows_file, tmp_path
):
    model, cache = model_factory("qwen2"), tmp_path / "cache"
    configs = [config_in(tmp_path / f"s{i}", cache, teachers, model, rows_file, train=SHORT) for i in range(3)]
    running = [start_student("train", path, stderr=subprocess.PIPE) for path in configs[:2]]
    for process in running:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    before = blobs(cache)
    third = run_cli("train", configs[2])
    assert third.returncode == 0, third.stderr
    assert re.search(r"labels: [\d,]+ tokens from disk, 0 from the teacher", third.stderr), third.stderr
    assert blobs(cache) == before
    runs = [path.parent / "run" for path in configs]
    assert len({adapter_hash(run) for run in runs}) == 1
    assert all(losses(run) == losses(runs[0]) for run in runs)


def test_killed_while_labelling_and_done_again(teachers, model_factory, rows_file, tmp_path):
    model, cache = model_factory("qwen2"), tmp_path / "cache"
    config = config_in(
        tmp_path,
        cache,
        teachers,
        model,
        rows_file,
        train={**SHORT, "max_steps": None, "epochs": 1},
        feed={"max_batches": 1},
    )
    process = start_student("label", config)
    enough = random.randint(3, 20)
    with contextlib.suppress(FileNotFoundError):
        while process.poll() is None and len(blobs(cache)) < enough:
            time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(blobs(cache))
    done = run_cli("label", config)
    assert done.returncode == 0 and "done labels of" in done.stderr, done.stderr
    store = LabelStore(cache / "labels")
    whole, damaged = store.verify()
    assert damaged.sequences == 0 and whole.sequences >= max(there, 40)
    result = run_student("train", config)
    assert result.returncode == 0 and "0 from the teacher" in result.stderr, result.stderr
