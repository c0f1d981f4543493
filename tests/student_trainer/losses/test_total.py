"""The sum of terms: order, names, evidence, and what is refused before anything is computed."""

import numpy as np
import pytest
import torch

from student_trainer.errors import ConfigError
from student_trainer.losses.features.layers import LayerPair
from student_trainer.losses.features.term import FeatureWeight, PairedTerm, of_rows
from student_trainer.losses.term import (
    JoinedLabels,
    Mean,
    Needs,
    StudentOutputs,
    SupervisedRows,
    TeacherLabels,
    TeacherShare,
    TermResult,
)
from student_trainer.losses.total import check_needs, taps_of, total

OUTPUTS = StudentOutputs(torch.arange(12.0).reshape(1, 4, 3), {2: torch.ones(1, 4, 3)})
ROWS = SupervisedRows(torch.tensor([1, 3]), torch.tensor([5, 6]), torch.ones(2))


class Wanted:
    def __init__(self, kind):
        self.kind = kind


class Constant:
    def __init__(self, name, value=1.0, *, needs=Needs(), evidence=None, logs=None):  # noqa: B008
        self.name, self.value, self._needs, self.evidence = name, torch.tensor(value), needs, evidence
        self.logs, self.given = logs or f"{name}_loss", None

    def needs(self):
        return self._needs

    def term(self, outputs, labels, rows, normalizer, step):
        self.given = (outputs, labels, rows, normalizer, step)
        return TermResult(self.value / normalizer, {self.logs: Mean(self.value, torch.tensor(2.0))}, self.evidence)


def test_terms_are_summed_in_their_order_and_all_are_given_the_same():
    evidence = object()
    terms = [Constant("b", 1.0), Constant("a", 4.0, evidence=evidence), Constant("c", -2.0)]
    found = total(terms, OUTPUTS, None, ROWS, 4.0, 7)
    assert float(found.loss) == 0.75 and list(found.parts) == ["b_loss", "a_loss", "c_loss"]
    assert found.evidence == (evidence,)
    assert all(term.given == (OUTPUTS, None, ROWS, 4.0, 7) for term in terms)


def test_the_total_of_one_term_is_its_own():
    """No zero is added: bits stay."""
    term = Constant("one")
    term.value = torch.tensor(-0.0)
    assert str(float(total([term], OUTPUTS, None, ROWS, 1.0, 0).loss)) == "-0.0"


def test_rows_are_taken_from_any_states():
    assert torch.equal(ROWS.of(OUTPUTS.final_BLD), torch.tensor([[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]))
    assert OUTPUTS.tensors()[1] is OUTPUTS.taps[2]


def test_taps_are_those_of_all_terms_once():
    assert taps_of([Constant("a", needs=Needs(taps=(5, 1))), Constant("b", needs=Needs(taps=(1, 0)))]) == (0, 1, 5)
    assert taps_of([Constant("a")]) == ()


def test_two_figures_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"loss\.b: another term logs same too"):
        total([Constant("a", logs="same"), Constant("b", logs="same")], OUTPUTS, None, ROWS, 1.0, 0)


@pytest.mark.parametrize(
    ("needs", "teacher", "named"),
    [
        (Needs((Wanted("full"),)), None, r"loss\.x: needs the signal full of a teacher: set the section teacher"),
        (Needs((Wanted("full"), Wanted("pca"))), "t", r"loss\.x: .* pca, which teacher 't' does not give; it gives full, hidden"),
        (Needs(taps=(25,)), "t", r"loss\.x: taps block 25 of the student, whose blocks are 1\.\.24"),
    ],
)  # fmt: skip
def test_what_is_lacking_is_named(needs, teacher, named):
    terms = [Constant("ok", needs=Needs(taps=(0, 24))), Constant("x", needs=needs)]
    check_needs(terms[:1], teacher, (), 24)
    with pytest.raises(ConfigError, match=named):
        check_needs(terms, teacher, ("hidden", "full") if teacher else (), 24)


def shares(**sequences):
    """Teachers of these sequences each."""
    return JoinedLabels(
        {
            name: TeacherShare(TeacherLabels(None, {"of": name}), torch.ones(4), which)
            for name, which in sequences.items()
        }
    )


OF_TWO = StudentOutputs(torch.arange(18.0).reshape(3, 3, 2), {1: torch.arange(9.0).reshape(3, 3, 1)})
FOUR_ROWS = SupervisedRows(
    torch.tensor([0, 1, 4, 7]), torch.tensor([5, 6, 7, 8]), torch.tensor([1.0, 2.0, 3.0, 4.0]),
    np.array([0, 1, 1, 1]), np.array([0, 0, 1, 2]), torch.tensor([-1.0, -2.0, -3.0, -4.0]),
)  # fmt: skip


def test_a_term_is_given_the_teacher_that_it_names_and_its_sequences():
    term = Constant("x")
    term.teacher = "b"
    total([term], OF_TWO, shares(a=None, b=(0, 2)), FOUR_ROWS, 1.0, 3)
    outputs, labels, rows, normalizer, step = term.given
    assert labels.named == {"of": "b"} and (normalizer, step) == (1.0, 3)
    assert torch.equal(outputs.final_BLD, OF_TWO.final_BLD[[0, 2]])
    assert torch.equal(outputs.taps[1], OF_TWO.taps[1][[0, 2]])
    assert rows.index_N.tolist() == [0, 1, 4] and rows.labels_N.tolist() == [5, 6, 8]
    assert rows.weights_N.tolist() == [1, 2, 4] and rows.sampled_logp_N.tolist() == [-1, -2, -4]
    assert rows.sequence_N.tolist() == [0, 0, 1] and rows.position_N.tolist() == [0, 1, 1]
    assert torch.equal(rows.of(outputs.final_BLD), FOUR_ROWS.of(OF_TWO.final_BLD)[[0, 1, 3]])


def test_a_term_of_no_teacher_is_given_the_first_and_everything_that_it_was_asked_about():
    term = Constant("x")
    total([term], OF_TWO, shares(a=None, b=(1,)), FOUR_ROWS, 1.0, 0)
    outputs, labels, rows, *_ = term.given
    assert outputs is OF_TWO and rows is FOUR_ROWS and labels.named == {"of": "a"}


class Layers(PairedTerm):
    """A term on layers whose loss is the student's state itself."""

    name, teacher = "hidden", "b"
    _pairs, _weight = (LayerPair(1, 4),), FeatureWeight(1.0)

    def needs(self):
        return Needs(taps=(1,))

    def _pair(self, pair, outputs, labels, rows):
        return of_rows(rows.of(outputs.taps[1])[:, 0], rows.weights_N)


def test_a_term_on_layers_whose_teacher_has_not_answered_is_zero_under_the_same_names():
    answered = total([Layers()], OF_TWO, shares(a=None, b=(1, 2)), FOUR_ROWS, 2.0, 0)
    assert float(answered.loss) == (3 * 4 + 4 * 7) / 2.0
    alone = StudentOutputs(OF_TWO.final_BLD.clone().requires_grad_(), OF_TWO.taps)
    silent = total([Layers()], alone, shares(a=None), FOUR_ROWS, 2.0, 0)
    assert float(silent.loss.detach()) == 0 and silent.loss.requires_grad
    assert list(silent.parts) == list(answered.parts) == ["hidden_loss", "hidden_loss_1"]
    assert all(float(mean.over) == 0 for mean in silent.parts.values())


def test_a_term_that_joins_teachers_is_given_all_and_its_evidence_is_laid_flat():
    class Joins(Constant):
        def joined(self, outputs, labels, rows, normalizer, step):
            self.given = labels
            return TermResult(self.value, {}, ("one", "two"))

    term, labels = Joins("x"), shares(a=None, b=(1,))
    assert total([term], OF_TWO, labels, FOUR_ROWS, 1.0, 0).evidence == ("one", "two")
    assert term.given is labels
