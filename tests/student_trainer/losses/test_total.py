"""The sum of terms: order, names, evidence, and what is refused before anything is computed."""

import pytest
import torch

from student_trainer.errors import ConfigError
from student_trainer.losses.term import Mean, Needs, StudentOutputs, SupervisedRows, TermResult
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
