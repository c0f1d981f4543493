"""The answers of several teachers as labels of the loss."""

import torch

from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.joined.answer import Answer, AskedOne
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.head import Head
from student_trainer.training.joined.joiner import JoinedTeacher, _labels_of
from teacher_wire.core.batch import TokenBatch


def test_losses_are_told_which_rows_of_an_answer_are_checked():
    batch = TokenBatch.pack([list(range(6))], [[False, True, True, True, True, False]])
    named = {
        "hidden_ND": torch.zeros(4, 8),
        "row_C": torch.tensor([0, 3], dtype=torch.int32),
        "lse_C": torch.zeros(2),
        "label_logp_C": torch.zeros(2),
    }
    answer = Answer(AskedOne((0,), LabelRequest(batch, ("a",))), LabelTensors(named))
    rows = _labels_of(JoinedTeacher("near", 1.0, Head(torch.zeros(5, 8))), answer, torch.device("cpu")).output
    assert rows.checked == 2 and rows.checked_row.tolist() == [0, 3]
