"""Label tokens a second on one GPU, end to end: seen by client processes over gRPC, and what each stage takes.

The teacher is a random model in the shape of Qwen2.5-7B in bfloat16; the server is the product's edge and engine in one
process without Ray (which the lent GPU machines lack). References of the same run: transformers eager, our backend in a
loop without a server, and vLLM by the scripts of ../shared/anchors where vLLM is installed.
    python -m tests.bench.gpu_server [--json] [--anchors FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacher_server.backends.base import ModelFacts
from teacher_server.backends.transformers_backend import Job, TransformersModel
from teacher_server.config import EdgeConfig, FakeBackend, LimitsConfig, StoreConfig, TeacherConfig
from teacher_server.edge.server import EdgeServer
from teacher_server.engine import TeacherEngine
from teacher_wire import codec
from teacher_wire.messages import HeadHeader, ScoreCall, TeacherHead, TeacherInfo, TeacherSignals
from tests.bench import gpu_teacher
from tests.bench.gpu_client import TimedIterator
from tests.bench.table import show

CLIENTS = 4
Rows = list[dict[str, object]]


class Watched:
    """A backend that notes when each batch was done and how long the device worked on it."""

    def __init__(self, model: TransformersModel) -> None:
        self._model = model
        self.done: list[tuple[float, int, int]] = []  # when, device microseconds, tokens

    @property
    def facts(self) -> ModelFacts:
        return self._model.facts

    def head(self) -> TeacherHead:
        return self._model.head()

    def score(self, jobs: list[Job]) -> list[TeacherSignals]:
        return self.begin(jobs)()

    def begin(self, jobs: list[Job]) -> Callable[[], list[TeacherSignals]]:
        """As the backend's own."""
        finish = self._model.begin(jobs)

        def finished() -> list[TeacherSignals]:
            answers = finish()
            timing = answers[0].timing
            self.done.append((time.monotonic(), timing.forward_us + timing.reduce_us, timing.batch_tokens))
            return answers

        return finished


class Local:
    """The engine as the edge wants it, in this process."""

    def __init__(self, engine: TeacherEngine) -> None:
        self._engine = engine

    async def describe(self) -> list[TeacherInfo]:
        return [self._engine.info]

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        return self._engine.info

    async def score(self, call: ScoreCall) -> TeacherSignals:
        return await self._engine.score(call)

    async def head_header(self, teacher: str, fingerprint: str) -> HeadHeader:
        return await self._engine.head_header(fingerprint)

    async def head_bytes(self, teacher: str, fingerprint: str, offset: int, size: int) -> bytes:
        return await self._engine.head_bytes(fingerprint, offset, size)


async def started(
    model: TransformersModel, port: int, memory_mb: int = 256
) -> tuple[EdgeServer, TeacherEngine, Watched]:
    """The product's edge and engine around a model, listening on loopback."""
    backend = Watched(model)
    config = TeacherConfig(name="t", backend=FakeBackend(), limits=LimitsConfig(max_reply_mb=256))
    engine = TeacherEngine(config, backend)
    engine.start()
    edge = EdgeServer(EdgeConfig(port=port, store=StoreConfig(memory_mb=memory_mb)), Local(engine))
    await edge.start()
    return edge, engine, backend


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def served(model: TransformersModel, seconds: float) -> tuple[Rows, Rows]:
    """What four client processes see at once, and the stages of one request when nobody else asks."""
    port = free_port()
    edge, engine, backend = await started(model, port)
    encode = codec.encode_chunks = TimedIterator(codec.encode_chunks)  # type: ignore[assignment]

    async def ask(labels: str, lengths: str, clients: int, depth: int, seconds: float) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "tests.bench.gpu_client", f"127.0.0.1:{port}", "--depth", str(depth)]
        command += ["--transport", gpu_teacher.SPECS[labels].transport, "--lengths", lengths, "--seconds", str(seconds)]
        backend.done.clear()
        encode.seconds = 0.0
        processes = [
            await asyncio.create_subprocess_exec(*command, "--seed", str(seed), stdout=subprocess.PIPE)
            for seed in range(clients)
        ]
        return [json.loads((await process.communicate())[0]) for process in processes]

    together: Rows = []
    alone: Rows = []
    for labels in gpu_teacher.SPECS:
        for lengths in ("uniform", "mixed"):
            cpu_s = time.process_time()
            seen = await ask(labels, lengths, CLIENTS, 4, seconds)
            tokens = sum(tokens for client in seen for _, _, tokens in client["answers"])
            server_us = (time.process_time() - cpu_s) / tokens * 1e6
            clients_us = sum(client["cpu_s"] for client in seen) / tokens * 1e6
            figures = {
                **loaded(seen, backend.done),
                "server CPU us/token": server_us,
                "client CPU us/token": clients_us,
            }
            together.append({"labels": labels, "lengths": lengths, **figures})
            print(together[-1], flush=True)
        alone.append({"labels": labels, **quiet(await ask(labels, "uniform", 1, 1, 5.0), encode.seconds)})
        print(alone[-1], flush=True)
    await edge.drain()
    await engine.stop()
    return together, alone


def loaded(seen: list[dict[str, Any]], done: list[tuple[float, int, int]]) -> dict[str, object]:
    """Rates while all clients ask, without the first two batches and the last."""
    start_s = max(client["answers"][0][0] for client in seen) + 1.0
    end_s = min(client["answers"][-1][0] for client in seen)
    answers = sorted(
        (when, tokens) for client in seen for when, _, tokens in client["answers"] if start_s < when < end_s
    )
    times = np.array([when for when, _ in answers])
    label_rate = np.polyfit(times, np.cumsum([tokens for _, tokens in answers]), 1)[
        0
    ]  # answers come in lumps of a batch
    batches = [batch for batch in done if start_s < batch[0] < end_s]
    took_s = batches[-1][0] - batches[0][0]
    every = sum(tokens for client in seen for _, _, tokens in client["answers"])
    latencies_ms = [1e3 * took for client in seen for _, took, _ in client["answers"]]
    return {
        "label tokens/s": float(round(label_rate)),
        "GPU idle": 1 - sum(busy_us for _, busy_us, _ in batches[1:]) / 1e6 / took_s,
        "tokens a batch": float(np.mean([tokens for _, _, tokens in batches])),
        "bytes/token": sum(client["payload_bytes"] for client in seen) / every,
        "median latency ms": statistics.median(latencies_ms),
    }


def quiet(seen: list[dict[str, Any]], encode_s: float) -> dict[str, object]:
    """Milliseconds of each stage of a request of 4,096 tokens; the wire is what no other stage explains."""
    (client,) = seen
    answers, stages = client["answers"][2:], client["stages"][2:]
    asked = len(client["answers"])
    queue, forward, reduce = (statistics.median(stage) / 1e3 for stage in zip(*stages, strict=True))
    spent = {
        "queue": queue,
        "forward": forward,
        "reduce": reduce,
        "encode": encode_s / asked * 1e3,
        "decode": client["decode_s"] / asked * 1e3,
        "verify": client["verify_s"] / asked * 1e3,
    }
    whole = statistics.median(took for _, took, _ in answers) * 1e3
    return {**spent, "copy, wire, rest": whole - sum(spent.values()), "whole ms": whole}


def bare(model: Any, *, quick: bool) -> Rows:
    """The backend in a loop, in each way it can be set up."""
    rows: Rows = []
    ways: list[tuple[str, dict[str, Any]]] = [
        ("as served", {}),
        ("padded", {"packing": "off"}),
        ("transformers' layers", {"layers": "transformers"}),
        ("deterministic", {"deterministic": True}),
    ]
    for name, settings in ways[:1] if quick else ways:
        teacher = gpu_teacher.backend(model, **settings)
        for lengths in ("uniform", "mixed"):
            row: dict[str, object] = {"bare backend": name, "lengths": lengths}
            for labels, spec in gpu_teacher.SPECS.items():
                row[labels] = round(gpu_teacher.loop(teacher, gpu_teacher.requests(lengths), spec))
            rows.append(row)
            print(row, flush=True)
    return rows


def float8(model: Any) -> Rows:
    """Last, since the layers stay float8."""
    teacher = gpu_teacher.backend(model, quantization="fp8")
    row: dict[str, object] = {"bare backend": "float8", "lengths": "uniform"}
    for labels, spec in gpu_teacher.SPECS.items():
        row[labels] = round(gpu_teacher.loop(teacher, gpu_teacher.requests("uniform"), spec))
    return [{**row, "label error (random weights)": str(teacher.label_error)}]


def vllm(anchors: Path) -> Rows:
    """vLLM's own figures by the anchor script, if it is installed here."""
    if importlib.util.find_spec("vllm") is None or not (anchors / "vllm_anchor.py").exists():
        return []
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("gen", "pool"):
            command = [sys.executable, str(anchors / "vllm_anchor.py"), mode]
            subprocess.run(command, env={**os.environ, "OUT": folder}, check=False, timeout=300)
            file = Path(folder) / f"vllm_{mode}.json"
            found |= json.loads(file.read_text()) if file.exists() else {f"vllm {mode}": "failed"}
    return [found]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print each table's figures as JSON too")
    parser.add_argument("--anchors", type=Path, default=Path("../shared/anchors"))
    parser.add_argument("--quick", action="store_true", help="only what is served, with its references")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement over gRPC")
    options = parser.parse_args()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Qwen2.5-7B shape"
    tables: list[tuple[str, Rows]] = [("vLLM, tokens/s", vllm(options.anchors))]
    model = gpu_teacher.random_model()
    reference = gpu_teacher.eager(model)
    tables.append(("transformers eager, 8 x 2048, tokens/s", [{k: round(v) for k, v in reference.items()}]))
    print(tables[-1], flush=True)
    tables.append(("bare backend, label tokens/s", bare(model, quick=options.quick)))
    teacher = gpu_teacher.backend(model)
    together, alone = asyncio.run(served(teacher, options.seconds))
    tables += [("served: four client processes over gRPC", together), ("one request of 2 x 2,048 tokens, ms", alone)]
    if not options.quick:
        tables.append(("one call of so many sequences of 2,048 tokens", gpu_teacher.growth(teacher)))
        tables.append(("a prompt that 8 sequences share", [gpu_teacher.shared_prefix(model)]))
        tables.append(("float8", float8(model)))
    for title, rows in tables:
        if rows:
            show(f"{title}; {where}", rows, as_json=options.json)


if __name__ == "__main__":
    main()
