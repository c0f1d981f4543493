"""Label tokens per second through the whole product: `teacher-server up` with Ray Serve, seen by client processes over gRPC.

The model is written to a folder first (in memory where /dev/shm has room), since that is what the product loads. Used by
`gpu_server --ray`; by itself it takes a tiny model on a machine without a GPU, to see that all of it works, or a folder on one with a GPU:
    python -m tests.bench.gpu_ray [--seconds 5]
    python -m tests.bench.gpu_ray --write /dev/shm/7b        # then, in the trees of two revisions one after the other:
    python -m tests.bench.gpu_ray --model /dev/shm/7b --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor

from tests.bench.gpu_client import Figures, free_port, pull_by_processes, quiet_stages, seen_by_clients
from tests.bench.table import show
from tests.tiny import make_model, make_tokenizer

SHARDS = 8
START_LIMIT_S = 240
Rows = list[dict[str, object]]
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class Asked:
    """How hard the clients ask.

    Attributes:
        clients, depth: processes, and requests that each keeps open.
        tokens: of a request.
        seconds: of each measurement.
    """

    clients: int = 4
    depth: int = 4
    tokens: int = 4096
    seconds: float = 12.0


def write_model(model: Any, folder: Path) -> Path:
    """A model's folder as the hub has it, written by several threads: 15 GB in a few seconds where the disk is memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    sizes = [0] * SHARDS
    for name, tensor in model.state_dict().items():
        smallest = sizes.index(min(sizes))
        shards[smallest][name] = tensor
        sizes[smallest] += tensor.nbytes
    names = [f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)]
    with ThreadPoolExecutor(SHARDS) as pool:
        list(pool.map(_write_shard, [folder / name for name in names], shards))
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_shard(file: Path, shard: Mapping[str, Tensor]) -> None:
    """A safetensors file; writing releases the interpreter, which the library's own `save_file` does not for a whole shard."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in shard.items():
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for tensor in shard.values():
            out.write(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))


def roomy_folder(needed_bytes: int) -> Path:
    """A fresh folder in memory if it has room for so much and as much again, else on disk."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and shutil.disk_usage(shared).free > 1.5 * needed_bytes
    return Path(tempfile.mkdtemp(prefix="lyceum-ray-", dir=shared if in_memory else None))


class Server:
    """`teacher-server up` as a user starts it."""

    def __init__(self, model: Path, log_file: Path, *, gpu: bool, gpus_of_ray: int) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.log_file = log_file
        backend: dict[str, object] = {"kind": "transformers", "model": str(model)}
        backend |= {} if gpu else {"dtype": "float32", "device": "cpu"}
        config = {
            "edge": {"port": int(self.address.rsplit(":", 1)[1]), "drain_s": 5},
            "ray": {"num_cpus": max(4, os.cpu_count() or 1), "object_store_mb": 4096 if gpu else 100},
            "teachers": [
                {
                    "name": "t",
                    "num_cpus": 1,
                    "num_gpus": gpus_of_ray,
                    "limits": {"max_reply_mb": 256},
                    "backend": backend,
                }
            ],
        }
        self._config_file = model / "server.yaml"
        self._config_file.write_text(yaml.safe_dump(config))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds until it was ready. Raises RuntimeError with its log if it does not come up."""
        began_s = time.monotonic()
        # The lent machines' memory grows as it is used: Ray would take the first tens of gigabytes for all and kill the replica.
        env = {**os.environ, "RAY_memory_monitor_refresh_ms": "0"}
        with self.log_file.open("w") as log:
            command = [sys.executable, "-m", "teacher_server.cli", "up", str(self._config_file)]
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=env
            )
        while "ready" not in self.log_file.read_text():
            if self._process.poll() is not None or time.monotonic() - began_s > START_LIMIT_S:
                self.stop()
                raise RuntimeError(f"teacher-server did not come up:\n{self.log_file.read_text()[-4000:]}")
            time.sleep(0.1)
        return time.monotonic() - began_s

    def cpu_s(self) -> float:
        """CPU time of its processes so far: edge, replica, and Ray's own."""
        assert self._process is not None
        root = psutil.Process(self._process.pid)
        spent = 0.0
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent += times.user + times.system
        return spent

    def stop(self) -> None:
        """Ends it; kills what does not go."""
        assert self._process is not None
        if self._process.poll() is not None:
            return
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=40)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        self._process.wait()


@contextmanager
def serving(model: Path, *, gpu: bool) -> Iterator[tuple[Server, float]]:
    """A server that is up, and how long it took."""
    log_file = Path(os.environ.get("OUT", tempfile.gettempdir())) / "teacher-server.log"
    server = Server(model, log_file, gpu=gpu, gpus_of_ray=int(gpu))
    try:
        try:
            ready_s = server.start()
        except RuntimeError as error:
            if "num_gpus" not in str(error):
                raise
            print(f"Ray sees no GPU; the replica takes the one that torch sees: {error}", flush=True)
            server = Server(model, log_file, gpu=gpu, gpus_of_ray=0)
            ready_s = server.start()
        yield server, ready_s
    finally:
        server.stop()


def served_by_ray(model: Path, labels: Mapping[str, str], asked: Asked, *, gpu: bool) -> tuple[Rows, Rows]:
    """What client processes see at once, and the stages of one request when nobody else asks.

    Args:
        model: a folder.
        labels: transports by the name they have in the table.
        asked: by the clients.
        gpu: whether the server gets one.
    """
    with serving(model, gpu=gpu) as (server, ready_s):
        print(f"teacher-server up with Ray Serve: ready after {ready_s:.0f} s", flush=True)

        def ask(transport: str, lengths: str, clients: int, depth: int, seconds: float) -> list[dict[str, Any]]:
            return asyncio.run(
                pull_by_processes(server.address, transport, lengths, clients, depth, seconds, tokens=asked.tokens)
            )

        together: Rows = []
        alone: Rows = []
        for name, transport in labels.items():
            for lengths in ("uniform", "mixed"):
                cpu_s = server.cpu_s()
                seen = ask(transport, lengths, asked.clients, asked.depth, asked.seconds)
                tokens = sum(tokens for client in seen for _, _, tokens in client["answers"])
                figures: Figures = {
                    **seen_by_clients(seen),
                    "server CPU us/token": (server.cpu_s() - cpu_s) / tokens * 1e6,
                    "client CPU us/token": sum(client["cpu_s"] for client in seen) / tokens * 1e6,
                }
                together.append({"labels": name, "lengths": lengths, **figures})
                print(together[-1], flush=True)
            alone.append({"labels": name, **quiet_stages(ask(transport, "uniform", 1, 1, min(5.0, asked.seconds)), {})})
            print(alone[-1], flush=True)
    return together, alone


def tables(model: Any, labels: Mapping[str, str], asked: Asked) -> list[tuple[str, Rows]]:
    """Both tables for a model on the GPU, which stays loaded here too."""
    began_s = time.monotonic()
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    folder = roomy_folder(nbytes)
    try:
        write_model(model, folder)
        print(f"model folder of {nbytes / 1e9:.1f} GB in {folder}: {time.monotonic() - began_s:.0f} s", flush=True)
        torch.cuda.empty_cache()
        together, alone = served_by_ray(folder, labels, asked, gpu=True)
    finally:
        shutil.rmtree(folder)
    return [
        ("with Ray Serve: four client processes over gRPC", together),
        ("with Ray Serve: one request of 2 x 2,048 tokens, ms", alone),
    ]


def main() -> None:
    """A tiny model on the CPU, or one that was written before on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, help="only write the model of gpu_server into this folder")
    parser.add_argument("--model", type=Path, help="what --write wrote, to be served on the GPU")
    options = parser.parse_args()
    if options.write:
        from tests.bench.gpu_teacher import random_model

        write_model(random_model(), options.write)
        return
    labels = {"hidden": "hidden", "top-64": "top_k"}
    if options.model:
        together, alone = served_by_ray(options.model, labels, Asked(seconds=options.seconds), gpu=True)
        show("with Ray Serve: four client processes over gRPC", together, as_json=options.json)
        show("with Ray Serve: one request of 2 x 2,048 tokens, ms", alone, as_json=options.json)
        return
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        made = make_model(Path(scratch) / "made", "qwen2", hidden=64, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_pretrained(made)
        folder = write_model(model, Path(scratch) / "written")
        asked = Asked(clients=2, depth=2, tokens=128, seconds=options.seconds)
        together, alone = served_by_ray(folder, labels, asked, gpu=False)
    show("with Ray Serve, tiny model: clients at once", together, as_json=options.json)
    show("with Ray Serve, tiny model: one request, ms", alone, as_json=options.json)


if __name__ == "__main__":
    main()
