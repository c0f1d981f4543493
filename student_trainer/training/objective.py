"""What is minimised at a step: the loss section of a config as numbers, pure functions of the optimizer step.

In: LossConfig and the vocabulary both sides share; out: an OutputLossSpec, and teacher rows as the losses want them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from student_trainer.config.run import LabelConfig, LossConfig, OutputLossConfig, ScheduleConfig
from student_trainer.errors import ConfigError
from student_trainer.labels.device_transfer import LabelTensors, to_torch
from student_trainer.losses.divergence import Divergence, advice
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import BFLOAT16, FLOAT32, Tolerance
from student_trainer.losses.output import OutputLossSpec
from student_trainer.losses.rows import FullRows, HiddenRows, TeacherRows, TopKRows
from student_trainer.losses.truncated import check_temperature
from student_trainer.schedules import Schedule
from teacher_wire.core.messages import TeacherHead


@dataclass(frozen=True)
class Objective:
    """The loss of a run.

    Attributes:
        loss: as configured.
        vocab_rows: V, ids that student, teacher and tokenizer share.
    """

    loss: LossConfig
    vocab_rows: int

    def at(self, step: int) -> OutputLossSpec:
        """The figures of optimizer step `step`, counted from 0."""
        output = self.loss.output
        if output is None:
            return OutputLossSpec(
                Divergence(), kd_weight=0.0, sft_weight=self.loss.sft_weight, chunk_bytes=self._chunk_bytes
            )
        return OutputLossSpec(
            divergence=_divergence(output),
            temperature=_temperature(output).at(step),
            tau_squared=_tau_squared(output),
            kd_weight=output.weight,
            sft_weight=self.loss.sft_weight,
            tempered_head=output.tempered_head,
            chunk_bytes=self._chunk_bytes,
        )

    @property
    def _chunk_bytes(self) -> int:
        return self.loss.chunk_mb << 20


def check_loss(loss: LossConfig, labels: LabelConfig) -> str | None:
    """Refuses a loss that these labels cannot give; returns advice for one that is legal but rarely meant.

    Raises:
        ConfigError: naming the setting and the choices.
    """
    output = loss.output
    if output is None:
        return None
    try:
        divergence = _divergence(output)
        schedule = _temperature(output)
        for temperature in (schedule.start, schedule.end):
            check_temperature(labels.transport, temperature, output.tempered_head)
    except ValueError as error:
        raise ConfigError(f"loss.output: {error}") from error
    return advice(divergence)


def is_softened(loss: LossConfig) -> bool:
    """Whether the output loss ever has a temperature other than 1."""
    if loss.output is None:
        return False
    schedule = _temperature(loss.output)
    return (schedule.start, schedule.end) != (1.0, 1.0)


def head_on(head: TeacherHead, vocab_rows: int, device: torch.device) -> Head:
    """The teacher's output head on the student's device, over the shared ids."""
    header = head.header
    bias = None if header.bias_V is None else to_torch(header.bias_V, device)
    whole = Head(to_torch(head.weight_VD, device), bias, header.logit_scale, header.final_softcap)
    return whole.slice(vocab_rows)


def rows_on(labels: LabelTensors, head: Head | None, device: torch.device, likeliest: int = 0) -> TeacherRows:
    """An answer as the losses want it, on the student's device; `likeliest` is k if the student named ids beside them."""
    labels = labels.to(device)
    found = labels.named
    lse_N, label_N = found["lse_N"], found["label_logp_N"]
    if "hidden_ND" in found or "state_int8_ND" in found:
        assert head is not None, "hidden labels need the teacher's head"
        dtype = head.weight_VD.dtype  # the teacher's
        return HiddenRows(labels.state(dtype), head, lse_N, label_N, _tolerance(dtype))
    if "logits_NV" in found:
        logits_NV = found["logits_NV"]
        return FullRows(logits_NV, lse_N, label_N, _tolerance(logits_NV.dtype))
    logits_NK = found["topk_logits_NK"]
    tail_N, tolerance = found["tail_logp_N"], _tolerance(logits_NK.dtype)
    return TopKRows(found["topk_ids_NK"].long(), logits_NK, tail_N, lse_N, label_N, tolerance, likeliest)


def _tolerance(dtype: torch.dtype) -> Tolerance:
    """How closely two computations in the teacher's dtype must agree."""
    return FLOAT32 if dtype == torch.float32 else BFLOAT16


def _divergence(output: OutputLossConfig) -> Divergence:
    alpha = output.alpha if output.alpha is not None else (0.5 if output.divergence == "adaptive_kl" else 0.1)
    return Divergence(output.divergence, output.beta, alpha, output.normalization)


def _temperature(output: OutputLossConfig) -> Schedule:
    temperature = output.temperature
    if isinstance(temperature, ScheduleConfig):
        return Schedule(temperature.kind, temperature.start, temperature.end, temperature.steps)
    return Schedule("constant", temperature, temperature, 1)


def _tau_squared(output: OutputLossConfig) -> bool:
    """Without it a temperature schedule would be a learning-rate schedule (algorithms.md 1.4)."""
    if output.tau_squared is not None:
        return output.tau_squared
    return isinstance(output.temperature, ScheduleConfig) and output.temperature.kind != "constant"
