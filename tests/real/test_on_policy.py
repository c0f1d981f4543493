"""A real student writes its own samples in bfloat16: its rounding is no fault of its cache.

LYCEUM_REAL names the folder that tests/real/fetch.py fills; without it nothing here runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

REAL = os.environ.get("LYCEUM_REAL", "")
if not REAL or not Path(REAL).expanduser().is_dir():
    pytest.skip("LYCEUM_REAL names no folder of real models (python -m tests.real.fetch)", allow_module_level=True)

from student_trainer.config.model import ModelConfig  # noqa: E402
from student_trainer.model.load import load_student  # noqa: E402
from student_trainer.rollout.engines.hf_sampler import HfSampler, Sampling  # noqa: E402
from student_trainer.rollout.sample import Rollout, RolloutPrompt  # noqa: E402


@pytest.mark.parametrize("lora", [None, {"rank": 8}], ids=["whole", "lora"])
def test_it_writes_in_bfloat16(lora):
    folder = Path(REAL).expanduser() / "smollm2"
    settings = {"path": str(folder), "dtype": "float32", "lora": lora, "compiled": False}
    student = load_student(ModelConfig(**settings), seed=0)
    draw = np.random.default_rng(0)
    prompts = [RolloutPrompt(0, slot, draw.integers(3, 40_000, 40).astype(np.int32), "a row") for slot in range(2)]
    written = HfSampler(student, Sampling(0, 4), 49_152, narrowed=torch.bfloat16).sample(prompts)
    assert all(isinstance(one, Rollout) and np.isfinite(one.logp_n).all() for one in written)
