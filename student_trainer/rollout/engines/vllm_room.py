"""Where vLLM writes, and how many sequences at a time: what the engine, the config's checks and the registry ask before it is started.

In: a student, settings; out: a device, a number, or what is wrong.
"""

from __future__ import annotations

import torch

from student_trainer.errors import RolloutError
from student_trainer.model.load import Student
from student_trainer.rollout.engines.hf_sampler import USUAL_BATCH

BLOCK = {"cuda": 16, "cpu": 128}  # tokens of vLLM's pages
MOST_AT_A_TIME = 256  # sequences; vLLM's host work for more takes longer than the device's


def device_of(student: Student, number: int | None) -> torch.device:
    """GPU `number`, or where the student is.

    Raises:
        RolloutError: there is no such GPU.
    """
    if missing := no_such_gpu(number):
        raise RolloutError(missing)
    return student.outline.device if number is None else torch.device("cuda", number)


def no_such_gpu(number: int | None) -> str:
    """What is wrong with `on_policy.device`; empty if nothing is."""
    there = torch.cuda.device_count()
    if number is None or number < there:
        return ""
    seen = "no GPU" if there == 0 else "one GPU, number 0" if there == 1 else f"{there} GPUs, 0 to {there - 1}"
    return f"on_policy.device={number}: this process sees {seen}"


def usual_batch(student: Student, narrowed: torch.dtype | None, longest: int, device: torch.device) -> int:
    """How many sequences of `longest` tokens are written at a time: what a sixteenth of a GPU's memory holds keys and values of, within bounds.

    Args: see `VllmSampler`.
    """
    if device.type != "cuda":
        return USUAL_BATCH
    room = torch.cuda.get_device_properties(device).total_memory // 16
    return max(
        USUAL_BATCH,
        min(MOST_AT_A_TIME, room // sequence_bytes(student, dtype_of(student, narrowed), longest, device)),
    )


def dtype_of(student: Student, narrowed: torch.dtype | None) -> torch.dtype:
    """Of vLLM's weights and passes."""
    dtype: torch.dtype = narrowed or student.narrowed or next(student.causal_lm.parameters()).dtype
    return dtype


def sequence_bytes(student: Student, dtype: torch.dtype, longest: int, device: torch.device) -> int:
    """Of the keys and values of one sequence, in whole pages."""
    config, block = student.causal_lm.config.get_text_config(), BLOCK[device.type]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize * -(-longest // block) * block)
