"""How a refused student slows down, and comes back."""

import math

from teacher_wire.transport.pacing import Pace


def test_nothing_holds_back_a_student_that_was_never_refused():
    pace = Pace()
    for i in range(1000):
        assert pace.wait_s(0.0) == 0
        pace.sent(str(i))


def test_a_refusal_halves_what_is_open_and_every_answer_adds_one():
    pace = Pace()
    for i in range(8):
        pace.sent(str(i))
    for i in range(4):
        pace.refused(str(i), now_s=1.0, delay_s=0.5)  # one burst of refusals is one refusal
    assert pace.allowed == 3  # of the seven that were open at the first
    assert pace.wait_s(1.0) == math.inf
    for i in range(4, 8):
        pace.answered(str(i))
    assert pace.allowed == 7
    assert pace.wait_s(1.25) == 0.25
    assert pace.wait_s(1.5) == 0


def test_one_request_may_always_be_tried():
    pace = Pace()
    for now_s in range(0, 100, 10):
        pace.sent("a")
        pace.refused("a", float(now_s), 1.0)
        assert pace.wait_s(now_s + 1.0) == 0


def test_a_broken_stream_has_nothing_open():
    pace = Pace()
    for i in range(4):
        pace.sent(str(i))
    pace.refused("0", 0.0, 0.0)
    pace.lost()
    assert pace.wait_s(0.0) == 0
