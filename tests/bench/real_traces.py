"""What a small instruct model's traces are worth: `student-trainer traces` against the real model behind the server's engine and real gRPC.

In: a model folder, how many template questions, overrides of the traces config; out: accept rate and reasons, on standard output as JSON and in OUT.
One torch thread, no Ray; the same command goes on with what is in OUT.

    LYCEUM_REAL=/work/real nice -n 10 python -m tests.bench.real_traces --out /tmp/traces --questions 200 sampling.samples=1 style=free
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from rich.console import Console

from student_trainer.config.traces import load_traces_config
from student_trainer.errors import RunError
from student_trainer.traces.folder import Stats
from student_trainer.traces.run import make_traces
from teacher_server.config.server import TeacherConfig
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.testing.loopback import serve
from tests.bench.trace_questions import write
from tests.e2e.classroom import EngineService


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--model", default=f"{os.environ.get('LYCEUM_REAL', '')}/smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("overrides", nargs="*", help="of the traces config")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    rows = write(given.out / "questions.jsonl", given.questions)
    backend = {"kind": "transformers", "model": given.model, "dtype": given.dtype, "device": "cpu"}
    service = EngineService(TeacherEngine(TeacherConfig.model_validate({"name": "teacher", "backend": backend})))
    with serve(service) as server:
        tree = {
            "output_dir": str(given.out / "run"), "tokenizer": given.model, "data": {"sources": [str(rows)]},
            "teacher": {"address": server.address, "answer_s": 3600}, "sampling": {"samples": 1, "max_new_tokens": 300},
            "accept": {"min_rate": 0.0}, "prompts_per_call": 16, "calls": 2,
        }  # fmt: skip
        file = given.out / "traces.yaml"
        file.write_text(yaml.safe_dump(tree))
        with contextlib.suppress(RunError):  # nothing accepted: its figures are in the folder
            make_traces(load_traces_config(file, given.overrides), resume=True, console=Console(stderr=True))
        service.stop()
    figures = json.loads((given.out / "run" / "stats.json").read_text())
    stats = Stats(**{field.name: figures[field.name] for field in fields(Stats)})
    unfinished = stats.rejected.get("unfinished", 0)
    cut = stats.rejected.get("cut_text", 0)
    print(json.dumps({
        "questions": stats.questions, "samples": stats.samples, "finished": 1 - unfinished / max(1, stats.samples),
        "finished_and_not_cut": 1 - (unfinished + cut) / max(1, stats.samples),
        "accepted": stats.accepted, "accept_rate": stats.rate, "rejected": dict(Counter(stats.rejected).most_common()),
        "with_trace": stats.with_trace, "tokens": stats.tokens, "seconds": round(stats.seconds, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
