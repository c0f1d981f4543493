"""A student that is its teacher: every loss on features is nothing at step 0, through capture, reductions, the wire, and all that the student
makes again by itself. What any of them got wrong (a layer, a norm, a rotation, a shifted row, a scale) would show here.
"""

from __future__ import annotations

import io
import json
from contextlib import contextmanager

import pytest
from rich.console import Console

from student_trainer.config.run import parse_config
from student_trainer.training.run import train
from teacher_server.backends.transformers.backend import load
from teacher_server.config.backends import TransformersBackend
from teacher_server.config.features import FeaturesConfig
from teacher_server.config.server import TeacherConfig
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.testing.loopback import serve
from tests.e2e.classroom import EngineService
from tests.student_trainer.conftest import run_config
from tests.tiny import WORDS

QUIET = Console(file=io.StringIO())
SHAPES = {
    "qwen2": {"num_hidden_layers": 3},
    "llama": {"num_hidden_layers": 3},
    "gemma3_text": {"num_hidden_layers": 3, "sliding_window": 40},
}


@contextmanager
def served(folder):
    config = TeacherConfig(
        name="t",
        backend=TransformersBackend(model=str(folder), dtype="float32", device="cpu"),
        features=FeaturesConfig(rank=16, calibration_tokens=2048, folder=None),
    )
    model = load(config.backend, deterministic=False)
    service = EngineService(TeacherEngine(config, model))
    with serve(service) as server:
        try:
            yield server.address
        finally:
            service.stop()


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(6):
            answer = " ".join(WORDS[(i * 5 + k * k) % len(WORDS)] for k in range(48 + i))
            file.write(json.dumps({"prompt": " ".join(WORDS[i : i + 3]), "completion": " " + answer}) + "\n")
    return path


@pytest.mark.parametrize("family", SHAPES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, model_factory, long_rows, family):
    folder = model_factory(family, **SHAPES[family])
    ways = {
        "proj_cos": {"hidden": {"objective": "proj_cos"}, "attention": {"objective": "pooled_kl"}, "ffn": {"objective": "energy"}},
        "proj_sl1": {"hidden": {"objective": "proj_sl1", "reduction": "int8"}, "attention": {"objective": "relation"}, "ffn": {"objective": "quantiles"}},
    }  # fmt: skip
    with served(folder) as address:
        for name, terms in ways.items():
            loss = {term: {"weight": 1e-6, "layers": [[1, 1], [3, 3]]} | way for term, way in terms.items()}
            tree = run_config(tmp_path, folder, long_rows, address, loss=loss, model={"lora": {"rank": 4}})
            tree["run"]["output_dir"] = str(tmp_path / name)
            tree["data"] = {"train": [str(long_rows)], "max_tokens": 128}
            tree["train"] = {
                "max_steps": 1,
                "learning_rate": 1e-9,
                "save_steps": 0,
                "log_steps": 1,
                "batch_size": 3,
                "accumulation": 1,
            }
            train(parse_config(tree, "test"), console=QUIET)
            before = json.loads((tmp_path / name / "layers.json").read_text())["before"]
            for block in (1, 3):
                assert before[f"hidden_loss_{block}"] < 2e-3, "int8 rounds"
                assert before[f"attention_loss_{block}"] < 1e-3
                assert before[f"ffn_loss_{block}"] < 5e-3
                assert before[f"cka_{block}"] > (0.99 if name == "proj_sl1" else 0.7), "pca leaves some out"
