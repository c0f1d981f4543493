"""Memory that ran out, said in one line: what was being done, and which settings make it smaller.

In: an error and a config; out: whether it is one of memory, and the settings of this run that can be lowered.
"""

from __future__ import annotations

import torch

from student_trainer.config.run import TrainConfig

_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that a device or this machine had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(said.lower() in text.lower() for said in _SAID)


def what_to_lower(config: TrainConfig, doing: str) -> str:
    """The settings that would make a step, or a measurement, need less memory; those first that change no result.

    Args:
        config: of the run.
        doing: "training" or "measuring".
    """
    if doing == "measuring":
        ways = [f"lower train.eval_batch_size={config.train.eval_batch_size}"] * (config.train.eval_batch_size > 1)
    elif config.train.batch_size > 1:
        ways = [
            f"lower train.batch_size={config.train.batch_size} and raise train.accumulation={config.train.accumulation}"
        ]
    else:
        ways = []
    ways += [f"lower loss.chunk_mb={config.loss.chunk_mb}"] * (config.loss.chunk_mb > 64)
    if doing == "training":
        ways += ["set model.gradient_checkpointing=true"] * (not config.model.gradient_checkpointing)
        ways += ["train adapters (model.lora)"] * (config.model.lora is None)
    ways.append(f"leave out the longest rows (data.max_tokens={config.data.max_tokens}, data.overlong=drop)")
    return ", ".join(ways[:-1]) + f", or {ways[-1]}" if len(ways) > 1 else ways[0]
