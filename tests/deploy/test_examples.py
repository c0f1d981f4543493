"""Every example config is one that parses; the CPU ones run, together, as they are but for paths and length."""

from pathlib import Path

import pytest
import yaml

from student_trainer.config.run import load_config as load_training
from student_trainer.config.traces import load_traces_config
from teacher_server.config.server import load_config as load_server
from tests.e2e.conftest import free_port, run_cli

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_parses(path):
    tree = yaml.safe_load(path.read_text())
    is_server = "teachers" in tree and "model" not in tree  # a student may have several teachers
    load = load_server if is_server else load_traces_config if "sampling" in tree else load_training
    load(path)


@pytest.mark.ray
def test_the_cpu_examples_run(model_factory, rows_file, tmp_path):
    folder = EXAMPLES[0].parent
    server = tmp_path / "teacher.yaml"
    tree = yaml.safe_load((folder / "teacher-cpu.yaml").read_text())
    tree["teachers"][0]["backend"]["model"] = str(model_factory("qwen2", seed=5))
    tree["edge"]["port"] = free_port()
    server.write_text(yaml.safe_dump(tree))
    result = run_cli(
        "train", folder / "student-embedded.yaml",
        f"run.output_dir={tmp_path / 'run'}", f"run.cache_dir={tmp_path / 'cache'}", f"model.path={model_factory('qwen2')}",
        f"data.train=[{rows_file}]", f"data.eval=['{rows_file}#6']", f"teacher.embedded={server}", "train.max_steps=3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
