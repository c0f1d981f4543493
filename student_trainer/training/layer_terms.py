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
    width = _width(student)
    if section.weight == "auto":
        weight = auto_weight(objective, width)
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
    weight = 0.0 if section.weight == "auto" else section.weight  # `hidden_term` knows the width that decides it
    return section, plan, FeatureWeight(weight, anneal_steps(section, objective.run_steps))


def auto_weight(objective: Objective, student_width: int) -> FeatureWeight:
    """What `loss.hidden.weight: auto` stands for, by measurement (docs/results/results.md): a student that was cut from its teacher gains by a large weight to the
    end, one of another width starts behind a projector that knows nothing, and a large weight holds it back.
    """
    assert objective.loss.hidden is not None and objective.features is not None
    steps = anneal_steps(objective.loss.hidden, objective.run_steps)
    if student_width == objective.features.teacher_width:
        return FeatureWeight(12.0, steps)
    return FeatureWeight(1.0, steps or max(1, objective.run_steps // 2))


def told_weight(objective: Objective, student: Student) -> str:
    """A line on what `auto` stands for in this run; empty where it is not asked for."""
    if objective.loss.hidden is None or objective.loss.hidden.weight != "auto":
        return ""
    ours, plan = _width(student), objective.features
    weight = auto_weight(objective, ours)
    assert plan is not None
    how = f"annealed over {weight.steps:,} steps" if weight.steps else "constant"
    return f"loss.hidden.weight=auto is {weight.start:g}, {how}: the student is {ours:,} wide, the teacher {plan.teacher_width:,}"


def _width(student: Student) -> int:
    return int(student.body.config.get_text_config().hidden_size)


def _basis(plan: FeaturePlan, layer: int) -> Basis | None:
    if plan.basis is None:
        return None
    found = plan.basis.layers[layer]
    return Basis(to_torch(found.mean_D), to_torch(found.basis_DR).float(), to_torch(found.massive_M).long())
