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

import torch

from teacher_server.backends.base import ModelFacts
from teacher_server.backends.transformers_backend import Job, TransformersModel
from teacher_server.config import EdgeConfig, FakeBackend, LimitsConfig, TeacherConfig
from teacher_server.edge.server import EdgeServer
from teacher_server.engine import TeacherEngine
from teacher_wire import codec
from teacher_wire.messages import HeadHeader, ScoreCall, TeacherHead, TeacherInfo, TeacherSignals
from tests.bench import gpu_teacher
from tests.bench.gpu_client import TimedIterator
from tests.bench.table import show

CLIENTS, WARM_S = 4, 4.0
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


async def served(model: TransformersModel, seconds: float) -> Rows:
    """The table of what four client processes see."""
    backend = Watched(model)
    config = TeacherConfig(name="t", backend=FakeBackend(), limits=LimitsConfig(max_reply_mb=256))
    engine = TeacherEngine(config, backend)
    engine.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    edge = EdgeServer(EdgeConfig(port=port), Local(engine))
    await edge.start()
    encode = codec.encode_chunks = TimedIterator(codec.encode_chunks)  # type: ignore[assignment]
    rows: Rows = []
    for lengths in ("uniform", "mixed"):
        for labels, spec in gpu_teacher.SPECS.items():
            command = [sys.executable, "-m", "tests.bench.gpu_client", f"127.0.0.1:{port}"]
            command += ["--transport", spec.transport, "--lengths", lengths, "--seconds", str(seconds + WARM_S)]
            backend.done.clear()
            encode.seconds, cpu_s = 0.0, time.process_time()
            clients = [
                await asyncio.create_subprocess_exec(*command, "--seed", str(seed), stdout=subprocess.PIPE)
                for seed in range(CLIENTS)
            ]
            seen = [json.loads((await client.communicate())[0]) for client in clients]
            figures = stages(seen, backend.done, seconds)
            tokens = sum(tokens for client in seen for _, _, tokens in client["answers"])
            figures["encode us/token"] = encode.seconds / tokens * 1e6
            figures["server CPU us/token"] = (time.process_time() - cpu_s) / tokens * 1e6
            rows.append({"labels": labels, "lengths": lengths, **figures})
            print(rows[-1], flush=True)
    await edge.drain()
    await engine.stop()
    return rows


def stages(seen: list[dict[str, Any]], done: list[tuple[float, int, int]], seconds: float) -> dict[str, object]:
    """What the clients and the backend noted, over the last `seconds` in which all clients were there."""
    end_s = min(client["answers"][-1][0] for client in seen)
    end_s = min(end_s, min(client["answers"][0][0] for client in seen) + WARM_S + seconds)
    start_s = max(client["answers"][0][0] for client in seen) + 1.0
    within = [
        (answer, stage)
        for client in seen
        for answer, stage in zip(client["answers"], client["stages"], strict=True)
        if start_s <= answer[0] < end_s
    ]
    tokens = sum(answer[2] for answer, _ in within)
    batches = [(busy_us, count) for when, busy_us, count in done if start_s <= when < end_s]
    every = sum(answer[2] for client in seen for answer in client["answers"])
    median = lambda values: statistics.median(values) / 1e3  # noqa: E731
    rest_ms = [1e3 * answer[1] - sum(stage) / 1e3 for answer, stage in within]
    return {
        "label tokens/s": tokens / (end_s - start_s),
        "GPU idle": 1 - sum(busy_us for busy_us, _ in batches) / 1e6 / (end_s - start_s),
        "batch tokens": sum(count for _, count in batches) / len(batches),
        "queue ms": median([stage[0] for _, stage in within]),
        "forward ms": median([stage[1] for _, stage in within]),
        "reduce ms": median([stage[2] for _, stage in within]),
        "copy to verified ms": statistics.median(rest_ms),
        "bytes/token": sum(client["payload_bytes"] for client in seen) / every,
        "decode us/token": sum(client["decode_s"] for client in seen) / every * 1e6,
        "verify us/token": sum(client["verify_s"] for client in seen) / every * 1e6,
    }


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
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement over gRPC")
    options = parser.parse_args()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Qwen2.5-7B shape"
    tables: list[tuple[str, Rows]] = [("vLLM, tokens/s", vllm(options.anchors))]
    model = gpu_teacher.random_model()
    reference = gpu_teacher.eager(model)
    tables.append(("transformers eager, 8 x 2048, tokens/s", [{k: round(v) for k, v in reference.items()}]))
    print(tables[-1], flush=True)
    tables.append(("bare backend, label tokens/s", bare(model, quick=options.quick)))
    teacher = gpu_teacher.backend(model)
    tables.append(("served: four client processes over gRPC", asyncio.run(served(teacher, options.seconds))))
    if not options.quick:
        tables.append(("one call of so many sequences of 2,048 tokens", gpu_teacher.growth(teacher)))
        tables.append(("a prompt that 8 sequences share", [gpu_teacher.shared_prefix(model)]))
        tables.append(("float8", float8(model)))
    for title, rows in tables:
        if rows:
            show(f"{title}; {where}", rows, as_json=options.json)


if __name__ == "__main__":
    main()
