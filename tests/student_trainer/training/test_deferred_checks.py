"""DeferredChecks that come late: nothing is learned meanwhile, and the right sample is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from student_trainer.errors import NonFiniteError, RunError
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.integrity import BFLOAT16, Integrity, TeacherHeadMismatch
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.checkpoints.broken_off import _name_bad_labels
from student_trainer.training.deferred_checks import ON_THEIR_WAY, DeferredChecks
from teacher_wire.core.batch import TokenBatch


class Late(Integrity):
    """Evidence that has not arrived, as a GPU's has not."""

    arrived = False


def evidence(off: float, kind: type[Integrity] = Integrity, rows: int = 6) -> Integrity:
    """Rows that agree but for the fifth, by so many tolerances."""
    seen = torch.full((rows,), -1.0, dtype=torch.float64)
    seen[4] += off * (BFLOAT16.logp_abs + BFLOAT16.logp_rel * 32)
    lse, served = torch.full_like(seen, 32.0), torch.full_like(seen, -1.0)
    return kind(torch.arange(rows), lse, lse.clone(), served, seen)


def request(name: str) -> LabelRequest:
    return LabelRequest(TokenBatch.pack([[1, 2, 3, 4], [5, 6, 7, 8]]), (f"{name}:1", f"{name}:2"))


@pytest.mark.parametrize("off", [0.0, 0.9, 5.0, 11.0, np.nan, np.inf])
def test_refused_says_on_the_device_what_check_says_on_the_host(off):
    found, verdicts = evidence(off), late_verdicts()
    verdicts.add(evidence(off, Late), request("x"))
    try:
        found.check()
        raised = 0.0
    except TeacherHeadMismatch:
        raised = 1.0
    assert float(verdicts.refused) == raised
    assert found.arrived, "on a CPU nothing is under way"


@pytest.mark.parametrize("late", [False, True])
def test_a_row_forgiven_in_every_call_is_not_forgiven_over_the_run(late):
    """One row a call, each two tolerances off: call by call it would always pass."""
    verdicts = late_verdicts() if late else DeferredChecks(torch.device("cpu"))
    kind = Late if late else Integrity
    taken = []

    def add_rows():
        for number in range(10):
            one = torch.ones(1, dtype=torch.float64)
            off = -1 + 2 * (BFLOAT16.logp_abs + BFLOAT16.logp_rel * 32)
            batch = LabelRequest(TokenBatch.pack([[1, 2]]), (f"call {number}",))
            verdicts.add(kind(torch.arange(1), one * 32, one * 32, -one, one * off), batch)
            taken.append(float(verdicts.refused) == 0)

    with pytest.raises(TeacherHeadMismatch, match=r"1 of 1 teacher rows \(and 1 of 1 before\)") as refused:
        add_rows()
    assert sum(taken) == 1 and refused.value.__notes__ == ["sample call 1"]


@pytest.mark.parametrize("late", [False, True])
def test_a_teacher_is_judged_by_its_own_rows(late):
    """Of few rows of one of several teachers too many are off; among the many right ones of another they would be forgiven."""
    verdicts = late_verdicts() if late else DeferredChecks(torch.device("cpu"))
    kind = Late if late else Integrity
    for _ in range(50):
        verdicts.add(replace(evidence(0.0, kind, rows=400), teacher="big"), request("x"))
    verdicts.add(replace(evidence(2.0, kind), teacher="small"), request("y"))
    assert float(verdicts.refused) == 0
    with pytest.raises(TeacherHeadMismatch, match=r"1 of 6 'small' teacher rows \(and 1 of 6 before\)"):
        _add_again(verdicts, replace(evidence(2.0, kind), teacher="small"))
    assert float(verdicts.refused) == 1


def _add_again(verdicts: DeferredChecks, found: Integrity) -> None:
    for _ in range(1 + ON_THEIR_WAY):  # until the first of them is looked at
        verdicts.add(found, request("y"))


def test_many_calls_of_right_rows_with_one_off_in_a_thousand_are_no_fault():
    verdicts = DeferredChecks(torch.device("cpu"))
    for number in range(3_000):
        verdicts.add(evidence(2.0 if number % 170 == 100 else 0.0), request("x"))
    assert float(verdicts.refused) == 0


WINDOW = [("a:1", "a:2"), ("b:1",)]


def window(verdicts, step, *losses, norm=1.0):
    return float(verdicts.end_window(step, [torch.tensor(x) for x in losses], torch.tensor(norm), WINDOW))


@pytest.mark.parametrize(
    ("losses", "norm", "said", "not_said"),
    [
        ((1.0, np.nan), 1.0, "the loss is not finite, with the samples b:1;", "a:1"),
        ((np.inf, 1.0), np.nan, "the loss is not finite, with the samples a:1, a:2;", "b:1"),
        ((1.0, 1.0), np.inf, "the norm of the gradients is not finite, with the samples a:1, a:2, b:1;", "the loss"),
    ],
)
def test_numbers_that_are_none_end_the_run_with_step_and_samples(losses, norm, said, not_said):
    verdicts = DeferredChecks(torch.device("cpu"), explain=lambda: "; try less")
    assert window(verdicts, 6, 1.0, 2.0) == 0 == float(verdicts.withheld)
    with pytest.raises(NonFiniteError) as refused:
        window(verdicts, 7, *losses, norm=norm)
    assert "step 7: " + said in str(refused.value) and str(refused.value).endswith("; try less")
    assert not_said not in str(refused.value) and refused.value.exit_code == 1 == float(verdicts.withheld)


def late_windows(**settings):
    """As on a GPU: what was decided is on its way when the host goes on."""
    verdicts = DeferredChecks(torch.device("cpu"), **settings)
    verdicts._ahead = ON_THEIR_WAY
    return verdicts


@pytest.fixture
def under_way(monkeypatch):
    monkeypatch.setattr("student_trainer.training.deferred_checks._Window.is_here", False)


def test_steps_after_one_that_must_not_be_taken_are_not_taken_either_though_nobody_knows_yet(under_way):
    verdicts = late_windows()
    withheld = []
    for step, loss in ((1, 1.0), (2, np.nan), (3, 1.0)):
        window(verdicts, step, loss, 1.0)
        withheld.append(float(verdicts.withheld))
    assert withheld == [0, 1, 1]
    with pytest.raises(NonFiniteError, match="step 2"):
        window(verdicts, 4, 1.0, 1.0)


def test_skipping_leaves_out_that_step_alone_and_counts(under_way):
    verdicts = late_windows(skip=True, max_skipped=2)
    withheld = []
    for step, loss in enumerate((1.0, np.nan, 1.0, np.inf, np.nan, 1.0), 1):
        window(verdicts, step, loss, 1.0)
        withheld.append(float(verdicts.withheld))
    assert withheld == [0, 1, 0, 1, 1, 0]
    verdicts.settle()
    assert verdicts.take_skipped() == 3 and verdicts.take_skipped() == 0 == verdicts.in_a_row
    for step in (7, 8, 9):
        window(verdicts, step, np.nan, 1.0)
    with pytest.raises(NonFiniteError, match=r"step 3 in a row \(train\.max_skipped=2\)"):
        verdicts.settle()


def test_bad_labels_are_named_before_the_numbers_that_they_made(under_way):
    verdicts = late_windows()
    verdicts.add(evidence(20.0, Late), request("bad"))
    window(verdicts, 1, np.nan, 1.0)
    with pytest.raises(TeacherHeadMismatch):
        verdicts._judge(verdicts._windows.popleft())


def test_on_the_host_bad_labels_are_refused_at_once():
    verdicts = DeferredChecks(torch.device("cpu"))
    verdicts.add(evidence(0.0), request("good"))
    with pytest.raises(TeacherHeadMismatch) as refused:
        verdicts.add(evidence(20.0), request("bad"))
    assert refused.value.__notes__ == ["sample bad:2"] and float(verdicts.refused) == 1


def late_verdicts() -> DeferredChecks:
    verdicts = DeferredChecks(torch.device("cpu"))
    verdicts._ahead = ON_THEIR_WAY
    return verdicts


def test_late_verdicts_are_waited_for_after_some_micro_batches_and_name_the_first_bad_one():
    verdicts = late_verdicts()
    verdicts.add(evidence(0.0, Late), request("first"))
    verdicts.add(evidence(20.0, Late), request("second"))
    assert float(verdicts.refused) == 1, "though nobody knows yet"
    verdicts.add(evidence(0.0, Late), request("third"))
    with pytest.raises(TeacherHeadMismatch) as refused:
        verdicts.add(evidence(20.0, Late), request("fourth"))
    assert refused.value.__notes__ == ["sample second:2"]
    assert float(verdicts.refused) == 1, "for good"


def test_settle_waits_for_all():
    verdicts = late_verdicts()
    verdicts.add(evidence(20.0, Late), request("a"))
    with pytest.raises(TeacherHeadMismatch) as refused:
        verdicts.settle()
    assert refused.value.__notes__ == ["sample a:2"]
    verdicts.settle()  # nothing is left


def test_an_optimizer_that_is_given_refused_learns_nothing_from_then_on():
    """torch's fused AdamW passes over a step by `found_inf`, without the host having to know."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5))
    start = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    verdicts = late_verdicts()
    optimizer.found_inf = verdicts.refused
    seen = []
    for off in (0.0, 20.0, 0.0):
        verdicts.add(evidence(off, Late), request("x"))
        weight.grad = torch.ones(5)
        optimizer.step()
        seen.append(weight.detach().clone())
    assert not torch.equal(seen[0], start) and int(optimizer.state[weight]["step"]) == 1
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


def test_a_checkpoint_of_another_machine_does_not_say_how_this_one_computes(tmp_path):
    """Written without fused kernels, read where they are, and where `found_inf` counts on them."""

    def optimizer_of(fused):
        weight = torch.nn.Parameter(torch.ones(5))
        return weight, torch.optim.AdamW([weight], lr=0.1, fused=fused)

    def step(weight, optimizer):
        weight.grad = torch.linspace(-1, 1, 5)
        optimizer.step()

    weight, optimizer = optimizer_of(None)
    step(weight, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    checkpoint.save_state(tmp_path, optimizer, scheduler)
    other, fused = optimizer_of(True)
    other.data.copy_(weight.data)
    checkpoint.load_state(tmp_path, fused, torch.optim.lr_scheduler.LambdaLR(fused, lambda step: 1.0))
    fused.found_inf = torch.zeros(())
    step(other, fused)
    step(weight, optimizer)
    torch.testing.assert_close(other, weight)
    fused.found_inf.fill_(1)
    before = other.detach().clone()
    step(other, fused)
    assert torch.equal(other, before)


class StoppedTrainer:
    """A trainer whose run has ended, with a verdict that nobody has read."""

    def __init__(self, verdicts):
        self._verdicts = verdicts
        self.closed = False

    def close(self):
        self.closed = True

    def settle(self):
        self._verdicts.settle()


def test_bad_labels_are_named_though_something_else_ended_the_run():
    verdicts = late_verdicts()
    verdicts.add(evidence(20.0, Late), request("bad"))
    trainer, ended = StoppedTrainer(verdicts), RunError("the disk is full")
    with pytest.raises(TeacherHeadMismatch) as refused:
        _name_bad_labels(ended, trainer, [])
    assert refused.value.__notes__ == ["sample bad:2"] and refused.value.__cause__ is ended and trainer.closed


def test_what_ended_a_run_without_bad_labels_is_left_as_it_is():
    verdicts = late_verdicts()
    verdicts.add(evidence(0.0, Late), request("good"))
    _name_bad_labels(RunError("the disk is full"), StoppedTrainer(verdicts), [])
