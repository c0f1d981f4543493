"""What the cases are tried on: tiny models with the chat templates of real families, and rows as people write them.

`models/` and `inputs/` hold re-enactments of public bug reports of other trainers; each test names the kind it stands for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from student_trainer.config.files import read_tree
from student_trainer.config.run import TrainConfig, parse_config
from tests.students import run_student

HERE = Path(__file__).parent
MODELS, INPUTS = HERE / "models", HERE / "inputs"
ROOT = HERE.parent.parent

BASE = """\
run: {{output_dir: {folder}/run, cache_dir: {folder}/cache}}
model: {{path: {models}/qwen2, dtype: float32, lora: null}}
data: {{train: [{inputs}/rows.jsonl], max_tokens: 400}}
loss: {{output: null, sft_weight: 1.0}}
train: {{batch_size: 2, accumulation: 1, max_steps: 2, log_steps: 1, learning_rate: 1.0e-3}}
"""


def base_file(folder: Path) -> Path:
    """The config that every case starts from, in `folder`: all weights, no teacher, float32, two steps."""
    path = folder / "base.yaml"
    path.write_text(BASE.format(folder=folder, models=MODELS, inputs=INPUTS))
    return path


def case_config(folder: Path, *overrides: str) -> TrainConfig:
    """The base config with overrides."""
    return parse_config(read_tree(base_file(folder), list(overrides)), "case")


def command(
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    timeout_s: float = 240,
    house: str = "student_trainer",
) -> subprocess.CompletedProcess[str]:
    """Runs a real command of a house in a process of its own and returns its exit code and output."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", f"{house}.cli", *map(str, arguments)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": path, **(env or {})}, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def train_case(
    folder: Path, *overrides: str, resume: bool = False, env: dict[str, str] | None = None, **more: object
) -> subprocess.CompletedProcess[str]:
    """`student-trainer train` of the base config with overrides, in a process of its own, and with `env` in an interpreter of its own."""
    arguments = ["train", base_file(folder), *overrides, *(["--resume", "auto"] if resume else [])]
    if env is None and not more:
        return run_student(*arguments, cwd=folder)
    return command(*arguments, cwd=folder, env=env, **more)  # type: ignore[arg-type]
