"""What a student's step costs with two teachers, beside the slower of them alone; CPU.

Fake teachers in processes of their own, each on a port of its own, answer one request after another and take `--slow-ms` and `--fast-ms` for each. A small student learns from the
slower one, from the faster one, and from both at once, by the product's own `train`; labels are not kept. The steps of the three runs after the first tenth are timed by the clock, in turns
`--repeat` times over, since the machine may be busy with other things.

    python -m tests.bench.two_teachers [--slow-ms 300] [--fast-ms 150] [--steps 40] [--repeat 3] [--json]

Columns: milliseconds of a step, the median of the repeats; its ratio to the slower teacher alone; the share of the time in which the student waited for labels; with `--slow-ms 0 --fast-ms 0` the student itself is the slow one,
and the ratio says what the second teacher's part of the loss costs. Gate (issue 17): a ratio of at most 1.05 where the teacher is the slow one.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.bench.table import show

LAYERS, HIDDEN, BATCH, TOKENS = 2, 64, 4, 100
BOUND = 1.05
WEIGHTS = {"slow": 0.6, "fast": 0.4}


def serve_paced(folder: str, name: str, seconds: float, to: Connection) -> None:
    """A fake teacher that answers one request at a time, until its process is ended."""
    from teacher_wire.core.calls import ScoreCall
    from teacher_wire.core.signals import TeacherSignals
    from teacher_wire.testing.fake_teacher import FakeTeacher
    from teacher_wire.testing.loopback import serve
    from tests.student_trainer.conftest import fake_for

    turn: list[asyncio.Lock] = []

    class Paced(FakeTeacher):
        async def score(self, call: ScoreCall) -> TeacherSignals:
            if not turn:
                turn.append(asyncio.Lock())
            async with turn[0]:
                await asyncio.sleep(seconds)
                return await super().score(call)

    like = fake_for(Path(folder))
    own = Paced(
        name=name, seed=len(name) + int(1000 * seconds), vocab_rows=like.vocab_rows, hidden_size=HIDDEN, tokenizer_sha256=like.tokenizer_sha256,
        base_tokenizer_sha256=like.base_tokenizer_sha256, added_tokens=like.added_tokens, chat_template_sha256=like.chat_template_sha256,
    )  # fmt: skip
    with serve(own) as server:
        to.send(server.address)
        to.recv()


@contextmanager
def teachers(folder: Path, seconds: dict[str, float]) -> Iterator[dict[str, str]]:
    """Their addresses, by name."""
    context = get_context("spawn")
    found, running = {}, []
    try:
        for name, pause_s in seconds.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_paced, args=(str(folder), name, pause_s, theirs), daemon=True)
            process.start()
            running.append((process, ours))
            found[name] = ours.recv()
        yield found
    finally:
        for process, ours in running:
            ours.send("end")
            process.join(10)
            process.kill()


def write_rows(file: Path) -> None:
    """Rows of all lengths up to `TOKENS`, in the words of the tiny tokenizer."""
    from tests.tiny import WORDS

    rows = [
        {"instruction": f"Go on {i}.", "output": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(20 + i % 10))} for i in range(400)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings_of(work: Path, names: list[str], addresses: dict[str, str], steps: int) -> dict[str, Any]:
    """The config of one run."""
    listed = [{"name": name, "address": addresses[name]} for name in names]
    asked = (
        {"teachers": [one | {"weight": WEIGHTS[one["name"]]} for one in listed]}
        if len(names) > 1
        else {"teacher": listed[0]}
    )
    return {
        "run": {"output_dir": str(work / "run"), "cache_dir": str(work / "cache")},
        "model": {"path": str(work / "student"), "dtype": "float32", "lora": None},
        "data": {"train": [str(work / "rows.jsonl")], "max_tokens": TOKENS},
        "cache": {"labels": False},
        "labels": {"transport": "hidden"},
        "train": {
            "batch_size": BATCH,
            "accumulation": 1,
            "max_steps": steps,
            "log_steps": max(1, steps // 10),
            "deterministic": False,
        },
        **asked,
    }


def timed(tree: dict[str, Any]) -> tuple[float, float, dict[str, Any]]:
    """Seconds per step after the first tenth, the share of them spent waiting for labels, and the last entry of the log."""
    import time

    from rich.console import Console
    from transformers import TrainerCallback

    from student_trainer.config.run import parse_config
    from student_trainer.training import trainer as training
    from student_trainer.training.run import train

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class Clocked(training.DistillationTrainer):
        def __init__(self, *args: Any, callbacks: list[Any], **options: Any) -> None:
            super().__init__(*args, callbacks=[*callbacks, Clock()], **options)

    from student_trainer.training import run

    shutil.rmtree(tree["run"]["output_dir"], ignore_errors=True)
    plain = run.DistillationTrainer
    run.DistillationTrainer = Clocked  # type: ignore[misc]
    try:
        result = train(parse_config(tree, "two teachers"), console=Console(file=io.StringIO()))
    finally:
        run.DistillationTrainer = plain  # type: ignore[misc]
    log = [json.loads(line) for line in (result.output_dir / "train_log.jsonl").read_text().splitlines()]
    entries = [entry for entry in log if "wait_share" in entry][1:]
    skipped = len(ends) // 10
    return (
        (ends[-1] - ends[skipped]) / (len(ends) - 1 - skipped),
        statistics.fmean(e["wait_share"] for e in entries),
        entries[-1],
    )


def main() -> None:
    """The bench; see module."""
    parser = argparse.ArgumentParser(description="A student's step with two teachers, beside the slower of them alone.")
    parser.add_argument("--slow-ms", type=float, default=300)
    parser.add_argument("--fast-ms", type=float, default=150)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch

    from tests.tiny import make_model

    torch.set_num_threads(1)
    arms = {"slower alone": ["slow"], "faster alone": ["fast"], "both": ["slow", "fast"]}
    found: dict[str, list[tuple[float, float, dict[str, Any]]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory(prefix="two-teachers-") as folder:
        work = Path(folder)
        make_model(work / "student", "qwen2", hidden=HIDDEN, num_hidden_layers=LAYERS)
        write_rows(work / "rows.jsonl")
        with teachers(work / "student", {"slow": options.slow_ms / 1000, "fast": options.fast_ms / 1000}) as addresses:
            for _ in range(options.repeat):
                for name, names in arms.items():
                    found[name].append(timed(settings_of(work, names, addresses, options.steps)))
    step_s = {name: statistics.median(one[0] for one in runs) for name, runs in found.items()}
    rows: list[dict[str, object]] = [
        {
            "teachers": name, "ms a step": f"{1000 * step_s[name]:.1f}", "of the slower alone": f"{step_s[name] / step_s['slower alone']:.3f}",
            "waiting": f"{statistics.median(one[1] for one in runs):.0%}",
            "waited for, by name": ", ".join(f"{key.removeprefix('wait_share.')} {value:.0%}" for key, value in runs[-1][2].items() if key.startswith("wait_share.")),
            "repeats, ms": " ".join(f"{1000 * one[0]:.1f}" for one in runs),
        }
        for name, runs in found.items()
    ]  # fmt: skip
    show(
        f"a step of {BATCH} sequences; the teachers take {options.slow_ms:g} and {options.fast_ms:g} ms a request",
        rows,
        as_json=options.json,
    )
    ratio = step_s["both"] / step_s["slower alone"]
    if options.slow_ms:
        print(f"{'ok' if ratio <= BOUND else 'FELL SHORT'}: {ratio:.3f} of the slower alone (at most {BOUND})")


if __name__ == "__main__":
    main()
