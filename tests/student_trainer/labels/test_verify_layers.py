"""Answers about layers that a student must not learn from."""

from __future__ import annotations

import numpy as np
import pytest

from student_trainer.labels.verify import check_signals
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.core.tensor import Tensor
from teacher_wire.score.signals import Attention, Ffn, LayerStates, Relation
from teacher_wire.testing.fake_teacher import FakeTeacher

FAKE = FakeTeacher(layers=3, basis_rank=8, hidden_size=32)
BATCH = TokenBatch.pack([list(range(9)), list(range(60)) * 3])
SPECS = {
    "pca": SignalSpec(64, (LayerStates((1, 2), "pca", 8, FAKE.teacher_info().artifact("layer_basis").sha256),), "sampled"),
    "int8": SignalSpec(64, (LayerStates((1, 2), "int8"), Attention((2,)), Relation((3,)), Ffn((1,), "quantiles")), "sampled"),
    "none": SignalSpec(64, (LayerStates((0,), "none"), Relation((3,), "none"))),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_a_right_answer_passes(name):
    check_signals(FAKE.signals(SPECS[name], BATCH), SPECS[name], BATCH, ["first", "second"])


def put(place, value):
    def spoil(array):
        array[place] = value
        return array

    return spoil


@pytest.mark.parametrize(
    ("spec", "tensor", "spoil", "said"),
    [
        ("pca", "layer2_scale_N", put(-1, np.nan), "second, row 178: holds NaN or infinity"),
        ("int8", "layer1_outlier_ids_NO", put((3, -1), 32), "first, row 3: a channel outside the state"),
        ("int8", "layer1_scales_NG", put(9, np.inf), "second, row 1: holds NaN or infinity"),
        ("int8", "attention2_K", put(2, -0.25), "first, row 2: not a probability"),
        ("int8", "attention2_K", put(2, 1.5), "first, row 2: not a probability"),
        (
            "int8",
            "attention2_K",
            put(slice(-3, None), 0.75),
            "second, row 178: a row's blocks hold more than all of it",
        ),
        ("int8", "attention2_K", put(-1, np.nan), "second, row 178: holds NaN or infinity"),
        ("int8", "keys3_scale_T", put(-1, np.nan), "second, row 178: holds NaN or infinity"),
        ("int8", "ffn1_energy_N", put(0, np.inf), "first, row 0: holds NaN or infinity"),
        ("int8", "ffn1_quantiles_NQ", put((1, 3), np.nan), "first, row 1: holds NaN or infinity"),
        ("none", "layer0_state_ND", put((2, 1), np.nan), "first, row 2: holds NaN or infinity"),
        ("none", "values3_TF", put((8, 1), np.nan), "second, row 0: holds NaN or infinity"),
        ("int8", "keys3_scale_T", lambda array: array[:-1], "wrong number of rows"),
        ("int8", "attention2_K", lambda array: array[1:], "wrong number of rows"),
    ],
)
def test_a_wrong_answer_is_refused_by_sample_and_row(spec, tensor, spoil, said):
    right = FAKE.signals(SPECS[spec], BATCH)
    changed = Tensor(right[tensor].dtype, spoil(right[tensor].array.copy()))
    wrong = TeacherSignals(right.tensors | {tensor: changed})
    with pytest.raises(LabelError, match=said):
        check_signals(wrong, SPECS[spec], BATCH, ["first", "second"])
