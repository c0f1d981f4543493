"""Out of memory in a step: one line, with settings that can still be lowered and nothing else."""

import pytest
import torch

from student_trainer.errors import RunError, StudentError
from student_trainer.memory import is_out_of_memory, out_of_memory_advice
from tests.cases.material import case_config

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.34 GiB. GPU 0 has a total capacity of 23.60 GiB of which 1.20 GiB is free."
)


def test_the_sentence_names_what_can_be_lowered(tmp_path):
    config = case_config(tmp_path, "train.batch_size=6", "train.accumulation=2")
    said = out_of_memory_advice(CUDA, config)
    assert isinstance(said, RunError) and isinstance(said, StudentError) and "\n" not in str(said)
    for part in (
        "2.34 GiB asked for", "1.20 GiB of 23.60 GiB free", "model.gradient_checkpointing=true",
        "train.batch_size=3 with train.accumulation=4", "loss.chunk_mb=512", "model.lora=", "data.max_tokens below 400",
    ):  # fmt: skip
        assert part in str(said)


@pytest.mark.parametrize(
    ("override", "absent"),
    [
        ("train.batch_size=1", "train.batch_size"),
        ("model.gradient_checkpointing=true", "model.gradient_checkpointing"),
        ("loss.chunk_mb=64", "loss.chunk_mb"),
        ("model.lora={rank: 4}", "model.lora"),
    ],
)
def test_what_is_as_low_as_it_goes_is_not_named(tmp_path, override, absent):
    assert f"{absent}=" not in str(out_of_memory_advice(CUDA, case_config(tmp_path, override)))


def test_a_batch_is_cut_to_the_same_sequences_a_step(tmp_path):
    for size, halved, rest in ((5, 1, 5), (9, 3, 3), (8, 4, 2)):
        said = str(out_of_memory_advice(MemoryError(), case_config(tmp_path, f"train.batch_size={size}")))
        assert f"train.batch_size={halved} with train.accumulation={rest}" in said


def test_what_counts_as_out_of_memory():
    host = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    assert all(map(is_out_of_memory, (CUDA, host, MemoryError())))
    assert not any(map(is_out_of_memory, (RuntimeError("CUDA error: an illegal access"), ValueError("memory"))))
