"""Who takes the word of a signal, and what is left behind: no lock, no handler."""

import os
import signal
import threading

import pytest

from student_trainer.interruption import interrupted_in_order, patiently, told_first
from student_trainer.labels import event_loop


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    return request.param


def test_nobody_takes_it(number):
    with pytest.raises(KeyboardInterrupt), interrupted_in_order(lambda: pytest.fail("told")):
        interrupt(number)


def test_who_takes_it_is_waited_for_and_it_is_told(number):
    told = threading.Event()
    with interrupted_in_order(told.set), told_first(lambda: True):
        interrupt(number)
        assert told.wait(30)


def test_all_are_told_though_the_first_takes_it():
    words = []
    with interrupted_in_order(lambda: None), told_first(lambda: True), told_first(lambda: words.append("told")):
        interrupt()
    assert words == ["told"]


def test_signals_are_as_before_when_the_command_is_over(number):
    before = signal.getsignal(number)
    with interrupted_in_order(lambda: None):
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before


def test_a_wait_ends_between_two_slices_and_leaves_its_lock():
    """Wherever in a slice the signal comes: the lock is taken and given back by nobody but the wait."""
    changed, slices = threading.Condition(), []

    def is_over(slice_s):
        slices.append(slice_s)
        if len(slices) == 3:
            interrupt()
            slices.append("whole")
        return changed.wait(slice_s / 100)

    with pytest.raises(KeyboardInterrupt), interrupted_in_order(lambda: None), changed:
        patiently(is_over)
    assert slices[-1] == "whole" and len(slices) == 4
    free = []
    thread = threading.Thread(target=lambda: free.append(changed.acquire(timeout=30)))
    thread.start()
    thread.join()
    assert free == [True]


def test_a_word_in_the_last_slice_is_not_lost():
    with pytest.raises(KeyboardInterrupt), interrupted_in_order(lambda: None):
        patiently(lambda _: interrupt() or True)
    with interrupted_in_order(lambda: None):
        patiently(lambda _: True)


def test_a_thread_waits_on():
    """It is the main thread's business; what it waits for is given or taken back by the end of the run."""
    begun, over, ended = threading.Event(), threading.Event(), []

    def wait():
        begun.set()
        patiently(over.wait)
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    begun.wait(30)
    with pytest.raises(KeyboardInterrupt), interrupted_in_order(lambda: None):
        patiently(lambda slice_s: interrupt() or not thread.is_alive())
    thread.join(0.5)  # slices of its own go by
    assert not ended and thread.is_alive()
    over.set()
    thread.join(30)
    assert ended


def test_the_event_loop_goes_on_after_work_that_was_interrupted():
    async def work(value):
        if value:
            interrupt()
            import asyncio

            await asyncio.sleep(3600)
        return "answered"

    with pytest.raises(KeyboardInterrupt), interrupted_in_order(lambda: None):
        event_loop.run(work(1))
    assert event_loop.run(work(0)) == "answered"
