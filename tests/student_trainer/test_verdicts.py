"""Verdicts that come late: nothing is learned meanwhile, and the right sample is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from student_trainer.feed.source import LabelRequest
from student_trainer.losses.integrity import BFLOAT16, Integrity, TeacherHeadMismatch
from student_trainer.verdicts import ON_THEIR_WAY, Verdicts
from teacher_wire.messages import TokenBatch


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
    found = evidence(off)
    try:
        found.check()
        raised = 0.0
    except TeacherHeadMismatch:
        raised = 1.0
    assert float(found.refused) == raised
    assert found.arrived, "on a CPU nothing is under way"


def test_on_the_host_bad_labels_are_refused_at_once():
    verdicts = Verdicts(torch.device("cpu"))
    verdicts.add(evidence(0.0), request("good"))
    with pytest.raises(TeacherHeadMismatch) as refused:
        verdicts.add(evidence(20.0), request("bad"))
    assert refused.value.__notes__ == ["sample bad:2"] and float(verdicts.refused) == 1


def late_verdicts() -> Verdicts:
    verdicts = Verdicts(torch.device("cpu"))
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
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    verdicts = late_verdicts()
    optimizer.found_inf = verdicts.refused
    seen = []
    for off in (0.0, 20.0, 0.0):
        verdicts.add(evidence(off, Late), request("x"))
        weight.grad = torch.ones(5)
        optimizer.step()
        seen.append(weight.detach().clone())
    assert not torch.equal(seen[0], torch.zeros(5)) and int(optimizer.state[weight]["step"]) == 1
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
