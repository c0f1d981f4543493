"""Label tokens per second on one GPU, end to end: seen by client processes over gRPC, and what each stage takes.

The teacher is a random model in the shape of Qwen2.5-7B in bfloat16; the server is the product's edge and engine in one
process without Ray and, with `--ray`, `teacher-server up` with Ray Serve as well (see pack_gpu.sh). References of the same run:
transformers eager, our backend in a loop without a server, and vLLM by the scripts of ../shared/anchors where it is installed.
    python -m tests.bench.gpu_server [--json] [--anchors FOLDER] [--quick] [--ray]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import signal
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
from teacher_server.backends.transformers.backend import Job, TransformersModel
from teacher_server.config.backends import FakeBackend
from teacher_server.config.server import EdgeConfig, LimitsConfig, StoreConfig, TeacherConfig
from teacher_server.edge.server import EdgeServer
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.artifacts.messages import Artifact, ArtifactCall, ArtifactHeader
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.info import ArtifactInfo, TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.score import codec
from teacher_wire.tokenizing.messages import TokenizeCall, TokenizedRow
from tests.bench import gpu_ray, gpu_teacher
from tests.bench.gpu_client import (
    Seen,
    TimedIterator,
    free_port,
    pull_by_processes,
    quiet_stages,
    seen_by_clients,
    window,
)
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

    def artifact(self, wanted: ArtifactInfo) -> Artifact:
        return self._model.artifact(wanted)

    def generation(self, *args: Any, **settings: Any) -> Any:
        """The backend's own."""
        return self._model.generation(*args, **settings)

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

    async def artifact_header(self, call: ArtifactCall) -> ArtifactHeader:
        return await self._engine.artifact_header(call)

    async def artifact_bytes(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        return await self._engine.artifact_bytes(call, offset, size)

    async def tokenize(self, call: TokenizeCall) -> list[TokenizedRow]:
        return await self._engine.reader.tokenize(call)


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


async def served(model: TransformersModel, seconds: float) -> tuple[Rows, Rows]:
    """What four client processes see at once, and the stages of one request when nobody else asks."""
    port = free_port()
    edge, engine, backend = await started(model, port)
    encode = codec.encode_chunks = TimedIterator(codec.encode_chunks)  # type: ignore[assignment]

    async def ask(labels: str, lengths: str, clients: int, depth: int, seconds: float) -> Seen:
        backend.done.clear()
        encode.seconds = 0.0
        transport = gpu_teacher.SPECS[labels].name
        return await pull_by_processes(f"127.0.0.1:{port}", transport, lengths, clients, depth, seconds)

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
        seen = await ask(labels, "uniform", 1, 1, 5.0)
        encode_ms = encode.seconds / len(seen[0]["answers"]) * 1e3
        alone.append({"labels": labels, **quiet_stages(seen, {"encode": encode_ms})})
        print(alone[-1], flush=True)
    await edge.drain()
    await engine.stop()
    return together, alone


def loaded(seen: Seen, done: list[tuple[float, int, int]]) -> dict[str, object]:
    """What the clients saw, with the GPU's idle time and the batches as the backend itself noted them."""
    start_s, end_s = window(seen)
    batches = [batch for batch in done if start_s < batch[0] < end_s]
    took_s = batches[-1][0] - batches[0][0]
    return {
        **seen_by_clients(seen),
        "GPU idle": 1 - sum(busy_us for _, busy_us, _ in batches[1:]) / 1e6 / took_s,
        "tokens a batch": float(np.mean([tokens for _, _, tokens in batches])),
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
            script = subprocess.Popen(command, env={**os.environ, "OUT": folder}, start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                script.wait(timeout=240)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)  # its engine may outlive it, with the GPU's memory
            script.wait()
            time.sleep(3)
            file = Path(folder) / f"vllm_{mode}.json"
            found |= json.loads(file.read_text()) if file.exists() else {f"vllm {mode}": "failed"}
    print(found, flush=True)
    return [found]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print each table's figures as JSON too")
    parser.add_argument("--anchors", type=Path, default=Path("../shared/anchors"))
    parser.add_argument("--quick", action="store_true", help="only what is served, with its references")
    parser.add_argument(
        "--ray", action="store_true", help="also serve the same model by `teacher-server up` with Ray Serve"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement over gRPC")
    options = parser.parse_args()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Qwen2.5-7B shape"
    tables: list[tuple[str, Rows]] = [("vLLM, tokens/s", vllm(options.anchors))]
    model = gpu_teacher.random_model()
    reference = gpu_teacher.eager(model)
    tables.append(("transformers eager, 8 x 2048, tokens/s", [{k: round(v) for k, v in reference.items()}]))
    print(tables[-1], flush=True)
    tables.append(("bare backend, label tokens/s", bare(model, quick=options.quick)))
    print(tables[-1], flush=True)
    teacher = gpu_teacher.backend(model)
    together, alone = asyncio.run(served(teacher, options.seconds))
    print(together, alone, flush=True)
    tables += [("served: four client processes over gRPC", together), ("one request of 2 x 2,048 tokens, ms", alone)]
    if options.ray:
        labels = {name: spec.name for name, spec in gpu_teacher.SPECS.items()}
        try:
            tables += gpu_ray.tables(model, labels, gpu_ray.Asked(CLIENTS, seconds=options.seconds))
        except RuntimeError as error:
            print(error, flush=True)  # the other figures are worth having
    if not options.quick:
        tables.append(("one call of so many sequences of 2,048 tokens", gpu_teacher.growth(teacher)))
        tables.append(("a prompt that 8 sequences share", [gpu_teacher.shared_prefix(model)]))
        tables.append(("float8", float8(model)))
    for title, rows in tables:
        if rows:
            show(f"{title}; {where}", rows, as_json=options.json)
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "gpu_server.json").write_text(
            json.dumps({"where": where, "tables": tables}, indent=1, default=str)
        )


if __name__ == "__main__":
    main()
