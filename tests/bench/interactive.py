"""The interactive lane: time to all labels of one completion of 512 tokens alone, and behind a bulk lane that is never empty.

Edge and engine of the product in one process without Ray, bulk students as processes of their own (tests.soak.load), and one student that asks
for one completion at a time, at random moments, with `cache: none`. In the same run: the same request without the lane, and what
bulk students are served with and without it. On a CPU a random Qwen2 of 4 layers and 160 channels on one thread, passes of 4,096 tokens; with --gpu the shapes of
`gpu_server`. Last, the tokens that G completions of one prompt cost in one call and in G calls.
    python -m tests.bench.interactive [--json] [--gpu] [--rounds N] [--interactive-tokens N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_server.backends.transformers.backend import TransformersModel, load
from teacher_server.config.backends import FakeBackend, TransformersBackend
from teacher_server.config.server import BatchConfig, EdgeConfig, LimitsConfig, StoreConfig, TeacherConfig
from teacher_server.edge.server import EdgeServer
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import Latency
from teacher_wire.core.signals import SignalSpec
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.transport.channel import Credentials
from tests.bench.gpu_client import free_port
from tests.bench.gpu_server import Local
from tests.bench.table import show
from tests.tiny import make_model

COMPLETION = 512
LIMIT = 2.0  # the ratio that the lane is to keep
Row = dict[str, object]


@dataclass(frozen=True)
class Shapes:
    """What is asked: tokens of a prompt, bulk requests of so many sequences, how many such students there are, and tokens of a full pass."""

    vocab: int
    prompt: int
    bulk_sequences: int
    bulk_length: int
    students: int
    max_tokens: int


CPU = Shapes(vocab=2048, prompt=128, bulk_sequences=4, bulk_length=512, students=1, max_tokens=4096)
GPU = Shapes(vocab=152_064, prompt=256, bulk_sequences=2, bulk_length=2048, students=3, max_tokens=16_384)


def cpu_model(folder: Path) -> TransformersModel:
    """Large enough that a pass takes longer than everything around it."""
    path = make_model(
        folder / "m",
        vocab=CPU.vocab,
        hidden=256,
        num_hidden_layers=6,
        max_position_embeddings=2048,
        intermediate_size=512,
    )
    return load(TransformersBackend(model=str(path), dtype="float32", device="cpu", threads=1), deterministic=False)


def gpu_model() -> TransformersModel:
    """The teacher of `gpu_server`."""
    from tests.bench import gpu_teacher

    return gpu_teacher.backend(gpu_teacher.random_model())


@contextlib.asynccontextmanager
async def served(
    model: TransformersModel, shapes: Shapes, interactive_tokens: int | None
) -> AsyncIterator[tuple[str, TeacherEngine]]:
    """Address and engine of the product around a model."""
    batch = BatchConfig(max_tokens=shapes.max_tokens, interactive_tokens=interactive_tokens)
    config = TeacherConfig(name="t", backend=FakeBackend(), batch=batch, limits=LimitsConfig(max_reply_mb=256))
    engine = TeacherEngine(config, model)
    engine.start()
    edge = EdgeServer(EdgeConfig(port=free_port(), drain_s=0, store=StoreConfig(memory_mb=64)), Local(engine))
    await edge.start()
    try:
        yield edge.address, engine
    finally:
        await edge.drain()
        await engine.stop()


@contextlib.asynccontextmanager
async def saturated(address: str, engine: TeacherEngine, shapes: Shapes) -> AsyncIterator[None]:
    """The bulk lane is never empty in the block."""
    command = [
        sys.executable,
        "-m",
        "tests.soak.load",
        address,
        "--tenant",
        "bulk",
        "--depth",
        "8",
        "--k",
        "16",
        "--seconds",
        "600",
    ]
    command += ["--sequences", str(shapes.bulk_sequences), "--length", str(shapes.bulk_length)]
    processes = [
        subprocess.Popen([*command, "--seed", str(seed)], stdout=subprocess.DEVNULL) for seed in range(shapes.students)
    ]
    try:
        async with asyncio.timeout(120):
            while engine.counters()["queued_jobs"] < 2:
                await asyncio.sleep(0.05)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def completion(rng: np.random.Generator, shapes: Shapes, count: int = 1) -> TokenBatch:
    """`count` completions of one new prompt; their rows are wanted and no others."""
    prompt = rng.integers(0, shapes.vocab, shapes.prompt)
    length = shapes.prompt + COMPLETION
    ids_BL = np.stack([np.concatenate([prompt, rng.integers(0, shapes.vocab, COMPLETION)]) for _ in range(count)])
    wanted_L = (np.arange(length) >= shapes.prompt - 1) & (np.arange(length) < length - 1)
    cu_B1 = (np.arange(count + 1) * length).astype(np.int32)
    return TokenBatch(ids_BL.reshape(-1).astype(np.int32), cu_B1, np.tile(wanted_L, count))


async def times_s(
    address: str, spec: SignalSpec, shapes: Shapes, rounds: int, latency: Latency, pause_s: float
) -> list[float]:
    """How long each of so many requests takes, one at a time, after a pause of a random length up to `pause_s`."""
    rng, found = np.random.default_rng(rounds), []
    async with TeacherClient(address, credentials=Credentials(tenant="me"), window_bytes=256 << 20) as client:
        info = await client.teacher(wait_for_s=60)
        await client.score(info, spec, completion(rng, shapes), cache="none", latency=latency)
        for _ in range(rounds):
            await asyncio.sleep(float(rng.uniform(0, pause_s)))
            batch = completion(rng, shapes)
            began_s = time.perf_counter()
            await client.score(info, spec, batch, cache="none", latency=latency)
            found.append(time.perf_counter() - began_s)
    return found


async def bulk_rate(engine: TeacherEngine, work: Callable[[], Any]) -> tuple[float, Any]:
    """Bulk tokens a second while `work` goes on, and what it gives."""

    def tokens() -> int:
        counters = engine.counters()
        return int(counters["forward_tokens"] - counters["interactive_tokens"])

    before, began_s = tokens(), time.perf_counter()
    result = await work()
    return (tokens() - before) / (time.perf_counter() - began_s), result


async def passes(engine: TeacherEngine, count: int) -> None:
    """Returns when the next pass but `count` - 1 begins."""
    until = engine.counters()["forwards"] + count
    while engine.counters()["forwards"] < until:
        await asyncio.sleep(0.01)


async def measure(model: TransformersModel, shapes: Shapes, options: argparse.Namespace) -> list[Row]:
    """The rows of the table."""
    spec = spec_of("hidden", shapes.vocab, check="sampled")
    rows: list[Row] = []

    def row(name: str, times: list[float], rate: float) -> None:
        median = statistics.median(times)
        alone = float(str(rows[0]["median ms"])) / 1e3 if rows else median
        worst = sorted(times)[int(0.9 * len(times))]
        figures = {"median ms": median * 1e3, "p90 ms": worst * 1e3, "of alone": median / alone, "bulk tokens/s": rate}
        rows.append({"": name, **figures, "requests": len(times)})
        print(rows[-1], flush=True)

    async with served(model, shapes, options.interactive_tokens) as (address, engine):
        alone = await times_s(address, spec, shapes, options.rounds, "interactive", 0.0)
        row("alone", alone, 0.0)
        pause_s = 2 * statistics.median(alone)
        async with saturated(address, engine, shapes):
            await asyncio.sleep(10.5)  # no interactive request is expected any more
            await passes(engine, 1)  # full ones from here on
            quiet, _ = await bulk_rate(engine, lambda: passes(engine, 2))
            few = max(3, options.rounds // 7)
            rate, times = await bulk_rate(engine, lambda: times_s(address, spec, shapes, few, "bulk", pause_s))
            row("behind bulk, as bulk", times, rate)
            rate, times = await bulk_rate(
                engine, lambda: times_s(address, spec, shapes, options.rounds, "interactive", pause_s)
            )
            row("behind bulk, interactive", times, rate)
    rows.append({**dict.fromkeys(rows[0], 0.0), "": "bulk, nobody else", "bulk tokens/s": quiet, "requests": 0})
    return rows


def prefixes(model: TransformersModel, shapes: Shapes, counts: tuple[int, ...] = (1, 4, 8)) -> list[Row]:
    """Tokens through the layers, and milliseconds, for G completions of one prompt in one call and in G passes."""
    spec, rng, rows = spec_of("hidden", shapes.vocab, check="sampled"), np.random.default_rng(1), []

    def spent(jobs: list[list[TokenBatch]]) -> tuple[int, float]:
        model.score([(jobs[0][0], spec)])
        before, began_s = model.computed_tokens, time.perf_counter()
        for batches in jobs:
            model.score([(batch, spec) for batch in batches])
        return model.computed_tokens - before, (time.perf_counter() - began_s) * 1e3

    for count in counts:
        batch = completion(rng, shapes, count)
        together, together_ms = spent([[batch]])
        apart, apart_ms = spent([[batch.select([number])] for number in range(count)])
        rows.append(
            {
                "completions": count,
                "tokens, one call": together,
                "ms": together_ms,
                "tokens, apart": apart,
                "ms apart": apart_ms,
            }
        )
    return rows


def main() -> None:
    """Prints the tables; exit code 1 if the lane does not keep to LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print each table's figures as JSON too")
    parser.add_argument("--gpu", action="store_true", help="the shapes of gpu_server, on CUDA")
    parser.add_argument("--rounds", type=int, default=21, help="requests of each kind")
    parser.add_argument(
        "--interactive-tokens", type=int, help="batch.interactive_tokens; the server's default if not given"
    )
    options = parser.parse_args()
    shapes = GPU if options.gpu else CPU
    with tempfile.TemporaryDirectory() as folder:
        model = gpu_model() if options.gpu else cpu_model(Path(folder))
        rows = asyncio.run(measure(model, shapes, options))
        shared = prefixes(model, shapes)
    show("time to all labels of a completion of 512 tokens", rows, as_json=options.json)
    show(f"completions of one prompt of {shapes.prompt} tokens", shared, as_json=options.json)
    if "OUT" in os.environ:
        found = {"options": vars(options), "lane": rows, "prefixes": shared}
        (Path(os.environ["OUT"]) / "interactive.json").write_text(json.dumps(found, indent=1))
    ratio = float(str(rows[2]["of alone"]))
    if ratio > LIMIT:
        sys.exit(
            f"behind bulk an interactive request takes {ratio:.2f} times as long as alone; at most {LIMIT:g} is wanted"
        )


if __name__ == "__main__":
    main()
