"""A few real steps of the student, where its weights may be loaded: how long a micro-batch takes, and how much memory.

In: a config, the rows; out: a `StepTime`. Nothing is learned: gradients are computed and thrown away, nothing is written. The teacher is not
asked, so its output head is not in the figures.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from student_trainer.config.losses import LossConfig
from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import order_of
from student_trainer.errors import ModelError
from student_trainer.model.load import load_student
from student_trainer.training.learner import Learner
from student_trainer.training.objective import Objective
from student_trainer.training.reporting.out_of_memory import is_out_of_memory
from student_trainer.training.windows import FixedOrder, padded

_WARM, _COUNTED = 1, 3


@dataclass(frozen=True)
class StepTime:
    """Of micro-batches of the run.

    Attributes:
        micro_batch_s: median of forward and backward pass.
        tokens_per_s: padding not counted.
        peak_bytes: most in use by torch on a GPU; None elsewhere.
    """

    micro_batch_s: float
    tokens_per_s: float
    peak_bytes: int | None


def measure_step(config: TrainConfig, data: TokenizedDataset) -> StepTime:
    """Loads the student and computes a few micro-batches.

    Raises:
        ModelError: it cannot be loaded, or a micro-batch of it does not fit into memory.
    """
    torch.set_num_threads(config.model.threads)
    student = load_student(config.model, config.run.seed)
    loss = LossConfig(output=None, sft_weight=1.0, chunk_mb=config.loss.chunk_mb)
    objective = Objective(loss, min(student.vocab_rows, len(student.tokenizer)))
    learner = Learner(student, objective.terms(student), narrowed=torch.bfloat16 if config.train.bf16 else None)
    learner.train()
    windows = FixedOrder(data, order_of(config, data))
    on_gpu = torch.cuda.is_available()
    taken, tokens = [], 0
    batches = [batch for step in range(min(windows.steps, _WARM + _COUNTED)) for batch in windows.window(step).batches]
    try:
        for number, batch in enumerate(batches[: _WARM + _COUNTED]):
            began_s = time.perf_counter()
            made = padded(batch, student.pad_id, lambda longest: longest)
            learner(made, max(1.0, made.weight), 0).loss.backward()
            learner.zero_grad(set_to_none=True)
            if on_gpu:
                torch.cuda.synchronize()
            if number >= _WARM or len(batches) <= _WARM:
                taken.append(time.perf_counter() - began_s)
                tokens += batch.request.batch.tokens
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = " ".join(str(error).split())[:200]
        raise ModelError(f"--measure: a micro-batch of the student does not fit into memory: {told}") from error
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return StepTime(statistics.median(taken), tokens / sum(taken), peak)
