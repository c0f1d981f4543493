"""The whole way of a student on a tiny model, by the script that the README names; it compares its last answers itself."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import free_port
from tests.students import run_as_python

SCRIPT = Path(__file__).parents[2] / "deploy" / "examples" / "journey.sh"


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif("LYCEUM_VLLM" not in os.environ, reason="no vLLM: make setup-vllm")
def test_from_raw_files_to_a_served_student(model_factory, tmp_path):
    teacher = model_factory(
        "qwen2", seed=5, hidden=128, num_hidden_layers=4
    )  # vLLM's CPU kernels know no narrower heads
    work = tmp_path / "work"
    environment = {**os.environ, **run_as_python(tmp_path), "PORT": str(free_port()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", SCRIPT, teacher, work, "2"], env=environment, capture_output=True, text=True, timeout=880, check=False
    )
    told = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0 and "answers of the served export are those of the trained student" in done.stdout, told
    for made in (
        "student/student.yaml",
        "run/final/adapter_model.safetensors",
        "evaluation/evaluation.json",
        "report.html",
    ):
        assert (work / made).is_file(), made
    shutil.rmtree(work)
