"""Processes that keep labels as fast as they can; run as a script by test_label_store_processes.py.

kill FOLDER KILLS WRITERS   that many writers at a time; a random one is killed and another started, KILLS times over
fill FOLDER WRITERS MAX_BYTES COUNT   each writer keeps COUNT sequences of its own under a budget; prints the peak of the folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from teacher_wire.labels.blob import LabelEntry
from teacher_wire.labels.store import LabelStore
from tests.teacher_wire.labels.labels_of import SPECS, entry_of, key_of

QUESTIONS = 40


def answer(question: int, writer: int, tokens: int = 1000) -> LabelEntry:
    """The labels of question number `question`; every bit of them says who wrote them."""
    return signed(entry_of(SPECS["hidden"], seed=question, tokens=tokens), writer)


def signed(entry: LabelEntry, writer: int) -> LabelEntry:
    """The same with every bit of the labels the writer's."""
    tensors = {
        name: dataclasses.replace(tensor, array=np.full_like(tensor.array, writer))
        for name, tensor in entry.signals.tensors.items()
    }
    return dataclasses.replace(entry, signals=dataclasses.replace(entry.signals, tensors=tensors))


def _start(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def kill(folder: Path, kills: int, writers: int) -> None:
    """See module."""
    numbers = iter(range(1, 1 << 30))
    random.seed(0)
    asked = [
        answer(question, 0) for question in range(QUESTIONS)
    ]  # here, so that a writer writes from its first moment

    def work(writer: int) -> None:
        store, turn = LabelStore(folder), random.Random(writer)
        while True:
            entry = signed(turn.choice(asked), writer)
            key = key_of(entry)
            if store.get(key) is None:
                store.keep(key, entry.fingerprint, entry.spec, entry.sequence, entry.signals)
            elif turn.random() < 0.05:  # so that there is always something to write
                store.prune(max_bytes=0)
            if store.stats.damaged:
                folder.with_suffix(".damaged").touch()

    def start() -> int:
        writer = next(numbers)
        return _start(lambda: work(writer))

    alive = [start() for _ in range(writers)]
    for _ in range(kills):
        time.sleep(random.uniform(0.02, 0.12))
        victim = alive.pop(random.randrange(len(alive)))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        alive.append(start())
    for victim in alive:
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)


def _sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat().st_size


def fill(folder: Path, writers: int, max_bytes: int, count: int) -> None:
    """See module."""

    def work(writer: int) -> None:
        store = LabelStore(folder, max_bytes=max_bytes)
        for question in range(count):
            entry = answer(1000 * writer + question, writer, tokens=40)
            store.keep(key_of(entry), entry.fingerprint, entry.spec, entry.sequence, entry.signals)

    alive = {_start(lambda writer=number: work(writer)) for number in range(1, writers + 1)}
    peak, before = 0, set[Path]()
    while alive:
        done, _ = os.waitpid(-1, os.WNOHANG)
        alive.discard(done)
        # Listing takes time in which files come and go. What two listings in a row have both seen was there between them.
        sizes = dict(_sizes(folder))
        peak = max(peak, sum(size for path, size in sizes.items() if path in before))
        before = set(sizes)
    print(peak)


if __name__ == "__main__":
    command, folder, *numbers = sys.argv[1:]
    {"kill": kill, "fill": fill}[command](Path(folder), *map(int, numbers))
