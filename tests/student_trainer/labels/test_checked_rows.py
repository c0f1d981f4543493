"""`hidden` labels of which a sample of rows is checked: wrong sequences never pass, a single wrong row in an eighth of the cases or more.

Each sequence is its own answer, as if it were alone in a request, and is judged as training judges it: shape and numbers by
`check_signals`, then lse and logp(label) recomputed from the states (`Integrity`).
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.rows_on_device import head_on, rows_on, with_checked_rows
from student_trainer.labels.verify import check_signals
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.integrity import Integrity, Tally, TeacherHeadMismatch
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import seen_in_logits
from teacher_wire.artifacts.kinds.output_head import TeacherHead
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError
from teacher_wire.core.tensor import float32
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher

V, D = 64, 16
FAKE = FakeTeacher(vocab_rows=V, hidden_size=D)
HEAD = head_on(TeacherHead(float32(FAKE.weight_VD)), V, torch.device("cpu"))
SPEC = spec_of("hidden", V, "sampled")
LOSS = OutputLossSpec(Divergence("forward_kl"))


def sequence(rng, least=3, most=30):
    return TokenBatch.pack([rng.integers(0, V, rng.integers(least, most)).tolist()])


@lru_cache(1)
def right_answers():
    """A thousand sequences and what is right about them."""
    rng = np.random.default_rng(0)
    batches = [sequence(rng) for _ in range(1000)]
    return [(batch, FAKE.signals(SPEC, batch)) for batch in batches]


def rows_of(signals, batch):
    check_signals(signals, SPEC, batch, ["s"])
    return rows_on(LabelTensors.of(with_checked_rows(signals, batch)), HEAD, torch.device("cpu"))


def judge(signals, batch, tally=None):
    """What the evidence of an answer says, without a loss: LabelError, or nothing."""
    rows = rows_of(signals, batch)
    seen = seen_in_logits(rows.logits(torch.float32), torch.from_numpy(batch.labels_N()).long())
    numbers = torch.arange(batch.rows)
    served = rows.lse_N, rows.label_logp_N
    Integrity(numbers, served[0], seen.lse_C, served[1], seen.label_logp_C, rows.tolerance, rows.checked).check(tally)


def judge_in_training(signals, batch, weights_N):
    """How many rows the output loss compared; LabelError if they are not right."""
    labels_N, student_ND = torch.from_numpy(batch.labels_N()).long(), torch.zeros(batch.rows, D)
    integrity = output_loss(student_ND, HEAD, rows_of(signals, batch), labels_N, weights_N, 1.0, LOSS).integrity
    integrity.check()
    return integrity.rows


def changed(signals, **arrays):
    return replace(signals, tensors=signals.tensors | {name: float32(array) for name, array in arrays.items()})


def shifted(signals, batch, rng):
    """Every row's state in place of its neighbour's."""
    return changed(signals, hidden_ND=np.roll(signals["hidden_ND"].array, 1, axis=0))


def shifted_labels(signals, batch, rng):
    """lse and logp of the rows, one off."""
    hidden_ND, later = signals["hidden_ND"].array, replace(batch, token_ids_T=np.roll(batch.token_ids_T, -1))
    found = FAKE.signals(SPEC, later)
    if found["lse_C"].shape != signals["lse_C"].shape:
        return found  # another choice of rows: refused by their number
    return changed(found, hidden_ND=hidden_ND)


def foreign(signals, batch, rng):
    """States, lse and logp of other tokens of the same length, all fitting one another."""
    other = replace(batch, token_ids_T=rng.permutation((batch.token_ids_T + 1) % V).astype(np.int32))
    found = FAKE.signals(spec_of("hidden", V), other)
    index_C = with_checked_rows(signals, batch)["row_C"].array
    return changed(
        signals,
        hidden_ND=found["hidden_ND"].array,
        lse_C=found.lse_N.array[index_C],
        label_logp_C=found.label_logp_N.array[index_C],
    )


def before_the_norm(signals, batch, rng):
    return changed(signals, hidden_ND=1.5 * signals["hidden_ND"].array)


def truncated(signals, batch, rng):
    """The last row is missing, in one of the tensors or in all."""
    names = list(signals.tensors) if rng.random() < 0.5 else [rng.choice(list(signals.tensors))]
    return changed(signals, **{name: signals[name].array[:-1] for name in names})


@pytest.mark.parametrize("wrong", [shifted, shifted_labels, foreign, before_the_norm, truncated])
def test_a_wrong_sequence_is_refused_a_thousand_times_of_a_thousand(wrong):
    rng = np.random.default_rng(0)
    refused = 0
    for batch, signals in right_answers():
        try:
            judge(wrong(signals, batch, rng), batch)
        except LabelError:
            refused += 1
    assert refused == 1000


def test_right_sequences_pass_and_an_eighth_of_their_rows_is_compared():
    tally, rows = Tally(), 0
    for batch, signals in right_answers():
        judge(signals, batch, tally)
        rows += batch.rows
    assert 1 / 8 < tally.rows / rows < 1 / 4 and tally.failing == 0


def test_a_single_wrong_row_is_found_in_an_eighth_of_the_cases_or_more():
    rng = np.random.default_rng(2)
    found = 0
    batch = sequence(rng, 300, 301)
    signals = FAKE.signals(SPEC, batch)
    for _ in range(1000):
        hidden_ND = signals["hidden_ND"].array.copy()
        row = int(rng.integers(batch.rows))
        hidden_ND[row] = -hidden_ND[row]
        try:
            judge(changed(signals, hidden_ND=hidden_ND), batch)
        except TeacherHeadMismatch as error:
            found += error.row == row
    assert found >= 105  # 1/8 of 1,000 less two standard deviations


def test_rows_without_weight_are_not_compared():
    batch = sequence(np.random.default_rng(3), 40, 41)
    signals = FAKE.signals(SPEC, batch)
    checked = with_checked_rows(signals, batch)["row_C"].array
    weights = torch.ones(batch.rows)
    weights[checked[0]] = 0
    assert judge_in_training(signals, batch, torch.ones(batch.rows)) == len(checked)
    assert judge_in_training(signals, batch, weights) == len(checked) - 1
    spoilt = signals["hidden_ND"].array.copy()
    spoilt[checked[0]] *= -1
    wrong = changed(signals, hidden_ND=spoilt)
    assert judge_in_training(wrong, batch, weights) == len(checked) - 1
    with pytest.raises(TeacherHeadMismatch):
        judge_in_training(wrong, batch, torch.ones(batch.rows))


@pytest.mark.parametrize("reduction", ["none", "int8"])
def test_labels_that_were_checked_in_every_row_serve_where_a_sample_is_asked_for(reduction):
    batch = TokenBatch.pack([list(range(1, n)) for n in (30, 9, 50)])
    every = FAKE.signals(spec_of("hidden", V, reduction=reduction), batch)
    some = FAKE.signals(spec_of("hidden", V, "sampled", reduction=reduction), batch)
    found = every.sampled(batch)
    assert found.tensors.keys() == some.tensors.keys()
    for name, tensor in some.tensors.items():
        np.testing.assert_array_equal(found[name].array, tensor.array)
    assert some.sampled(batch) is some
