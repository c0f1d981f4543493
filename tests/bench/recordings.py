"""What recorded passes cost on one GPU: seconds to record a length, and memory held as lengths come, against plain passes of the same.

Model of `student_memory` (1.5B, LoRA, gradient checkpointing, compiled layers), 2 sequences of 256 to 2,048 tokens in 25 lengths, each
three times, shuffled and from the shortest to the longest (no freed block is ever large enough for the next). A way is a process of its own; with
"expandable" torch's allocator grows its segments in place.
    python -m tests.bench.recordings [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time

import torch

from student_trainer.model.speed import compiled, cuda_graphs
from student_trainer.model.speed.cuda_recorder import CudaRecorder
from tests.bench.student_memory import GIB, SEQUENCES, Bench, V
from tests.bench.table import show

LENGTHS = sorted({cuda_graphs.padded_length(n) for n in range(256, 2049)})
ORDERS = ("ascending", "shuffled")
WAYS = ("plain", "recorded", "recorded, expandable")


def measured(order: str, way: str) -> dict[str, object]:
    """One row, in this process."""
    bench = Bench()
    bench.place_head(False)
    bench.signals, bench.rows = {}, {}
    bench.place_layers(True)
    compiled.install(bench.student.model)
    troubles: list[str] = []
    trained = [p for p in bench.student.causal_lm.get_decoder().parameters() if p.requires_grad]
    body = None
    if way != "plain":
        body = cuda_graphs.GraphedBody(bench.student.forward, trained, CudaRecorder(), troubles.append, worth=2)
    forward = body or bench.student.forward
    lengths = list(LENGTHS)
    if order == "shuffled":
        random.Random(0).shuffle(lengths)

    def step(length: int) -> float:
        ids_BL = torch.randint(0, V, (SEQUENCES, length), device="cuda")
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            state_BLD = forward(ids_BL).final_BLD
        state_BLD.float().mean().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - began_s

    step(512)
    torch.cuda.empty_cache()
    first = [step(length) for length in lengths]
    second = [step(length) for length in lengths]
    third = [step(length) for length in lengths]
    row: dict[str, object] = {
        "order": order,
        "way": way,
        "recorded": body.recorded if body else 0,
        "first s": round(sum(first) / len(first), 3),
        "second s": round(sum(second) / len(second), 3),
        "third s": round(sum(third) / len(third), 3),
        "held GiB": round(torch.cuda.memory_reserved() / GIB, 2),
        "most used GiB": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "trouble": " ".join(troubles),
    }
    return row


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON too")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one)))
        return
    rows = []
    for order in ORDERS:
        for way in WAYS:
            environment = dict(os.environ)
            if "expandable" in way:
                environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
            command = [sys.executable, "-m", "tests.bench.recordings", "--one", order, way]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            print(run.stdout or run.stderr[-800:], flush=True)
            if run.returncode == 0:
                rows.append(json.loads(run.stdout.splitlines()[-1]))
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    show(f"recorded passes, {len(LENGTHS)} lengths of {SEQUENCES} sequences; {where}", rows, as_json=options.json)


if __name__ == "__main__":
    main()
