"""What a teacher costs the loss: one of the student's tokenizer, one of another, two at once, and their mixture, at V = 152k.

Random weights and states in the shapes of Qwen2.5-1.5B and 7B on a GPU, narrower ones on a CPU. The partition is one that a run has kept
(`--partition CACHE/classes/KEY.safetensors`, or of `tests.bench.coverage --partitions`), or made up with the figures that were measured of two real
vocabularies (docs/concepts/method.md 8.4): most classes are pairs, some are large, one holds everything without a partner. The made-up one is numbered in
the order of the student's ids, as the product does it, and the teacher's ids lie anywhere: of real pairs that is the worst (DeepSeek V3; Llama 3.1
has Qwen3's order nearly).
    python -m tests.bench.cross_loss [--device cuda] [--partition FILE] [--chunk-mb 1024] [--rows N] [--profile "bridged, hidden"] [--json]

Columns: time of the loss with its gradients (median of rounds, which are interleaved; CPU time of one thread without a GPU), its ratio to the plain loss with one
teacher, and the memory that the pass takes at most beyond what it is given (on a GPU). On a GPU twice: begun on an idle device, so that all of the host's
preparations count, and behind work of the length of a student's forward pass that the device has yet to do, as in a step: what the loss adds to it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from student_trainer.config.losses import LossConfig
from student_trainer.losses.cross_tokenizer.bridge import Bridge, Groups, VocabularyClasses
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head
from student_trainer.losses.output.joined.loss import joined_loss
from student_trainer.losses.output.loss import output_loss
from student_trainer.losses.output.parts import Joining
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import HiddenRows, TeacherRows, TopKRows
from student_trainer.losses.term import JoinedLabels, TeacherLabels, TeacherShare

VOCAB, OTHER_VOCAB, CLASSES = 151_936, 128_256, 96_000
BEHIND = 8  # products of squares of 8192, about 11 ms of an H200 by its peak
TARGET = 1.3  # of the bridged loss, times the plain one


@dataclass(frozen=True)
class Shape:
    """Rows of a pass, widths of both models, and how often each arm runs."""

    rows: int
    student: int
    teacher: int
    rounds: int


SHAPES = {"cpu": Shape(32, 896, 1536, 3), "cuda": Shape(2048, 1536, 3584, 15)}


def partition(device: str, seed: int = 0) -> VocabularyClasses:
    """Two vocabularies: 80% of the classes are pairs, the sizes of the others fall off quickly, and one is of what is left over."""
    random = np.random.default_rng(seed)
    sides = []
    for ids in (VOCAB, OTHER_VOCAB):
        larger = CLASSES // 5
        more = (larger * random.random(ids - CLASSES - 2000) ** 2).astype(
            np.int64
        )  # ids beyond the first of their class
        class_V = np.concatenate([np.arange(CLASSES), more, np.full(2000, CLASSES - 1)])
        sides.append(random.permutation(class_V))
    _, first_K = np.unique(sides[0], return_index=True)
    number_K = np.empty(CLASSES, np.int64)
    number_K[np.argsort(first_K)] = np.arange(CLASSES)
    return VocabularyClasses(*(torch.from_numpy(number_K[class_V]).to(device) for class_V in sides), CLASSES)


def kept_partition(file: Path, device: str) -> VocabularyClasses:
    """One that a run has kept."""
    from safetensors.numpy import load_file

    kept = load_file(file)
    sides = (torch.from_numpy(kept[name].astype(np.int64)).to(device) for name in ("student_Vs", "teacher_Vt"))
    return VocabularyClasses(*sides, int(kept["sizes"][0]))


def groups_of(rows: int, seed: int = 0) -> Groups:
    """90% of the groups are one token against one; of the rest most are one against two."""
    random = np.random.default_rng(seed)
    kinds = np.array([[1, 1], [1, 2], [2, 1], [2, 2]])[random.choice(4, rows, p=[0.9, 0.05, 0.03, 0.02])]
    ends = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(kinds, 0)])
    ends = ends[ends.max(1) <= rows]
    return Groups(np.stack([ends[:-1, 0], ends[1:, 0]], 1), np.stack([ends[:-1, 1], ends[1:, 1]], 1))


class World:
    """Everything that the arms read."""

    def __init__(self, shape: Shape, device: str, classes: VocabularyClasses) -> None:
        torch.manual_seed(0)
        self.classes, self.vocab, self.other_vocab = classes, classes.student_Vs.numel(), classes.teacher_Vt.numel()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        normal = lambda *size: torch.randn(*size, device=device, dtype=dtype)  # noqa: E731
        self.shape = shape
        self.hidden_ND = normal(shape.rows, shape.student).requires_grad_()
        self.head = Head(normal(self.vocab, shape.student) * (2 / shape.student**0.5))
        self.labels_N = torch.randint(min(self.vocab, self.other_vocab), (shape.rows,))
        self.weights_N = torch.ones(shape.rows)
        self.bridge = Bridge(self.classes, groups_of(shape.rows), self.labels_N)
        self.same = self._teacher(normal(self.vocab, shape.teacher), normal(shape.rows, shape.teacher))
        self.second = self._teacher(normal(self.vocab, shape.teacher), normal(shape.rows, shape.teacher))
        self.other = self._teacher(normal(self.other_vocab, shape.teacher), normal(shape.rows, shape.teacher))

    def _teacher(self, weight_VD: Tensor, hidden_ND: Tensor) -> HiddenRows:
        served_N = torch.zeros(len(hidden_ND), device=hidden_ND.device)
        return HiddenRows(hidden_ND, Head(weight_VD.mul_(2 / hidden_ND.shape[1] ** 0.5)), served_N, served_N)

    def top_k(self, vocab: int, count: int = 64) -> TopKRows:
        """Kept ids of a random teacher."""
        device = self.hidden_ND.device
        ids_NK = torch.stack([torch.randperm(vocab, device=device)[:count] for _ in range(self.shape.rows)])
        logits_NK = torch.randn(self.shape.rows, count, device=device)
        served_N = torch.full((self.shape.rows,), -5.0, device=device)
        tail_N = torch.full_like(served_N, -3.0)
        return TopKRows(ids_NK, logits_NK, tail_N, logits_NK.logsumexp(-1) + 0.05, served_N)


def arms(w: World, spec: OutputLossSpec) -> dict[str, Callable[[], Tensor]]:
    """Each a loss with its gradients."""

    def plain(rows: TeacherRows) -> Tensor:
        return output_loss(w.hidden_ND, w.head, rows, w.labels_N, w.weights_N, 1.0, spec).total

    def joined(combine: str = "loss_sum", **teachers: TeacherShare) -> Tensor:
        labels, names = JoinedLabels(teachers), tuple(teachers)
        bridged = frozenset(name for name in names if teachers[name].bridge is not None)
        joining = Joining(names, bridged, combine)
        return joined_loss(w.hidden_ND, w.head, labels, joining, w.labels_N, w.weights_N, 1.0, spec).total

    def share(rows: TeacherRows, part: float, bridge: Bridge | None = None) -> TeacherShare:
        return TeacherShare(TeacherLabels(rows, {}), torch.full((w.shape.rows,), part), bridge=bridge)

    kept, kept_other = w.top_k(w.vocab), w.top_k(w.other_vocab)
    return {
        "plain, hidden": lambda: plain(w.same),
        "joined, one of the same tokenizer": lambda: joined(a=share(w.same, 1.0)),
        "bridged, hidden": lambda: joined(b=share(w.other, 1.0, w.bridge)),
        "two of the same tokenizer": lambda: joined(a=share(w.same, 0.5), b=share(w.second, 0.5)),
        "their mixture": lambda: joined("prob_mix", a=share(w.same, 0.5), b=share(w.second, 0.5)),
        "one of each": lambda: joined(a=share(w.same, 0.5), b=share(w.other, 0.5, w.bridge)),
        "plain, top_k": lambda: plain(kept),
        "bridged, top_k": lambda: joined(b=share(kept_other, 1.0, w.bridge)),
    }


class Measured(NamedTuple):
    """Medians of an arm: seconds, begun on an idle device; seconds that it adds behind other work (NaN without a GPU); MiB at most."""

    seconds: float
    added: float
    peak: float


def measured(found: dict[str, Callable[[], Tensor]], rounds: int, device: str) -> dict[str, Measured]:
    """Of each arm."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in found}
    added: dict[str, list[float]] = {name: [] for name in found}
    peaks = dict.fromkeys(found, 0.0)
    square = torch.ones(8192, 8192, device=device, dtype=torch.bfloat16) if device == "cuda" else None
    for turn in range(rounds + 1):
        for name, arm in found.items():
            before = 0
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = clock()
            arm()  # gradients are computed here, in the forward pass
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if turn:  # the first is to warm up
                times[name].append(clock() - began)
            if square is not None:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(BEHIND):
                    square @ square
                start.record()
                arm()
                stop.record()
                torch.cuda.synchronize()
                if turn:
                    added[name].append(start.elapsed_time(stop) / 1000)
    nan = [math.nan]
    return {
        name: Measured(statistics.median(times[name]), statistics.median(added[name] or nan), peaks[name])
        for name in found
    }


def profile(arm: Callable[[], Tensor], device: str) -> None:
    """Where the time of one pass goes: a device that waits for launches shows many calls and little time in them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    arm()
    with torch.profiler.profile(activities=activities) as seen:
        arm()
        if device == "cuda":
            torch.cuda.synchronize()
    averages = seen.key_averages()
    for column in ("self_cuda_time_total" if device == "cuda" else "self_cpu_time_total", "count"):
        print(averages.table(sort_by=column, row_limit=25, max_name_column_width=60))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--rows", type=int, default=0, help="of a pass; 0 for the default of the device")
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--partition", type=Path, help="a kept one; made up if left out")
    parser.add_argument(
        "--chunk-mb", type=int, default=LossConfig().chunk_mb, help="as loss.chunk_mb, with its default"
    )
    parser.add_argument(
        "--profile",
        metavar="ARM",
        help="print the operations of that arm alone, by their time on the device and by their number",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    shape = SHAPES[options.device]
    if options.rows:
        shape = Shape(options.rows, shape.student, shape.teacher, shape.rounds)
    made = partition(options.device) if options.partition is None else kept_partition(options.partition, options.device)
    world = World(shape, options.device, made)
    spec = OutputLossSpec(Divergence(options.divergence), sft_weight=0.5, chunk_bytes=options.chunk_mb << 20)
    every = arms(world, spec)
    if options.profile:
        if options.profile not in every:
            parser.error(f"--profile {options.profile}: choose {', '.join(every)}")
        profile(every[options.profile], options.device)
        return
    found = measured(every, shape.rounds, options.device)
    print(
        f"{shape.rows} rows in chunks of {options.chunk_mb} MiB, V {world.vocab:,} and {world.other_vocab:,}, {made.classes:,} classes, "
        f"widths {shape.student} and {shape.teacher}, {options.device}"
    )
    figures = {}
    for name, of in found.items():
        plain = found["plain, top_k" if "top_k" in name else "plain, hidden"]
        ratio, step_ratio = of.seconds / plain.seconds, of.added / plain.added
        figures[name] = {"ms": round(1000 * of.seconds, 1), "ratio": round(ratio, 3), "peak_mib": round(of.peak)}
        line = f"{name:36} {1000 * of.seconds:9.1f} ms  {ratio:6.2f}x"
        if not math.isnan(step_ratio):
            figures[name] |= {"step_ms": round(1000 * of.added, 1), "step_ratio": round(step_ratio, 3)}
            line += f"  in a step {1000 * of.added:7.1f} ms  {step_ratio:6.2f}x"
        print(f"{line}  {of.peak:8.0f} MiB")
    bridged = figures["bridged, hidden"]
    in_step = f", in a step {bridged['step_ratio']:.2f}x" if "step_ratio" in bridged else ""
    print(f"bridged against plain, hidden: {bridged['ratio']:.2f}x{in_step}, target {TARGET}x")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
