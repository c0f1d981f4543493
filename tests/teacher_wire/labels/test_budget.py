"""Nobody waits for a folder to be counted unless the budget could be broken meanwhile."""

import threading

import pytest

from teacher_wire.labels import budget as label_budget
from teacher_wire.labels.budget import Budget, files_of

KIB = 1024


def write(folder, number, size=KIB, used_s=1e9):
    shelf = folder / f"{number % 256:02x}"
    shelf.mkdir(parents=True, exist_ok=True)
    path = shelf / f"{number:064x}.safetensors"
    path.write_bytes(bytes(size))
    label_budget.os.utime(path, (used_s + number, used_s + number))
    return path


class Listing:
    """In place of `files_of`: waits until it is let go on, and counts how often it was called."""

    def __init__(self, monkeypatch):
        self.begun, self.let_on = threading.Event(), threading.Event()
        self.calls = 0
        monkeypatch.setattr(label_budget, "files_of", self)

    def __call__(self, folder):
        self.calls += 1
        self.begun.set()
        assert self.let_on.wait(20)
        yield from files_of(folder)


def looks_done():
    for thread in threading.enumerate():
        if thread.name == "label-budget":
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def evicted():
    return []


def test_the_first_look_keeps_nobody_waiting(tmp_path, monkeypatch, evicted):
    listing = Listing(monkeypatch)
    for number in range(5):
        write(tmp_path, number)
    budget = Budget(tmp_path, 1000 * KIB, evicted.append)
    budget.admit(KIB)
    assert listing.begun.wait(20)
    for _ in range(18):
        budget.admit(KIB)  # would hang here if it waited
    assert budget.used_bytes == 0, "not counted yet"
    listing.let_on.set()
    looks_done()
    assert listing.calls == 1
    assert budget.used_bytes == (5 + 18) * KIB, "what was found, and what was written meanwhile"


def test_who_has_written_a_fiftieth_unseen_waits_for_the_look(tmp_path, monkeypatch, evicted):
    listing = Listing(monkeypatch)
    for number in range(960):
        write(tmp_path, number)
    budget = Budget(tmp_path, 1000 * KIB, evicted.append)
    for _ in range(20):
        budget.admit(KIB)
    passed = threading.Event()
    waiting = threading.Thread(target=lambda: (budget.admit(KIB), passed.set()), daemon=True)
    waiting.start()
    assert not passed.wait(0.2)
    listing.let_on.set()
    assert passed.wait(20)
    looks_done()
    left = sum(file.size for file in files_of(tmp_path))
    assert left <= 900 * KIB < left + KIB * 25 and sum(evicted) == 960 * KIB - left
    assert min(int(file.key, 16) for file in files_of(tmp_path)) == len(evicted), "the longest unused went"


def test_what_would_break_the_budget_is_admitted_after_room_was_made(tmp_path, evicted):
    for number in range(94):
        write(tmp_path, number)
    budget = Budget(tmp_path, 100 * KIB, evicted.append)
    budget.look()
    assert not evicted, "a look alone deletes nothing"
    budget.admit(2 * KIB)
    assert sum(file.size for file in files_of(tmp_path)) <= 88 * KIB and sum(evicted) == 6 * KIB
    assert budget.used_bytes == 90 * KIB


def test_a_nearly_full_folder_is_cleared_aside_if_that_takes_long(tmp_path, monkeypatch, evicted):
    monkeypatch.setattr(label_budget, "_SHORT_LOOK_S", 0.0)
    for number in range(928):
        write(tmp_path, number)
    budget = Budget(tmp_path, 1000 * KIB, evicted.append)
    budget.look()
    listing = Listing(monkeypatch)
    for number in range(5):
        budget.admit(KIB)
        write(tmp_path, 928 + number)
    assert listing.begun.wait(20) and not evicted
    budget.admit(KIB)  # goes on meanwhile
    listing.let_on.set()
    looks_done()
    assert sum(evicted) >= 30 * KIB and sum(file.size for file in files_of(tmp_path)) <= 900 * KIB


def test_without_a_limit_nothing_is_counted(tmp_path, monkeypatch, evicted):
    listing = Listing(monkeypatch)
    budget = Budget(tmp_path, None, evicted.append)
    for _ in range(100):
        budget.admit(1 << 40)
    looks_done()
    assert listing.calls == 0 and budget.largest_bytes == float("inf")
