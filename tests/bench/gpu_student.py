"""A student whose labels come over gRPC while it trains, beside labels in memory, no teacher, and a teacher in the process.

Shapes, LoRA and step are those of `student_memory` (1.5B student, 2 x 2048 tokens); the teacher is a random 7B behind the
product's edge and engine in a process of its own, on the first GPU; the student is on the last one. With one GPU both share it,
and a second pass over the same micro-batches, whose labels the edge has kept, shows what their arrival alone costs.
    python -m tests.bench.gpu_student [--json]

Columns: milliseconds a step over a run of steps on end, and its ratio to the reference named; share of the time in which the
step waited for labels; most memory of the student's process in use.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from student_trainer.feed import background
from student_trainer.feed.desk import LabelDesk
from student_trainer.feed.prefetch import LabelFeed
from student_trainer.feed.source import LabelRequest
from student_trainer.objective import head_on
from teacher_wire.client import TeacherClient
from teacher_wire.messages import SignalSpec, TeacherHead, TeacherInfo, TeacherSignals
from tests.bench.gpu_client import fresh_batch
from tests.bench.student_memory import FKL, GIB, LENGTH, SEQUENCES, SFT, Bench, Case, K, V
from tests.bench.table import show

STEPS, SKIPPED, ROUNDS = 20, 6, 2  # of a run; the first are served by what was asked ahead before the clock started
AHEAD = 4
SPECS = {"hidden": SignalSpec("hidden", V), "top_k": SignalSpec("top_k", V, k=K)}
CASES = {
    "SFT, transformers": Case("SFT, transformers", fast=True),
    "SFT, ours": Case("SFT, ours", SFT, fast=True),
    "hidden": Case("hidden", FKL, "hidden", fast=True, late=True),
    "top_k": Case("top_k", FKL, "top_k", fast=True, late=True),
}


@dataclass(frozen=True)
class Labelled:
    """A micro-batch and its labels."""

    request: LabelRequest
    signals: TeacherSignals


class Remote:
    """The teacher's process and what the student needs of it once."""

    def __init__(self, gpu: int) -> None:
        from tests.bench.gpu_client import free_port

        self.address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "tests.bench.gpu_student", "--serve", self.address.rpartition(":")[2]]
        self._process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)})
        self.info, self.head = background.run(self._meet())

    async def _meet(self) -> tuple[TeacherInfo, TeacherHead]:
        async with TeacherClient(self.address) as client:
            info = await client.teacher(wait_for_s=180)
            return info, await client.head(info)

    def feed(self, transport: str, count: int, seed: int) -> tuple[LabelFeed, Callable[[int], LabelRequest]]:
        """Labels of `count` fresh micro-batches, asked ahead as a run does."""

        def request(number: int) -> LabelRequest:
            batch = fresh_batch(np.random.default_rng((seed, number)), "uniform", SEQUENCES * LENGTH, V)
            return LabelRequest(batch, tuple(f"{number}.{b}" for b in range(batch.sequences)))

        desk = LabelDesk(lambda: TeacherClient(self.address, window_bytes=256 << 20), None)
        source = desk.source(self.info, SPECS[transport])
        return LabelFeed(source, request, first=0, count=count, max_bytes=256 << 20, max_batches=AHEAD), request

    def stop(self) -> None:
        """Ends the teacher's process."""
        self._process.terminate()
        self._process.wait()


class Student:
    """The steps of `student_memory`, on batches that change."""

    def __init__(self, head: TeacherHead) -> None:
        self.bench = Bench()
        self.bench.place_head(False)
        self.bench.head = head_on(head, V, torch.device("cuda"))

    def step(self, case: Case, labelled: Labelled | None) -> None:
        """One micro-batch and one update."""
        if labelled is not None:
            batch = labelled.request.batch
            ids_BL = torch.from_numpy(batch.token_ids_T.reshape(SEQUENCES, LENGTH))
            self.bench.ids_BL = ids_BL.long().cuda(non_blocking=True)
            self.bench.labels_N = torch.from_numpy(batch.labels_N()).long().cuda(non_blocking=True)
            self.bench.signals = {case.labels: labelled.signals}
        self.bench.step(case)

    def run_ms(self, case: Case, batches: Iterator[Labelled | None]) -> float:
        """Milliseconds a step, on end, the first ones not counted."""
        self.bench.place_layers(case.fast)
        began_s = 0.0
        for number in range(STEPS + SKIPPED):
            if number == SKIPPED:
                torch.cuda.synchronize()
                began_s = time.perf_counter()
            self.step(case, next(batches))
        torch.cuda.synchronize()
        return (time.perf_counter() - began_s) / STEPS * 1e3


def nothing() -> Iterator[None]:
    """No labels."""
    while True:
        yield None


def kept(batches: list[Labelled]) -> Iterator[Labelled]:
    """Labels in memory, over and over."""
    while True:
        yield from batches


def arriving(feed: LabelFeed, request: Callable[[int], LabelRequest], count: int) -> Iterator[Labelled]:
    """Labels as they come."""
    for number in range(count):
        yield Labelled(request(number), feed.take(number).signals)


def measured(student: Student, remote: Remote) -> list[dict[str, object]]:
    """All steps but the one with a teacher in the process."""
    count = STEPS + SKIPPED
    memory: dict[str, list[Labelled]] = {}
    for transport in SPECS:
        feed, request = remote.feed(transport, 3, 99)
        memory[transport] = list(arriving(feed, request, 3))
        feed.close()
    times: dict[str, list[float]] = {}
    waits: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for seed in range(ROUNDS):
        for name, case in CASES.items():
            torch.cuda.reset_peak_memory_stats()
            in_memory: Iterator[Labelled | None] = kept(memory[case.labels]) if case.labels else nothing()
            times.setdefault(name, []).append(student.run_ms(case, in_memory))
            peaks[name] = torch.cuda.max_memory_allocated() / GIB
            for over in (f"{name} over gRPC", f"{name} over gRPC, kept by the edge") if case.labels else ():
                feed, request = remote.feed(case.labels, count, seed)
                torch.cuda.reset_peak_memory_stats()
                began_s = time.perf_counter()
                times.setdefault(over, []).append(student.run_ms(case, arriving(feed, request, count)))
                waits[over] = feed.stats.wait_s / (time.perf_counter() - began_s)
                peaks[over] = torch.cuda.max_memory_allocated() / GIB
                feed.close()
    usual = times["SFT, transformers"]
    ratio = lambda one, other: statistics.median(a / b for a, b in zip(one, other, strict=True))  # noqa: E731
    return [
        {
            "step": name,
            "ms": statistics.median(taken),
            "x SFT": ratio(taken, usual),
            "x in memory": ratio(taken, times[name.partition(" over")[0]]) if "gRPC" in name else "",
            "waited": waits.get(name, ""),
            "peak GiB": peaks[name],
            "tokens/s": SEQUENCES * LENGTH / statistics.median(taken) * 1e3,
        }
        for name, taken in times.items()
    ]


def in_process(student: Student) -> dict[str, object]:
    """The usual way: the teacher beside the student, full logits of both, JSD 0.5, peft's own LoRA layers."""
    from tests.bench.gpu_teacher import random_model

    bench = student.bench
    bench.head = None
    teacher = random_model()
    case = replace(CASES["SFT, transformers"], fast=False)

    def step() -> None:
        with torch.no_grad():
            theirs_BLV = teacher(input_ids=bench.ids_BL).logits[..., :V]
        with torch.autocast("cuda", torch.bfloat16):
            ours_BLV = bench.student.model(input_ids=bench.ids_BL).logits
        (_jsd(ours_BLV.log_softmax(-1), theirs_BLV.log_softmax(-1)) / (SEQUENCES * LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(bench.trained, 1.0)
        bench.optimizer.step()
        bench.optimizer.zero_grad()

    bench.place_layers(case.fast)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began_s) * 1e3)
    ms = statistics.median(times[3:])
    peak = torch.cuda.max_memory_allocated() / GIB
    return {
        "step": "teacher in the process, usual way",
        "ms": ms,
        "x SFT": "",
        "x in memory": "",
        "waited": "",
        "peak GiB": peak,
        "tokens/s": SEQUENCES * LENGTH / ms * 1e3,
    }


def _jsd(ours_BLV: Tensor, theirs_BLV: Tensor) -> Tensor:
    half = float(np.log(0.5))
    mixed_BLV = torch.logaddexp(ours_BLV + half, theirs_BLV + half)
    kl = torch.nn.functional.kl_div
    both = (kl(mixed_BLV, logp_BLV, reduction="sum", log_target=True) for logp_BLV in (ours_BLV, theirs_BLV))
    return 0.5 * sum(both, start=torch.zeros((), device="cuda"))


async def serve(port: int) -> None:
    """The teacher's process."""
    from tests.bench import gpu_server, gpu_teacher

    _held = await gpu_server.started(
        gpu_teacher.backend(gpu_teacher.random_model()), port, memory_mb=4096
    )  # unheld, it would stop
    await asyncio.Event().wait()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON too")
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve))
        return
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(gpus - 1)
    remote = Remote(0)
    try:
        student = Student(remote.head)
        rows = measured(student, remote)
    finally:
        remote.stop()
    rows.append(in_process(student))
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, teacher on {'another' if gpus > 1 else 'the same'} GPU"
    show(f"a student's step, {SEQUENCES} x {LENGTH} tokens; {where}", rows, as_json=options.json)


if __name__ == "__main__":
    main()
