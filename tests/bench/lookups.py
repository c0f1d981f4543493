"""Look-ups of kept labels where much is kept and where little is: the label store on disk, and the edge's memory.

The aim is flat, within 10 % from 10^3 to 10^6. A row is one sequence of 8 tokens with one kept label row, top-64: on disk one file of one
block. Files are written as `LabelStore` writes them but for the temporary name, since a million through `keep` would take long; some of
each size are read back through `get`, compared, and kept again. All sizes lie side by side and take turns, round by round, so that busy
neighbours meet all alike. `first`: of keys never looked up before; `again`: of the same keys; both the least of some rounds of 300 keys in
random order, CPU time of the thread. All is in the page cache; what a cold disk takes is the disk's. `keep` is by a new store with a budget,
median and longest of its first 200: the longest tells whether one waits for the folder to be counted, which takes `count`.
    OMP_NUM_THREADS=1 python -m tests.bench.lookups [--json] [--rows 1000 10000 100000 1000000] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teacher_server.edge.admission import Admission
from teacher_server.edge.label_sharing import LabelSharing
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.core.tensor import Tensor, float32
from teacher_wire.labels.blob import LabelEntry, encode_labels, label_keys
from teacher_wire.labels.store import LabelStore
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from tests.bench.table import show

KEPT = 64
SPEC = spec_of("top_k", 152_064, k=KEPT)
FINGERPRINT = "f" * 64
LENGTH = 8
SAMPLE, FRESH, AGAIN = 300, 3, 5  # keys of a round, rounds of fresh keys, and how often all of them are repeated
BUDGET_BYTES = 1 << 40


@dataclass(frozen=True)
class Sequence:
    """One sequence and its labels under their key."""

    key: str
    batch: TokenBatch
    signals: TeacherSignals


def sequences(start: int, stop: int) -> Iterator[Sequence]:
    """Sequences number start to stop, all different."""
    wanted_T = np.zeros(LENGTH, np.bool_)
    wanted_T[-2] = True
    cu_B1 = np.array([0, LENGTH], np.int32)
    for number in range(start, stop):
        ids_T = np.full(LENGTH, number & 0xFFFF, np.int32)
        ids_T[0] = number >> 16
        batch = TokenBatch(ids_T, cu_B1, wanted_T)
        yield Sequence(label_keys(FINGERPRINT, SPEC, batch)[0], batch, labels(number))


def labels(number: int) -> TeacherSignals:
    """One label row that tells its number."""
    ids_NK = np.arange(number, number + KEPT, dtype=np.uint32)[None]
    logits_NK = Tensor("bfloat16", np.full((1, KEPT), 0x3F80, np.uint16))
    one = float32(np.zeros(1))
    return TeacherSignals(
        {
            "lse_N": one,
            "label_logp_N": one,
            "topk_ids_NK": Tensor("uint24", ids_NK),
            "topk_logits_NK": logits_NK,
            "tail_logp_N": one,
        }
    )


def fill(folder: Path, size: int) -> list[str]:
    """Puts the first `size` sequences into a store's folder; their keys."""
    for shelf in range(256):
        (folder / f"{shelf:02x}").mkdir(parents=True)
    keys = []
    for sequence in sequences(0, size):
        data = encode_labels(sequence.key, LabelEntry(FINGERPRINT, SPEC, sequence.batch, sequence.signals))
        with open(f"{folder}/{sequence.key[:2]}/{sequence.key}.safetensors", "xb") as file:
            file.write(data)
        keys.append(sequence.key)
    return keys


def check(store: LabelStore, numbers: list[int]) -> None:
    """Some of what `fill` wrote, read through the front door; and keeping one of them again finds it there."""
    for number in numbers:
        (sequence,) = sequences(number, number + 1)
        found = store.get(sequence.key)
        assert found is not None and found["topk_ids_NK"].array[0, 0] == number
        before = store.stats.overtaken
        store.keep(sequence.key, FINGERPRINT, SPEC, sequence.batch, sequence.signals)
        assert store.stats.overtaken == before + 1, "the store did not find its own file"


def in_turns(look_ups: list[list[Callable[[], object]]]) -> list[dict[str, object]]:
    """CPU microseconds of one look-up for each size, and their ratio to the first size's.

    Args:
        look_ups: for each size as many functions, each of which looks up SAMPLE keys of its own.
    """
    first = [[_look_up_us(fresh) for fresh in turn] for turn in zip(*look_ups, strict=True)]
    again = [[_look_up_us(fresh) for fresh in turn] for _ in range(AGAIN) for turn in zip(*look_ups, strict=True)]
    lines: list[dict[str, object]] = [{} for _ in look_ups]
    for name, turns in (("first", first), ("again", again)):
        least = [min(column) for column in zip(*turns, strict=True)]
        for line, took_us in zip(lines, least, strict=True):
            line |= {f"{name} us": took_us, f"x {name}": took_us / least[0]}
    return lines


def _look_up_us(every: Callable[[], object]) -> float:
    began_s = time.thread_time()
    every()
    return (time.thread_time() - began_s) / SAMPLE * 1e6


def of_keys(get: Callable[[str], object], keys: list[str]) -> list[Callable[[], object]]:
    """Functions that look up all `keys` between them."""
    return [lambda part=keys[place::FRESH]: [get(key) for key in part] for place in range(FRESH)]  # type: ignore[misc]


def absent(generator: random.Random) -> list[str]:
    """Keys that nothing is kept under."""
    return [generator.randbytes(32).hex() for _ in range(FRESH * SAMPLE)]


def on_disk(folder: Path, rows: list[int], keys: list[str]) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Tables of the store; `keys` becomes those of the largest."""
    generator = random.Random(0)
    stores = []
    for size in rows:
        keys[:] = fill(folder / str(size), size)
        stores.append(LabelStore(folder / str(size)))
    os.sync()  # what is written back meanwhile would be in the figures
    hits = [generator.sample(keys[:size], FRESH * SAMPLE) for size in rows]
    yield "present keys", in_turns([of_keys(store.get, of) for store, of in zip(stores, hits, strict=True)])
    yield "absent keys", in_turns([of_keys(store.get, absent(generator)) for store in stores])
    for store, size in zip(stores, rows, strict=True):
        assert store.stats.damaged == 0 and store.stats.hits == store.stats.misses > 0
        check(store, generator.sample(range(size), 50))
    yield "keeping", [keeping(store.folder) for store in stores]


def keeping(folder: Path) -> dict[str, object]:
    """Milliseconds of the first calls of a new store with a budget, and seconds that counting its folder takes."""
    store = LabelStore(folder, BUDGET_BYTES)
    kept_ms = []
    for one in sequences(10**8, 10**8 + 200):
        began_s = time.perf_counter()
        store.keep(one.key, FINGERPRINT, SPEC, one.batch, one.signals)
        kept_ms.append((time.perf_counter() - began_s) * 1e3)
    for thread in threading.enumerate():
        if thread.name == "label-budget":
            thread.join()
    began_s = time.perf_counter()
    store.look()
    count_s = time.perf_counter() - began_s
    return {"keep ms": sorted(kept_ms)[len(kept_ms) // 2], "longest ms": max(kept_ms), "count s": count_s}


def in_memory(rows: list[int], keys: list[str]) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Tables of the edge's memory: a whole request of one sequence that is answered from it, and the dictionary alone.

    All keys hold the same labels: a look-up does not touch them.
    """
    generator = random.Random(0)
    loop = asyncio.new_event_loop()
    one = labels(0)
    edges = []
    for size in rows:
        edge = LabelSharing(FakeTeacher(), Admission(), memory_bytes=1 << 50)
        for key in keys[:size]:
            edge._memory.put(key, one)
        edges.append(edge)

    async def ask(edge: LabelSharing, calls: list[ScoreCall]) -> None:
        for call in calls:
            await edge.score(call)

    def requests(edge: LabelSharing, size: int) -> list[Callable[[], object]]:
        numbers = generator.sample(range(size), FRESH * SAMPLE)
        batches = [sequence.batch for number in numbers for sequence in sequences(number, number + 1)]
        calls = [ScoreCall("r", "", FINGERPRINT, SPEC, batch) for batch in batches]
        parts = [calls[place::FRESH] for place in range(FRESH)]
        return [lambda part=part: loop.run_until_complete(ask(edge, part)) for part in parts]  # type: ignore[misc]

    yield "requests answered", in_turns([requests(edge, size) for edge, size in zip(edges, rows, strict=True)])
    assert all(edge.stats.computed == 0 < edge.stats.memory_hits for edge in edges)
    hits = [generator.sample(keys[:size], FRESH * SAMPLE) for size in rows]
    yield (
        "the dictionary, present keys",
        in_turns([of_keys(edge._memory.get, of) for edge, of in zip(edges, hits, strict=True)]),
    )
    yield (
        "the dictionary, absent keys",
        in_turns([of_keys(edge._memory.get, absent(generator)) for edge in edges]),
    )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object a table")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp"), help="where the files go, 4 KB each, for the while"
    )
    options = parser.parse_args()
    rows = sorted(options.rows)
    keys: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="lookups-", dir=options.folder))

    def tell(place: str, tables: Iterator[tuple[str, list[dict[str, object]]]]) -> None:
        for what, lines in tables:
            shown = [{"rows": size, **line} for size, line in zip(rows, lines, strict=True)]
            show(f"{place}: {what}", shown, as_json=options.json)

    try:
        tell("label store on disk", on_disk(folder, rows, keys))
    finally:
        shutil.rmtree(folder)
    tell("the edge's memory", in_memory(rows, keys))


if __name__ == "__main__":
    main()
