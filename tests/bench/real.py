"""A real teacher and real rows: what distillation is worth beside hard labels, with seeds and intervals.

Teacher SmolLM2-135M-Instruct behind `teacher-server up`; student 15 of its 30 layers, every weight trained by `student-trainer train` (float32
masters, bfloat16 passes); rows: functions of Python's standard library, first half in, second half out, held out by file. Both are the product's
own commands, in processes of their own; runs are spread over the GPUs, `--per-gpu` at a time, and share one label store.

    python -m tests.real.fetch REAL                       # once: model and student
    python -m tests.bench.real --real REAL [--seeds 3] [--steps 1200] [--json]

Columns: held-out NLL in nats per UTF-8 byte and KL(teacher || student) in nats per token at three steps, mean over seeds; the best step of each seed (early
stopping); and the paired difference of bests to SFT's best with its 95 % t interval.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeVar

import yaml

from tests.bench.table import show

TRAIN_ROWS, HELD_OUT_ROWS = 5_000, 512
MAX_BYTES, MAX_TOKENS = 1_000, 512
BATCH = 32
EVERY = 100  # steps between evaluations
LEAST_S = 30.0  # that a run is begun for
SHOWN = (200, 400)  # steps of the table, beside the last
SKEW = {"output": {"divergence": "skew_kl", "alpha": 0.1}, "sft_weight": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"loss": {"output": None, "sft_weight": 1.0}},
    "sft, schedule of a third": {"loss": {"output": None, "sft_weight": 1.0}},
    "gkd": {"loss": {"output": {"divergence": "forward_kl"}, "sft_weight": 0.0}},
    "gkd + 0.5 hard labels": {"loss": {"output": {"divergence": "forward_kl"}, "sft_weight": 0.5}},
    "skew KL 0.1": {"loss": SKEW},
    "gkd, curriculum": {"loss": {"output": {"divergence": "forward_kl"}, "sft_weight": 0.0}, "curriculum": {}},
    "sft, curriculum by length": {"loss": {"output": None, "sft_weight": 1.0}, "curriculum": {}},
}
SHORT = "sft, schedule of a third"
Evaluations = list[dict[str, float]]  # of one run, by step
Found = TypeVar("Found")


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        arm: its name in tables.
        seed: of the order of the rows.
        folder: of the run, below `--work`.
        steps: that it makes.
        changes: sections of its config, laid over the ones that all runs have.
    """

    arm: str
    seed: int
    folder: str
    steps: int
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)


def write_rows(folder: Path) -> None:
    """train.jsonl and heldout.jsonl of this interpreter's standard library."""
    from deploy.demo.corpus import CorpusConfig, build_corpus

    build_corpus(folder, CorpusConfig(max_bytes=MAX_BYTES))
    (folder / "manifest.json").unlink()
    for name, count in (("train", TRAIN_ROWS), ("heldout", HELD_OUT_ROWS)):
        file = folder / f"{name}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:count]))


class Server:
    """`teacher-server up` with the real teacher; `sections` edge, ray and teacher are laid over the usual settings."""

    def __init__(self, folder: Path, model: Path, gpus: int, **sections: Mapping[str, Any]) -> None:
        from tests.bench.gpu_client import free_port

        self.address = f"127.0.0.1:{free_port()}"
        backend = {"kind": "transformers", "model": str(model), "dtype": "bfloat16" if gpus else "float32",
                   "device": "cuda" if gpus else "cpu"}  # fmt: skip
        tree: dict[str, dict[str, Any]] = {
            "edge": {"port": int(self.address.rpartition(":")[2])},
            "ray": {"num_cpus": 4, "object_store_mb": 512},
            "teacher": {"name": "smollm2", "num_cpus": 0.5, "num_gpus": 1.0 if gpus else 0.0, "backend": backend},
        }
        edge, ray, teacher = (tree[name] | dict(sections.get(name, {})) for name in tree)
        file, self.log = folder / "server.yaml", folder / "server.log"
        file.write_text(yaml.safe_dump({"edge": edge, "ray": ray, "teachers": [teacher]}))
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "teacher_server.cli", "up", str(file)]
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        began = time.monotonic()
        while "ready" not in self.log.read_text():
            if self._process.poll() is not None or time.monotonic() - began > 240:
                raise SystemExit(f"the teacher did not come up:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """As Ctrl-C."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=90)


def settings_of(options: argparse.Namespace, job: Job, address: str, gpus: int) -> dict[str, Any]:
    """The config of one run."""
    tree: dict[str, Any] = {
        "run": {"output_dir": str(options.work / job.folder), "seed": job.seed, "cache_dir": str(options.work / "cache")},
        "model": {"path": str(options.real / "smollm2-15"), "dtype": "float32", "lora": None, "graphs": False, "threads": 2},
        "data": {
            "train": [str(options.real / "train.jsonl")],
            "eval": [f"{options.real / 'heldout.jsonl'}#{options.held_out}"],
            "max_tokens": MAX_TOKENS,
            "overlong": "drop",
        },
        "teacher": {"address": address},
        "labels": {"transport": "hidden"},
        "train": {
            "batch_size": options.batch, "max_steps": job.steps, "accumulation": 1, "learning_rate": 3e-4, "warmup_steps": 50,
            "schedule": "cosine", "min_lr_share": 0.1, "bf16": bool(gpus), "log_steps": min(EVERY, 50), "eval_steps": min(EVERY, job.steps),
            "eval_batch_size": 32, "deterministic": False,
        },
    }  # fmt: skip
    return tree | {section: tree.get(section, {}) | dict(changed) for section, changed in job.changes.items()}


def run(
    options: argparse.Namespace,
    job: Job,
    address: str,
    gpu: int | None,
    gpus: int,
    limit_s: float | None = None,
    *,
    keeps_final: bool = False,
) -> Evaluations:
    """One training; its evaluations, as far as it came in `limit_s`. Its weights are removed unless `keeps_final`.

    Raises:
        SystemExit: it failed; the end of what it said.
    """
    folder = options.work / job.folder
    shutil.rmtree(folder, ignore_errors=True)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings_of(options, job, address, gpus)))
    env = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": cards()[gpu]})}
    began = time.monotonic()
    command = [sys.executable, "-m", "student_trainer.cli", "train", str(file)]
    told, said = "", folder.with_suffix(".out")
    with said.open("w") as output:  # no pipe: processes that compile would hold it open
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            told = ", cut off"
    if process.returncode and not told:
        raise SystemExit(f"{job.arm}, seed {job.seed}:\n{said.read_text()[-3000:]}")
    found = [{name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_") or name == "step"}
             for entry in log_of(folder) if "eval_nll_per_byte" in entry]  # fmt: skip
    if found:
        best = min(found, key=lambda entry: entry["nll_per_byte"])
        told = f": best {best['nll_per_byte']:.4f} at {best['step']}{told}"
    print(f"{job.arm}, seed {job.seed}{told}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if not keeps_final:
        shutil.rmtree(folder / "final", ignore_errors=True)
    return found


def cards() -> list[str]:
    """The GPUs that this process sees, as the environment names them."""
    import torch

    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return told.split(",") if told else [str(number) for number in range(torch.cuda.device_count())]


def log_of(folder: Path) -> list[dict[str, float]]:
    """What a run has logged."""
    file = folder / "train_log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def spread(jobs: Sequence[Job], gpus: int, per_gpu: int, one: Callable[[Job, int | None], Found]) -> list[Found]:
    """`one` of every job and a GPU, `per_gpu` at a time on each (on the CPU in all); what it made, in the order of the jobs."""
    free: SimpleQueue[int | None] = SimpleQueue()
    for _ in range(per_gpu):
        for gpu in range(gpus) if gpus else [None]:
            free.put(gpu)

    def on_any(job: Job) -> Found:
        gpu = free.get()
        try:
            return one(job, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(free.qsize()) as pool:
        return list(pool.map(on_any, jobs))


def shown_steps(steps: int) -> list[int]:
    """Steps of a table."""
    return sorted({step for step in (*SHOWN, steps) if step <= steps})


def at_step(runs: Sequence[Evaluations], step: int) -> str:
    """Mean NLL and KL of the runs at a step; "-" if none came to it."""
    at = [entry for run in runs for entry in run if entry["step"] == step]
    if not at:
        return "-"
    return f"{statistics.fmean(e['nll_per_byte'] for e in at):.4f} / {statistics.fmean(e['kl_to_teacher'] for e in at):.3f}"


def told_of(difference: Mapping[str, float | None]) -> str:
    """A paired difference with its interval, if there is one."""
    told = "" if difference["low"] is None else f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return f"{difference['mean']:+.4f}{told}"


def table(results: dict[str, list[Evaluations]], steps: int) -> list[dict[str, object]]:
    """A row per arm; see module."""
    from student_trainer.evaluation.report import paired

    bests = {arm: [min(e["nll_per_byte"] for e in run) for run in runs] for arm, runs in results.items()}
    rows: list[dict[str, object]] = []
    base = "sft" if "sft" in results else next(iter(results))
    for arm, runs in results.items():
        row: dict[str, object] = {"arm": arm}
        row |= {f"{step}: NLL / KL": at_step(runs, step) for step in shown_steps(steps)}
        best_steps = sorted({int(min(run, key=lambda e: e["nll_per_byte"])["step"]) for run in runs})
        row["best NLL (steps)"] = f"{statistics.fmean(bests[arm]):.4f} ({', '.join(map(str, best_steps))})"
        row[f"best, minus {base}'s best"] = "" if arm == base else told_of(paired(bests[arm], bests[base]))
        rows.append(row)
    teacher = next(iter(results.values()))[0][0]
    rows.append(
        dict.fromkeys(rows[0], "")
        | {"arm": "the teacher", "best NLL (steps)": f"{teacher['teacher_nll_per_byte']:.4f}"}
    )
    return rows


def arguments_of(description: str) -> argparse.ArgumentParser:
    """The options of every bench with the real pair."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--real", type=Path, help="folder of tests.real.fetch")
    parser.add_argument("--work", type=Path, default=Path("/tmp/lyceum-real"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--held-out", type=int, default=HELD_OUT_ROWS)
    parser.add_argument("--per-gpu", type=int, default=4, help="runs at a time on each GPU")
    parser.add_argument("--json", action="store_true")
    return parser


def prepared(options: argparse.Namespace) -> int:
    """Makes the folder of the work, and the rows if they are not there; how many GPUs there are."""
    import torch

    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.real / "train.jsonl").is_file():
        write_rows(options.real)
    return torch.cuda.device_count()


def machine(gpus: int) -> str:
    """Of a table's title."""
    import torch

    return f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "CPU"


def main(arguments: Sequence[str] | None = None) -> None:
    """The bench; see module."""
    parser = arguments_of("Distillation of a real pair beside hard labels.")
    parser.add_argument("--write-rows", type=Path, help="only write train.jsonl and heldout.jsonl into this folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--arms", nargs="*", default=[arm for arm in ARMS if "curriculum" not in arm], choices=list(ARMS)
    )
    parser.add_argument(
        "--budget-s", type=float, help="seconds from the start to the end of the last run, which is cut off there"
    )
    options = parser.parse_args(arguments)
    if options.write_rows is not None:
        write_rows(options.write_rows)
        return
    if options.real is None:
        parser.error("--real is needed: where tests.real.fetch brought the model")
    began = time.monotonic()
    gpus = prepared(options)
    server = Server(options.work, options.real / "smollm2", gpus)
    short = max(EVERY, options.steps // 3 // EVERY * EVERY)
    jobs = [
        Job(arm, seed, f"{list(ARMS).index(arm)}-{seed}", short if arm == SHORT else options.steps, ARMS[arm])
        for seed in range(options.seeds)
        for arm in options.arms
    ]
    ended: dict[str, Evaluations] = {}
    writing = Lock()

    def one(job: Job, gpu: int | None) -> Evaluations:
        """A run, kept at once; one for which no time is left is not begun."""
        left_s = None if options.budget_s is None else options.budget_s - (time.monotonic() - began)
        if left_s is not None and left_s < LEAST_S:
            return []
        entries = run(options, job, server.address, gpu, gpus, left_s)
        with writing:
            ended[f"{job.arm}, seed {job.seed}"] = entries
            if os.environ.get("OUT"):
                (Path(os.environ["OUT"]) / "real-runs.json").write_text(json.dumps(ended))
        return entries

    try:
        found = spread(jobs, gpus, options.per_gpu, one)
    finally:
        server.stop()
    lacking = {job.seed for job, entries in zip(jobs, found, strict=True) if not entries}
    if lacking:
        print(
            f"seeds left out, since a run of theirs did not come to its first evaluation: {sorted(lacking)}",
            file=sys.stderr,
        )
    results = {
        arm: [entries for job, entries in zip(jobs, found, strict=True) if job.arm == arm and job.seed not in lacking]
        for arm in options.arms
    }
    if len(lacking) == options.seeds:
        raise SystemExit("no seed has runs of all arms")
    title = f"real pair, {machine(gpus)}, {options.seeds - len(lacking)} seeds, {options.steps} steps of {options.batch} rows, {time.monotonic() - began:.0f} s"
    show(title, table(results, options.steps), as_json=options.json)
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "real.json").write_text(json.dumps({"title": title, "results": results}, indent=1))


if __name__ == "__main__":
    main()
