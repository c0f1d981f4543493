"""What `loss.hidden.weight: auto` stands for."""

import pytest
from pydantic import ValidationError

from student_trainer.config.losses import LossConfig
from student_trainer.losses.features.term import FeatureWeight
from student_trainer.teachers.features import FeaturePlan
from student_trainer.training.layer_terms import auto_weight
from student_trainer.training.objective import Objective


def objective(hidden, steps=100):
    loss = LossConfig.model_validate({"hidden": hidden})
    assert list(loss.features) == ["hidden"]
    return Objective(loss, 300, features=FeaturePlan({}, {}, teacher_width=64), run_steps=steps)


@pytest.mark.parametrize(
    ("hidden", "width", "expected"),
    [
        ({}, 64, FeatureWeight(12.0, 0)),
        ({}, 48, FeatureWeight(1.0, 50)),
        ({"anneal": {"share": 0.2}}, 64, FeatureWeight(12.0, 20)),
        ({"weight": "auto", "anneal": {"steps": 7}}, 48, FeatureWeight(1.0, 7)),
    ],
)
def test_auto_is_what_was_measured(hidden, width, expected):
    assert auto_weight(objective(hidden), width) == expected


def test_auto_is_refused_where_nothing_was_measured():
    with pytest.raises(ValidationError, match="weight=auto is known for objective proj_cos alone, not gram"):
        LossConfig.model_validate({"hidden": {"objective": "gram"}})


def test_a_weight_of_0_is_off():
    assert LossConfig.model_validate({"hidden": {"weight": 0}}).features == {}
