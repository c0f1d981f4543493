"""The stopwatch reads marks that the device may not have reached."""

from typing import ClassVar

import torch

from teacher_server.backends.stopwatch import Stopwatch


class Event:
    """As torch's: a time can be read only of events that the device has reached, and it reaches them in their order."""

    made: ClassVar[list["Event"]] = []
    reached = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.number = len(Event.made)
        Event.made.append(self)

    def record(self):
        pass

    def synchronize(self):
        Event.reached = max(Event.reached, self.number + 1)

    def elapsed_time(self, end):
        if Event.reached <= max(self.number, end.number):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 2.0 * (end.number - self.number)  # milliseconds


def test_times_are_read_behind_the_last_mark(monkeypatch):
    """A request's answer is copied to the host before the mark behind its reduction: reading the time then failed the request."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for name in ("forward", "reduce", "forward"):
        watch.mark(name)
    assert watch.us() == {"forward": 4000, "reduce": 2000}


def test_on_a_cpu_the_clock_is_the_host_s():
    watch = Stopwatch(torch.device("cpu"))
    watch.mark("forward")
    assert set(watch.us()) == {"forward"}
