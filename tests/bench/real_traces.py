"""What a small instruct model's traces are worth: `student-trainer traces` against the real model behind the server's engine and real gRPC.

In: a model folder, arms of `NAME:QUESTIONS:OVERRIDES` (overrides of the traces config, with commas); out: of each arm the accept rate and the
reasons, a line of JSON each, and its folder below OUT. One torch thread, no Ray. The same command goes on with what is in OUT.

    LYCEUM_REAL=/work/real nice -n 10 python -m tests.bench.real_traces --out /tmp/traces steps:200:style=steps quotes:200:style=quotes \\
        free:200:style=free,data.builtin_examples=true before:200:style=offsets,sampling.fit_budget=false
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from student_trainer.config.traces import load_traces_config
from student_trainer.errors import RunError
from student_trainer.traces.run import make_traces
from teacher_server.config.server import TeacherConfig
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.testing.loopback import serve
from tests.bench.trace_questions import write
from tests.e2e.classroom import EngineService


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=f"{os.environ.get('LYCEUM_REAL', '')}/smollm2")
    parser.add_argument("--per-call", type=int, default=16)
    parser.add_argument("arms", nargs="+", help="NAME:QUESTIONS:OVERRIDE,OVERRIDE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    backend = {"kind": "transformers", "model": given.model, "dtype": "float32", "device": "cpu"}
    service = EngineService(TeacherEngine(TeacherConfig.model_validate({"name": "teacher", "backend": backend})))
    with serve(service) as server:
        for arm in given.arms:
            name, count, overrides = arm.split(":", 2)
            folder = given.out / name
            folder.mkdir(parents=True, exist_ok=True)
            tree = {
                "output_dir": str(folder / "run"), "tokenizer": given.model,
                "data": {"sources": [str(write(folder / "questions.jsonl", int(count)))]},
                "teacher": {"address": server.address, "answer_s": 3600}, "accept": {"min_rate": 0.0},
                "sampling": {"samples": 1, "max_new_tokens": 300}, "prompts_per_call": given.per_call,
            }  # fmt: skip
            file = folder / "traces.yaml"
            file.write_text(yaml.safe_dump(tree))
            with contextlib.suppress(RunError):  # nothing accepted: its figures are in the folder
                config = load_traces_config(file, [one for one in overrides.split(",") if one])
                make_traces(config, resume=True, console=Console(stderr=True))
            print(json.dumps({"arm": name, **figures(folder / "run")}), flush=True)
        service.stop()


def figures(folder: Path) -> dict[str, Any]:
    """Of a run that has ended."""
    kept = json.loads((folder / "stats.json").read_text())
    samples, rejected = max(1, kept["samples"]), kept["rejected"]
    unfinished, cut = rejected.get("unfinished", 0), rejected.get("cut_text", 0)
    return {
        "questions": kept["questions"], "samples": kept["samples"], "finished": 1 - unfinished / samples,
        "finished_and_not_cut": 1 - (unfinished + cut) / samples, "accepted": kept["accepted"],
        "accept_rate": kept["accept_rate"], "rejected": dict(Counter(rejected).most_common()),
        "tokens": kept["tokens"], "seconds": round(kept["seconds"], 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
