"""One replica, 1 to 8 students: label tokens per second in all, against the bare backend called in a loop in the same run.

The teacher is a random Qwen2 of 6 layers and 256 channels on one thread, served by `teacher-server up` (Ray Serve, gRPC on
loopback); every student is a process of its own that keeps four requests open and never asks the same twice.
    python -m tests.bench.sharing [--json]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from teacher_wire.score.signals import spec_of
from tests.bench.table import arguments, show
from tests.e2e.conftest import Server, server_config, serving
from tests.soak.load import fresh_batch
from tests.tiny import make_model

VOCAB, HIDDEN, LAYERS, K = 4096, 256, 6, 64
SEQUENCES, LENGTH = 8, 256
SECONDS = 15.0
STUDENTS = (1, 2, 4, 8)


def backend_config(model: Path) -> dict[str, object]:
    """Of both the bare and the served teacher."""
    return {"kind": "transformers", "model": str(model), "dtype": "float32", "device": "cpu", "threads": 1}


def bare(model: Path) -> float:
    """Tokens a second of the backend in this process, nothing around it."""
    from teacher_server.backends import build_backend
    from teacher_server.config.backends import TransformersBackend

    backend = build_backend(TransformersBackend.model_validate(backend_config(model)), deterministic=False)
    rng, spec, tokens = np.random.default_rng(0), spec_of("top_k", VOCAB, k=K), 0
    batches = [fresh_batch(rng, SEQUENCES, LENGTH, VOCAB) for _ in range(200)]
    backend.score([(batches[0], spec)])
    began_s = time.perf_counter()
    for batch in batches[1:]:
        backend.score([(batch, spec)])
        tokens += batch.tokens
        if time.perf_counter() - began_s > SECONDS:
            break
    return tokens / (time.perf_counter() - began_s)


def pull(server: Server, students: int, seed: int) -> tuple[float, float]:
    """Tokens a second of all students, and CPU microseconds a token outside the forward pass: edge and students."""
    command = [sys.executable, "-m", "tests.soak.load", server.address, "--depth", "4", "--k", str(K)]
    command += ["--sequences", str(SEQUENCES), "--length", str(LENGTH), "--seconds", str(SECONDS)]
    processes = [
        subprocess.Popen([*command, "--seed", str(seed + i)], stdout=subprocess.PIPE, text=True)
        for i in range(students)
    ]
    edges = [process for process in server.processes() if "edge:edge" in " ".join(process.cmdline())]
    time.sleep(3)
    cpu_s = -sum(sum(edge.cpu_times()[:2]) for edge in edges)
    results = [json.loads(process.communicate()[0]) for process in processes]
    cpu_s += sum(sum(edge.cpu_times()[:2]) for edge in edges)
    times = sorted(when for result in results for when, _ in result["latencies"])
    begin, end = times[0] + 2, times[-1] - 1  # all are there, none has gone
    answered = sum(begin <= when < end for when in times)
    tokens = answered * SEQUENCES * LENGTH
    return tokens / (end - begin), cpu_s / (SECONDS - 1) / (tokens / (end - begin)) * 1e6


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__ or "")
    row_bytes = spec_of("top_k", VOCAB, k=K).row_bytes(HIDDEN, 4)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(
            Path(folder) / "model", hidden=HIDDEN, vocab=VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=LENGTH
        )
        reference = bare_in_own_process(model)
        teacher = {
            "name": "t",
            "num_cpus": 1,
            "backend": backend_config(model),
            "batch": {"max_tokens": SEQUENCES * LENGTH},
        }
        rows = [
            {
                "students": "bare loop",
                "label tokens/s": reference,
                "of bare": 1.0,
                "edge us/token": 0.0,
                "bytes/token": 0,
            }
        ]
        with serving(Path(folder), server_config(teacher)) as server:
            pull(server, 1, 999)  # warms up
            for students in STUDENTS:
                rate, cost_us = pull(server, students, 100 * students)
                rows.append(
                    {
                        "students": str(students),
                        "label tokens/s": rate,
                        "of bare": rate / reference,
                        "edge us/token": cost_us,
                        "bytes/token": row_bytes,
                    }
                )
    cores = psutil.cpu_count()
    show(
        f"one replica on one thread of {cores} cores, top-{K} of {VOCAB}, {SEQUENCES} x {LENGTH} tokens a request",
        rows,
        as_json=options.json,
    )


def bare_in_own_process(model: Path) -> float:
    """As the replica has it: torch started afresh, nothing else in the process."""
    code = f"from pathlib import Path; from tests.bench.sharing import bare; print(bare(Path({str(model)!r})))"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as Ray sets it for a replica
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
