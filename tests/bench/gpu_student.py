"""A student's run on a GPU: no teacher, labels in memory, labels over gRPC while it trains; beside the usual ways of the same run.

Shapes of Qwen2.5-1.5B (student, LoRA r=16 on every linear layer, gradient checkpointing, bfloat16, 2 x 2048 tokens a micro-batch, one an
update) and 7B (teacher) with random weights. Ours are runs of `DistillationTrainer` itself, transformers' Trainer around it, with the
product's feed; the teacher is behind the product's edge and engine in a process of its own, on the first GPU; the student is on the last
one. With one GPU both share it. The usual ways are bare loops of the calls a training script makes, which favours them.
    python -m tests.bench.gpu_student [--json] [--steps N]

Columns: milliseconds a step over a run of steps on end; ratios to SFT the usual way (peft's layers, kernel by kernel), to the same with
our compiled layers, to SFT by our trainer (with recorded passes or kernel by kernel as the row itself), and to labels in memory; share of
the time waited for labels; memory in use and held at most by the student's process.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from student_trainer.config.run import TrainConfig, parse_config
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.labels import event_loop
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import pack
from student_trainer.labels.prefetch import FeedStats, LabelFeed, Taken
from student_trainer.labels.rows_on_device import head_on
from student_trainer.labels.service import LabelService
from student_trainer.losses.head import Head
from student_trainer.model.load import quicken
from student_trainer.model.speed import compiled
from student_trainer.teachers.features import FeaturePlan
from student_trainer.training.objective import Objective
from student_trainer.training.trainer import DistillationTrainer
from student_trainer.training.windows import FixedOrder
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis
from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD, TeacherHead
from teacher_wire.core.info import LAYER_BASIS, TeacherInfo
from teacher_wire.core.signals import SignalSpec
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from tests.bench.student_memory import GIB, LENGTH, SEQUENCES, Bench, Case, K, V
from tests.bench.table import show
from tests.tiny import make_tokenizer

SKIPPED = 8  # steps before the clock starts: compilation, recording, and what was asked ahead
SPECS = {"hidden": spec_of("hidden", V), "top_k": spec_of("top_k", V, k=K)}
BY_KERNEL = ", kernel by kernel"  # `model.graphs: false`
OUTPUT_ALONE: dict[str, Any] = {"output": {"divergence": "forward_kl"}, "sft_weight": 0.0}
Row = dict[str, object]
Feed = Callable[[TokenizedDataset, RunOrder], Any]


class Remote:
    """The teacher's process and what the student needs of it once.

    Args:
        gpu: that it runs on, as CUDA_VISIBLE_DEVICES names it.
        layers: whose states it can project.
    """

    def __init__(self, gpu: str, layers: Sequence[int] = ()) -> None:
        from tests.bench.gpu_client import free_port

        self.address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "tests.bench.gpu_student", "--serve", self.address.rpartition(":")[2]]
        command += ["--layers", *map(str, layers)] if layers else []
        self._process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
        self.info, self.head, self.basis = event_loop.run(self._meet())

    async def _meet(self) -> tuple[TeacherInfo, TeacherHead, LayerBasis | None]:
        async with TeacherClient(self.address) as client:
            info = await client.teacher(wait_for_s=240)
            found = {artifact.kind: await client.artifact(info, artifact) for artifact in info.artifacts}
        basis = LayerBasis.of(found[LAYER_BASIS]) if LAYER_BASIS in found else None
        return info, TeacherHead.of(found[OUTPUT_HEAD]), basis

    def feed(self, spec: SignalSpec, data: TokenizedDataset, order: RunOrder) -> LabelFeed:
        """As a run opens it, without a cache on disk."""
        desk = LabelService(lambda: TeacherClient(self.address, window_bytes=128 << 20), None)
        return LabelFeed(
            desk.source(self.info, spec),
            lambda number: pack([data[index].example for index in order.batch(number)]),
            first=0, count=order.batches, max_bytes=512 << 20, max_batches=64,
            prepare=partial(LabelTensors.of, pinned=True),
        )  # fmt: skip

    def stop(self) -> None:
        """Ends the teacher's process."""
        self._process.terminate()
        self._process.wait()


def taken(feed: LabelFeed, order: RunOrder) -> list[Taken]:
    """All labels of a run, in memory."""
    kept = [feed.take(number) for number in range(order.batches)]
    feed.close()
    return kept


class InMemory:
    """Labels that are there already, in the place of a feed."""

    def __init__(self, kept: list[Taken]) -> None:
        self._kept = kept
        self.stats = FeedStats()

    def take(self, number: int) -> Taken:
        """Those of micro-batch `number`."""
        return self._kept[number]

    def close(self) -> None:
        """Nothing is open."""


class Clock(TrainerCallback):
    """Times steps on end, the first ones not counted."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.ms = self._began_s = self.waited_s = 0.0
        self.feed: Callable[[], FeedStats | None] = lambda: None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Waits for the device where the clock starts and where it stops, nowhere else."""
        stats = self.feed()
        if state.global_step == SKIPPED:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._began_s, self.waited_s = time.perf_counter(), stats.wait_s if stats else 0.0
        elif state.global_step == SKIPPED + self._steps:
            torch.cuda.synchronize()
            self.ms = (time.perf_counter() - self._began_s) / self._steps * 1e3
            self.waited_s = (stats.wait_s if stats else 0.0) - self.waited_s


class Room:
    """Model, data and figures of all runs."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bench = Bench()
        self.bench.place_head(False)
        self.bench.signals, self.bench.rows = {}, {}
        self.folder = Path(tempfile.mkdtemp())
        tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(self.folder / "tokenizer"))
        self.student = self.bench.student
        self.student.tokenizer = tokenizer
        self.head: Head | None = None
        self.rows: list[Row] = []

    def order(self) -> RunOrder:
        """One micro-batch a step."""
        sequences = SEQUENCES * (self.steps + SKIPPED)
        return RunOrder(
            sequences, batch_size=SEQUENCES, accumulation=1, epochs=1, max_steps=self.steps + SKIPPED, seed=0
        )

    def data(self, seed: int) -> TokenizedDataset:
        """Random sequences; all but the first token of each supervised."""
        rng = np.random.default_rng(seed)
        mask = np.ones(LENGTH, np.bool_)
        mask[0] = False
        ids_SL = rng.integers(0, V, (SEQUENCES * (self.steps + SKIPPED), LENGTH), dtype=np.int32)
        return TokenizedDataset([Example(ids, mask, 0, str(s)) for s, ids in enumerate(ids_SL)])

    def config(self, loss: dict[str, Any], transport: str, graphs: bool) -> TrainConfig:
        """As a user's file would say it."""
        tree = {
            "run": {"output_dir": str(self.folder / "run")},
            "model": {"path": "random", "gradient_checkpointing": True, "graphs": graphs},
            "data": {"train": ["random"]},
            "teacher": {"address": "127.0.0.1:1"},
            "labels": {"transport": transport} | ({"k": K} if transport == "top_k" else {}),
            "loss": loss,
            "train": {"batch_size": SEQUENCES, "accumulation": 1, "max_steps": self.steps + SKIPPED, "bf16": True},
        }
        return parse_config(tree, "bench")

    def ours(
        self, name: str, transport: str = "", feed: Feed | None = None,
        seed: int = 0, deterministic: bool = True, graphs: bool = True,
        loss: dict[str, Any] | None = None, features: FeaturePlan | None = None,
    ) -> Row:  # fmt: skip
        """A run of the trainer, as it ships unless told otherwise; `features` is the plan of the terms on layers in `loss`."""
        usual: dict[str, Any] = OUTPUT_ALONE if transport else {"output": None, "sft_weight": 1.0}
        config = self.config(loss or usual, transport or "hidden", graphs)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        self.bench.place_layers(True)
        self.student.is_graphed = quicken(self.student.model, config.model)
        self.bench.optimizer = None  # its state is not part of our run
        data, order = self.data(seed), self.order()
        opened: list[Any] = []

        def open_feed(_: int) -> Any:
            assert feed is not None
            opened.append(feed(data, order))
            return opened[-1]

        clock = Clock(self.steps)
        clock.feed = lambda: opened[-1].stats if opened else None
        trainer = DistillationTrainer(
            config, self.student, FixedOrder(data, order), Objective(config.loss, V, features=features, run_steps=order.steps).terms(self.student),
            open_feed=open_feed if transport else None, teacher_head=self.head if transport == "hidden" else None,
            callbacks=[clock], on_trouble=lambda told: print("TROUBLE:", told, flush=True),
        )  # fmt: skip
        began_s = time.perf_counter()
        trainer.train()
        whole_s = time.perf_counter() - began_s
        trainer.close()
        row = self._row(name, clock.ms, clock.waited_s / (clock.ms * self.steps / 1e3))
        last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
        print(f"{name}: {row} whole {whole_s:.0f} s, loss {last['loss']:.4f}", flush=True)
        del trainer
        self.free()
        return row

    def usual(self, name: str, step: Callable[[], None], *, fast: bool) -> Row:
        """A bare loop."""
        torch.use_deterministic_algorithms(False)
        compiled.uninstall(self.student.model)
        self.bench.place_layers(fast)
        if fast:
            compiled.install(self.student.model)
        self.bench.optimizer = torch.optim.AdamW(self.bench.trained, lr=1e-5, fused=True)
        count = max(6, self.steps // 2)
        for number in range(count + 3):
            if number == 3:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                began_s = time.perf_counter()
            step()
        torch.cuda.synchronize()
        row = self._row(name, (time.perf_counter() - began_s) / count * 1e3, 0.0)
        print(f"{name}: {row}", flush=True)
        self.bench.optimizer = None
        self.free()
        return row

    def _row(self, name: str, ms: float, waited: float) -> Row:
        used, held = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        row: Row = {"step": name, "ms": ms, "waited": waited, "used GiB": used, "held GiB": held}
        self.rows.append(row)
        if "OUT" in os.environ:  # a run that is cut off leaves what it has
            Path(os.environ["OUT"], "gpu_student_rows.json").write_text(json.dumps(self.rows, indent=1))
        return row

    def free(self) -> None:
        """Nothing of one run is left for the next."""
        self.student.model.zero_grad(set_to_none=True)
        self.student.model.__dict__.pop("forward", None)  # accelerate's, which gives float32 logits
        gc.collect()
        torch.cuda.empty_cache()


def measured(room: Room, remote: Remote) -> None:
    """All runs; the references first, then what the issue asks for."""
    bench = room.bench
    sft = Case("SFT, transformers")
    room.usual("SFT, usual", lambda: bench.step(sft), fast=False)
    room.usual("SFT, usual loss, our layers", lambda: bench.step(sft), fast=True)
    in_process(room)
    room.free()
    room.head = head_on(remote.head, V, torch.device("cuda"))
    room.ours("SFT, ours")
    feeds: dict[str, tuple[str, Feed, Feed]] = {}
    for seed, transport in enumerate(SPECS):
        data, order = room.data(seed), room.order()
        kept = taken(remote.feed(SPECS[transport], data, order), order)

        def in_memory(_data: Any, _order: Any, kept: list[Taken] = kept) -> InMemory:
            return InMemory(kept)

        fetched = partial(remote.feed, transport)
        name = "hidden" if transport == "hidden" else f"top-{K}"
        feeds[name] = transport, in_memory, fetched
        room.ours(name, transport, in_memory, seed)
        room.ours(f"{name} over gRPC", transport, fetched, seed + 100)  # other rows: the edge has none of these
    hidden = feeds["hidden"][1]
    room.ours("hidden, again", "hidden", hidden)  # how much two equal runs differ
    room.ours("hidden, not deterministic", "hidden", hidden, deterministic=False)
    room.ours(f"SFT, ours{BY_KERNEL}", graphs=False)
    for seed, (name, (transport, in_memory, fetched)) in enumerate(feeds.items()):
        room.ours(f"{name}{BY_KERNEL}", transport, in_memory, seed, graphs=False)
        room.ours(f"{name}{BY_KERNEL} over gRPC", transport, fetched, seed + 200, graphs=False)
    room.head = None


def in_process(room: Room) -> None:
    """The usual way: the teacher beside the student, full logits of both, JSD 0.5, peft's own LoRA layers."""
    from tests.bench.gpu_teacher import random_model

    bench, teacher = room.bench, random_model()

    def step() -> None:
        with torch.no_grad():
            theirs_BLV = teacher(input_ids=bench.ids_BL).logits[..., :V]
        with torch.autocast("cuda", torch.bfloat16):
            ours_BLV = bench.student.model(input_ids=bench.ids_BL).logits
        (_jsd(ours_BLV.log_softmax(-1), theirs_BLV.log_softmax(-1)) / (SEQUENCES * LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(bench.trained, 1.0)
        bench.optimizer.step()
        bench.optimizer.zero_grad()

    room.usual("teacher in the process, usual", step, fast=False)


def _jsd(ours_BLV: Tensor, theirs_BLV: Tensor) -> Tensor:
    half = float(np.log(0.5))
    mixed_BLV = torch.logaddexp(ours_BLV + half, theirs_BLV + half)
    kl = torch.nn.functional.kl_div
    both = (kl(mixed_BLV, logp_BLV, reduction="sum", log_target=True) for logp_BLV in (ours_BLV, theirs_BLV))
    return 0.5 * sum(both, start=torch.zeros((), device="cuda"))


def with_ratios(rows: list[Row]) -> list[Row]:
    """The table: every step beside the references of the run."""
    ms = {str(row["step"]): float(str(row["ms"])) for row in rows}
    usual, layers, inside = (
        ms[n] for n in ("SFT, usual", "SFT, usual loss, our layers", "teacher in the process, usual")
    )
    found = []
    for row in rows:
        name = str(row["step"])
        memory = name.partition(" over")[0]
        beside = min(ms[memory], ms.get(f"{memory}, again", ms[memory])) if " over gRPC" in name else None
        ours = ms[f"SFT, ours{BY_KERNEL if BY_KERNEL in name else ''}"]
        found.append({
            "step": name, "ms": round(ms[name], 1), "x SFT": round(ms[name] / usual, 3),
            "x SFT, our layers": round(ms[name] / layers, 3), "x SFT, ours": round(ms[name] / ours, 3), "x in memory": round(ms[name] / beside, 3) if beside else "",
            "tokens/s": round(SEQUENCES * LENGTH / ms[name] * 1e3), "x in-process": round(inside / ms[name], 2),
            "waited": row["waited"], "used GiB": row["used GiB"], "held GiB": row["held GiB"],
        })  # fmt: skip
    return found


async def serve(port: int, layers: Sequence[int]) -> None:
    """The teacher's process."""
    from teacher_server.config.features import FeaturesConfig
    from tests.bench import gpu_server, gpu_teacher

    model = gpu_teacher.backend(gpu_teacher.random_model())
    if layers:
        model.calibrate(FeaturesConfig(layers=tuple(layers), folder=None))
    _held = await gpu_server.started(model, port, memory_mb=4096)  # unheld, it would stop
    await asyncio.Event().wait()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON too")
    parser.add_argument("--steps", type=int, default=24, help="counted steps of a run")
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.layers))
        return
    gpus = torch.cuda.device_count()
    os.environ["CUDA_VISIBLE_DEVICES"] = str(
        gpus - 1
    )  # before anything is made on a device: transformers takes the first it sees
    room = Room(options.steps)
    remote = Remote("0")
    try:
        measured(room, remote)
    finally:
        remote.stop()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, teacher on {'another' if gpus > 1 else 'the same'} GPU"
    rows = with_ratios(room.rows)
    show(f"a student's step, {SEQUENCES} x {LENGTH} tokens; {where}", rows, as_json=options.json)
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "gpu_student.json").write_text(json.dumps({"where": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
