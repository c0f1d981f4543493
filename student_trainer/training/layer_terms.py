"""The terms on features of a run: its plan, its student and its steps as loss terms.

In: the sections of `loss`, what the session has agreed on with the teacher, the student; out: one term per section that is on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from student_trainer.config.features import AttentionLossConfig, FfnLossConfig, HiddenLossConfig
from student_trainer.labels.device_transfer import to_torch
from student_trainer.losses.features.attention_term import AttentionTerm
from student_trainer.losses.features.ffn_term import FfnTerm
from student_trainer.losses.features.hidden_term import PROJECTED, Basis, HiddenTerm, Projector
from student_trainer.losses.features.term import FeatureWeight
from student_trainer.losses.term import LossTerm
from student_trainer.model.attention_reader import AttentionReader
from student_trainer.model.forward import blocks_of, down_projection
from student_trainer.model.load import Student
from student_trainer.teachers.features import FeaturePlan
from student_trainer.teachers.loss_checks import anneal_steps
from teacher_wire.score.signals import LayerStates

if TYPE_CHECKING:
    from student_trainer.training.objective import Objective


def hidden_term(objective: Objective, student: Student) -> LossTerm | None:
    """The states of chosen blocks; None if the section is off."""
    found = _section(objective, "hidden")
    if found is None:
        return None
    section, plan, weight = found
    assert isinstance(section, HiddenLossConfig)
    signal = plan.signals["hidden"]
    assert isinstance(signal, LayerStates)
    width = int(student.body.config.get_text_config().hidden_size)
    projectors = {}
    if section.objective in PROJECTED:
        for pair in plan.pairs["hidden"]:
            target = signal.rank if signal.reduction == "pca" else plan.teacher_width
            projectors[pair.student] = Projector(width, target, _basis(plan, pair.teacher), plan.teacher_width)
    return HiddenTerm(section.objective, plan.pairs["hidden"], weight, signal, projectors)


def attention_term(objective: Objective, student: Student) -> LossTerm | None:
    """Where chosen blocks look; None if the section is off.

    Raises:
        ModelError: the student's attention cannot be made again.
    """
    found = _section(objective, "attention")
    if found is None:
        return None
    section, plan, weight = found
    assert isinstance(section, AttentionLossConfig)
    reader = AttentionReader(student.body, student.computing)
    for pair in plan.pairs["attention"]:
        reader.check(pair.student)
    return AttentionTerm(section.objective, plan.pairs["attention"], weight, plan.signals["attention"], reader)


def ffn_term(objective: Objective, student: Student) -> LossTerm | None:
    """How much the FFN of chosen blocks works; None if the section is off.

    Raises:
        ModelError: the student's FFN cannot be tapped.
    """
    found = _section(objective, "ffn")
    if found is None:
        return None
    section, plan, weight = found
    assert isinstance(section, FfnLossConfig)
    blocks = blocks_of(student.body)
    for pair in plan.pairs["ffn"]:
        down_projection(blocks[pair.student - 1])
    return FfnTerm(section.objective, plan.pairs["ffn"], weight, plan.signals["ffn"])


def _section(
    objective: Objective, name: str
) -> tuple[HiddenLossConfig | AttentionLossConfig | FfnLossConfig, FeaturePlan, FeatureWeight] | None:
    section, plan = objective.loss.features.get(name), objective.features
    if section is None:
        return None
    assert plan is not None, "a session has planned it"
    return section, plan, FeatureWeight(section.weight, anneal_steps(section, objective.run_steps))


def _basis(plan: FeaturePlan, layer: int) -> Basis | None:
    if plan.basis is None:
        return None
    found = plan.basis.layers[layer]
    return Basis(to_torch(found.mean_D), to_torch(found.basis_DR).float(), to_torch(found.massive_M).long())
