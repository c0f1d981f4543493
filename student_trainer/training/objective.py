"""What is minimised at a step: the loss section of a config as numbers, pure functions of the optimizer step.

In: LossConfig and the vocabulary both sides share; out: an OutputLossSpec.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.config.losses import LossConfig
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.output import OutputLossSpec
from student_trainer.teachers.loss_checks import divergence_of, has_tau_squared, temperature_of


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
            divergence=divergence_of(output),
            temperature=temperature_of(output).at(step),
            tau_squared=has_tau_squared(output),
            kd_weight=output.weight,
            sft_weight=self.loss.sft_weight,
            tempered_head=output.tempered_head,
            chunk_bytes=self._chunk_bytes,
        )

    @property
    def _chunk_bytes(self) -> int:
        return self.loss.chunk_mb << 20
