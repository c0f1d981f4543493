"""Several processes on one folder of labels, kills among them, and disks that refuse."""

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from teacher_wire.labels.store import LabelStore
from tests.teacher_wire.labels.label_writers import QUESTIONS, answer
from tests.teacher_wire.labels.labels_of import SPECS, assert_same_labels, entry_of, key_of

ROOT = Path(__file__).parents[3]


def run_writers(*arguments):
    command = [sys.executable, "-m", "tests.teacher_wire.labels.label_writers", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fifty_killed_writers_leave_no_bad_labels_and_no_stuck_lock(tmp_path):
    folder = tmp_path / "labels"
    run_writers("kill", folder, 50, 4)
    assert not folder.with_suffix(".damaged").exists(), "no torn file got its name, even for a moment"
    entries = list(folder.glob("*/*.safetensors"))
    leftovers = list(folder.glob("*/.*"))
    assert entries, "some were written"
    store = LabelStore(folder)
    assert store.verify()[1].sequences == 0
    assert sum(shelf.sequences for shelf in store.scan()[0]) == len(entries), "temporary files are no entries"
    for question in range(QUESTIONS):
        entry = answer(question, 0)
        found = store.get(key_of(entry))
        if found is not None:
            writers = {float(value) for t in found.tensors.values() for value in np.unique(t.array)}
            assert len(writers) == 1 and writers != {0.0}, "one writer's labels, whole"
            continue
        kept = store.keep(key_of(entry), entry.fingerprint, entry.spec, entry.sequence, entry.signals)
        assert_same_labels(kept, entry.signals)
    assert store.stats.damaged == 0 and store.writable
    assert len(list(folder.glob("*/*.safetensors"))) == QUESTIONS
    assert all(path.name.endswith(".partial") for path in leftovers)


def test_two_writers_stay_under_the_budget(tmp_path):
    budget = 40 * 6000  # some forty of the four hundred sequences
    peak = int(run_writers("fill", tmp_path / "labels", 2, budget, 200))
    assert budget / 2 < peak <= budget
    assert LabelStore(tmp_path / "labels").verify()[1].sequences == 0


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of its own."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"mounting is refused here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        for thread in threading.enumerate():
            if (
                thread.name == "label-budget"
            ):  # a look at the folder that a writer has started aside keeps the disk busy
                thread.join(timeout=30)
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_warning_and_no_failure(tmp_path):
    told = []
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = LabelStore(disk / "labels", on_trouble=told.append)
        entries = [entry_of(SPECS["hidden"], seed=seed, tokens=200) for seed in range(30)]
        for entry in entries:
            kept = store.keep(key_of(entry), entry.fingerprint, entry.spec, entry.sequence, entry.signals)
            assert_same_labels(kept, entry.signals)
        assert len(told) == 1 and str(disk) in told[0] and "No space left" in told[0]
        assert not store.writable and 0 < store.stats.written < 30
        assert store.stats.written + store.stats.unwritten == 30
        found = [store.get(key_of(entry)) for entry in entries]
        assert sum(labels is not None for labels in found) == store.stats.written, "what is there is read"
        assert not list(disk.rglob("*.partial")), "half a file does not fill what is left"
        assert store.verify()[1].sequences == 0


def test_a_read_only_disk_is_read(tmp_path):
    told = []
    with small_disk(tmp_path / "disk", "1m") as disk:
        first, second = (entry_of(SPECS["top_k"], seed=seed) for seed in range(2))
        writing = LabelStore(disk / "labels")
        writing.keep(key_of(first), first.fingerprint, first.spec, first.sequence, first.signals)
        spoilt = entry_of(SPECS["top_k"], seed=2)
        writing.keep(key_of(spoilt), spoilt.fingerprint, spoilt.spec, spoilt.sequence, spoilt.signals)
        file = disk / "labels" / key_of(spoilt)[:2] / f"{key_of(spoilt)}.safetensors"
        file.write_bytes(b"torn")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        store = LabelStore(disk / "labels", max_bytes=1 << 20, on_trouble=told.append)
        assert_same_labels(store.get(key_of(first)), first.signals)
        assert store.get(key_of(spoilt)) is None and store.stats.damaged == 1, "it cannot be deleted, and is no hit"
        for entry in (second, second):
            kept = store.keep(key_of(entry), entry.fingerprint, entry.spec, entry.sequence, entry.signals)
            assert_same_labels(kept, entry.signals)
        assert len(told) == 1 and "Read-only file system" in told[0]
