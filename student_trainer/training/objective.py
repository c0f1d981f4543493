"""What is minimised: the loss section of a config as terms, whose figures are pure functions of the optimizer step.

In: LossConfig and what teacher and student have agreed on; out: loss terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from student_trainer.config.losses import LossConfig
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.output.parts import Joining
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.output.term import OutputTerm
from student_trainer.losses.term import LossTerm
from student_trainer.model.load import Student
from student_trainer.teachers.features import FeaturePlan
from student_trainer.teachers.loss_checks import divergence_of, has_tau_squared, policy_gradient_of, temperature_of
from student_trainer.training.layer_terms import attention_term, ffn_term, hidden_term
from teacher_wire.core.signals import Signal


@dataclass(frozen=True)
class Objective:
    """The loss of a run.

    Attributes:
        loss: as configured.
        vocab_rows: V, ids that student, teacher and tokenizer share.
        signals: by which the teacher's distributions come; none if no loss asks for them.
        features: what is learned from the teacher's layers; None if nothing is.
        run_steps: optimizer steps of the run, of which schedules may take a share.
        joining: of several teachers; None with one or none.
    """

    loss: LossConfig
    vocab_rows: int
    signals: tuple[Signal, ...] = ()
    features: FeaturePlan | None = None
    run_steps: int = 1
    joining: Joining | None = None

    def terms(self, student: Student) -> list[LossTerm]:
        """The terms of this loss, each made by its entry of `TERMS`."""
        return [term for make in TERMS.values() if (term := make(self, student)) is not None]

    def at(self, step: int) -> OutputLossSpec:
        """The figures of optimizer step `step`, counted from 0."""
        output = self.loss.output
        if output is None:
            return OutputLossSpec(
                Divergence(), kd_weight=0.0, sft_weight=self.loss.sft_weight, chunk_bytes=self._chunk_bytes
            )
        return OutputLossSpec(
            divergence=divergence_of(output),
            temperature=temperature_of(output, self.run_steps).at(step),
            tau_squared=has_tau_squared(output),
            kd_weight=output.weight,
            sft_weight=self.loss.sft_weight,
            tempered_head=output.tempered_head,
            policy_gradient=policy_gradient_of(output),
            chunk_bytes=self._chunk_bytes,
        )

    @property
    def _chunk_bytes(self) -> int:
        return self.loss.chunk_mb << 20


def output_term(objective: Objective, student: Student) -> LossTerm:
    """Distillation and the data's own tokens; a config has a weight above 0 for one of them."""
    return OutputTerm(objective.at, partial(student.head, objective.vocab_rows), objective.signals, objective.joining)


# section of `loss` -> its term, or None if this run has none. A new term is one line here.
TERMS: dict[str, Callable[[Objective, Student], LossTerm | None]] = {
    "output": output_term,
    "hidden": hidden_term,
    "attention": attention_term,
    "ffn": ffn_term,
}
