"""What to change when the memory of a device is not enough: one sentence, from what the run is set to.

In: torch's error and the config; out: a StudentError. It asks the device only how much is left.
"""

from __future__ import annotations

import re

import torch

from student_trainer.config import TrainConfig
from student_trainer.errors import RunError, StudentError

_HEAVY_CHUNK_MB = 256  # logits of less than this are not what fills a card


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is at its end: torch's own on a device, or the host's allocator, which has no type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory_advice(error: BaseException, config: TrainConfig) -> StudentError:
    """The sentence for a step that did not fit.

    Args:
        error: what was raised (see `is_out_of_memory`).
        config: of the run; only what can still be lowered is named, what helps most and changes least first.

    Returns:
        a RunError to raise from `error`.
    """
    train, model = config.train, config.model
    ways = []
    if not model.gradient_checkpointing:
        ways.append("model.gradient_checkpointing=true (activations)")
    if train.batch_size > 1:
        halved = max(part for part in range(1, train.batch_size // 2 + 1) if train.batch_size % part == 0)
        rest = train.accumulation * train.batch_size // halved
        ways.append(
            f"train.batch_size={halved} with train.accumulation={rest} (activations; the same sequences a step)"
        )
    if config.loss.chunk_mb > _HEAVY_CHUNK_MB:
        ways.append(f"loss.chunk_mb={max(_HEAVY_CHUNK_MB, config.loss.chunk_mb // 2)} (logits)")
    if model.lora is None:
        ways.append("model.lora={rank: 16} instead of null (gradients and averages of every weight, 12 bytes each)")
    elif model.dtype == "float32" and torch.cuda.is_available():
        ways.append("model.dtype=bfloat16 (the frozen weights)")
    if train.eval_batch_size > 1 and config.data.eval:
        ways.append(f"train.eval_batch_size={train.eval_batch_size // 2} (if it was while measuring)")
    ways.append(f"data.max_tokens below {config.data.max_tokens} with data.overlong=drop (the longest rows)")
    return RunError(f"out of memory while training{_asked(error)}: try, in this order, {'; '.join(ways)}")


def _asked(error: BaseException) -> str:
    """What torch wanted and what there was, as far as it says so."""
    wanted = re.search(r"allocate ([\d.]+ \w+)\b", str(error))
    there = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", str(error))
    told = [f"{wanted[1]} asked for"] if wanted else []
    told += [f"{there[2]} of {there[1]} free"] if there else []
    return f" ({', '.join(told)})" if told else ""
