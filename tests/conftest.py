"""What every test may need: tiny models of real families, a tokenizer, rows; and one torch thread."""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import tempfile
from pathlib import Path

import hypothesis
import pytest

from tests.tiny import WORDS, make_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would have its workers give way to every other process: beside tests that compute they would not come up within their limits.
os.environ.setdefault("RAY_worker_niceness", "0")
# Runs are followed by trackio where it is installed: in a database of the tests, not the user's.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="lyceum-trackio-"))
# Event loops that met grpc are never closed (teacher_wire/testing/loopback.py): a thousand tests hold a thousand files, the usual limit.
_SOFT, _HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
if _SOFT != resource.RLIM_INFINITY:
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(_SOFT, 8192 if _HARD == resource.RLIM_INFINITY else min(8192, _HARD)), _HARD)
    )
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is no failure
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several processes (`-n`) each takes whole files; those that start Ray go one behind the other in the same process.

    Several clusters at once would share two cores and one folder of sessions.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ray" if _starts_ray(config.rootpath / file) else file

    return Scheduling(config, log)


# Files of half a minute and more that start no Ray: they are begun first, so that none of them is left for the end, when the other process has nothing to do.
_LONG = (
    "tests/e2e/test_task1_gate.py",
    "tests/teacher_server/backends/test_vllm.py",
    "tests/student_trainer/rollout/test_vllm_engine.py",
    "tests/student_trainer/model/test_compiled.py",
    "tests/student_trainer/planning/test_plan.py",
    "tests/student_trainer/training/test_joined_run.py",
    "tests/student_trainer/training/test_train.py",
    "tests/student_trainer/training/test_on_policy.py",
    "tests/student_trainer/training/test_label_cache.py",
    "tests/student_trainer/training/test_train_features.py",
    "tests/student_trainer/training/test_pg_rkl.py",
    "tests/faults/test_noisy_neighbour.py",
)


def _starts_ray(path: Path) -> bool:
    return "pytest.mark.ray" in path.read_text()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What is marked `thorough` is left to `make thorough`; what takes longest is begun first, all with Ray before the others."""
    if not os.environ.get("LYCEUM_THOROUGH"):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="one of many alike: make thorough"))
    places: dict[Path, int] = {}
    for item in items:
        if item.path not in places:
            file = item.path.relative_to(item.config.rootpath).as_posix()
            long = _LONG.index(file) if file in _LONG else len(_LONG)
            places[item.path] = -1 if _starts_ray(item.path) else long
    items.sort(key=lambda item: places[item.path])


def pytest_collection_finish():
    """What was imported for five thousand tests is looked at by no later collection of garbage: it took a second each time."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries tell of what is left at the end


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_factory(tmp_path_factory):
    """family, ... -> folder of a tiny model, made once a session for equal arguments."""
    made: dict[str, Path] = {}

    def factory(family: str = "qwen2", **changes) -> Path:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return factory


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """48 instruction rows of different lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {
            "instruction": "Go on.",
            "input": " ".join(WORDS[i % 7 : i % 7 + 3]),
            "output": " ".join(WORDS[i % 5 : 2 + i % 5 + i % 6]),
        }
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
