"""What the student's own samples are worth on the real pair: after the same off-policy steps, some more off-policy or on-policy; three seeds, paired intervals.

Teacher, student, rows and commands are those of `tests.bench.real`. Each part reads what the one before has left in --work, so that all run unattended:

    python -m tests.bench.real_on_policy warm  --real REAL    # 400 off-policy steps a seed (forward KL with half the hard labels)
    python -m tests.bench.real_on_policy more  --real REAL    # 200 more from there: off-policy (the same recipe, or JSD alone) and on-policy (JSD, reverse KL)
    python -m tests.bench.real_on_policy table                # the table of what is there

Every student is then measured twice: held-out NLL and KL on the rows, by the run itself, and by `tests.bench.own_samples` the KL to the teacher on completions that it writes
itself for the held-out prompts. Runs that --budget-s leaves no time for are not started, those under way at its end are cut off and left out of the table; one that
fails is told of and the others go on. WORK/on_policy.json, and a copy in $OUT, is written after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from tests.bench.real import (
    Job,
    Server,
    arguments_of,
    cards,
    log_of,
    machine,
    prepared,
    run,
    settings_of,
    spread,
    told_of,
)
from tests.bench.table import show

STEPS = {"warm": 400, "more": 200}
RECIPE = {"output": {"divergence": "forward_kl"}, "sft_weight": 0.5}
JSD = {"output": {"divergence": "jsd", "beta": 0.5}, "sft_weight": 0.0}
REVERSE = {"output": {"divergence": "reverse_kl"}, "sft_weight": 0.0}
START, OFF_POLICY = "after the warm-up", "off-policy, the recipe"
# name -> section loss, whether all sequences are the student's own
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    OFF_POLICY: (RECIPE, False),
    "on-policy, JSD": (JSD, True),
    "on-policy, reverse KL": (REVERSE, True),
    "off-policy, JSD": (JSD, False),
    "off-policy, reverse KL": (REVERSE, False),
}
COLUMNS = {
    "held-out NLL/byte": "nll_per_byte", "held-out KL": "kl_to_teacher", "own samples: KL(s||t)": "kl_student_teacher", "KL(t||s)": "kl_teacher_student",
    "teacher's NLL": "teacher_nll", "agreement": "agreement", "finished": "finished", "length": "mean_length",
}  # fmt: skip
PAIRED = ("nll_per_byte", "kl_student_teacher", "kl_teacher_student")
Run = dict[str, Any]


class Bench:
    """The runs of all parts.

    Args:
        options: of the command.
        gpus: how many there are.
        began_s: when the budget began, by time.monotonic.
    """

    def __init__(self, options: argparse.Namespace, gpus: int, began_s: float) -> None:
        self._options = options
        self._gpus = gpus
        self._ends_s = began_s + options.budget_s
        self._lock = Lock()
        self.runs: list[Run] = kept(options.work)
        self.address = ""

    def job(self, arm: str, seed: int) -> Job:
        """A run of an arm, or the warm-up of a seed."""
        o = self._options
        train = {"learning_rate": o.learning_rate, "warmup_steps": 20, "eval_steps": o.steps, "max_steps": o.steps}
        if arm == START:
            changes: dict[str, dict[str, Any]] = {"loss": dict(RECIPE), "train": {"eval_steps": o.steps}}
            return Job(arm, seed, f"warm-{seed}", o.steps, changes)
        loss, own = ARMS[arm]
        changes = {"model": {"path": str(o.work / f"warm-{seed}" / "final")}, "loss": dict(loss), "train": train}
        if own:
            changes["on_policy"] = {
                "share": 1.0,
                "max_new_tokens": o.max_new_tokens,
                "max_staleness": 1,
                "batch": o.batch,
                "engine": o.engine,
            }
        return Job(arm, seed, f"more-{list(ARMS).index(arm)}-{seed}", o.steps, changes)

    def settings(self, job: Job) -> dict[str, Any]:
        """The config of a run, for a check before anything is started."""
        return settings_of(self._options, job, "127.0.0.1:1", self._gpus)

    def one(self, job: Job, gpu: int | None) -> None:
        """Makes a run and measures what it has become."""
        left_s, began_s = self._ends_s - time.monotonic(), time.monotonic()
        with self._lock:
            usual_s = max([entry["seconds"] for entry in self.runs if entry["arm"] == job.arm] or [0.0])
        if left_s < max(1.0, 0.9 * usual_s):
            print(f"{job.arm}, seed {job.seed}: not started, {left_s:.0f} s are left", file=sys.stderr, flush=True)
            return
        entry: Run = {"arm": job.arm, "seed": job.seed, "steps": job.steps, "gpu": gpu, "error": ""}
        try:
            evaluations = run(self._options, job, self.address, gpu, self._gpus, left_s, keeps_final=True)
            entry["evaluations"] = evaluations
            entry["log"] = [line for line in log_of(self._options.work / job.folder) if "loss" in line]
            if evaluations and evaluations[-1]["step"] == job.steps:
                entry["figures"] = {**evaluations[-1], **self._own_samples(job, gpu)}
        except (SystemExit, OSError, ValueError) as failed:
            entry["error"] = str(failed)
            print(f"FAILED {failed}", file=sys.stderr, flush=True)
        entry["seconds"] = time.monotonic() - began_s
        with self._lock:
            self.runs = [other for other in self.runs if (other["arm"], other["seed"]) != (job.arm, job.seed)] + [entry]
            text = json.dumps({"machine": machine(self._gpus), "runs": self.runs}, indent=1)
            for folder in (self._options.work, os.environ.get("OUT")):
                if folder:
                    Path(folder, "on_policy.json").write_text(text)

    def _own_samples(self, job: Job, gpu: int | None) -> dict[str, float]:
        o = self._options
        out = o.work / f"{job.folder}.samples.json"
        out.unlink(missing_ok=True)
        command = [
            sys.executable, "-W", "ignore", "-m", "tests.bench.own_samples", "--student", str(o.work / job.folder / "final"),
            "--rows", f"{o.real / 'heldout.jsonl'}#{o.sampled}", "--address", self.address, "--max-new-tokens", str(o.max_new_tokens),
            "--cache", str(o.work / "cache"), "--out", str(out),
        ]  # fmt: skip
        env = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": cards()[gpu]})}
        limit_s = max(30.0, self._ends_s + 30 - time.monotonic())
        try:
            done = subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{job.arm}, seed {job.seed}: its samples were not measured in {limit_s:.0f} s") from None
        if done.returncode:
            raise SystemExit(f"{job.arm}, seed {job.seed}, own samples:\n{done.stderr[-3000:]}")
        found: dict[str, float] = json.loads(out.read_text())
        told = f"KL(s||t) {found['kl_student_teacher']:.3f}, KL(t||s) {found['kl_teacher_student']:.3f}"
        print(f"{job.arm}, seed {job.seed}, own samples: {told}", file=sys.stderr, flush=True)
        return found


def kept(work: Path) -> list[Run]:
    """What earlier parts have left."""
    file = work / "on_policy.json"
    if not file.is_file():
        return []
    runs: list[Run] = json.loads(file.read_text())["runs"]
    return runs


def table_rows(runs: Sequence[Run]) -> list[dict[str, object]]:
    """A row per arm: means over its seeds, and the paired differences to off-policy at equal steps."""
    from student_trainer.evaluation.report import paired

    by_arm: dict[str, dict[int, Mapping[str, float]]] = {}
    for left in sorted(runs, key=lambda left: left["seed"]):
        if "figures" in left:
            by_arm.setdefault(left["arm"], {})[left["seed"]] = left["figures"]
    base = by_arm.get(OFF_POLICY, {})
    rows: list[dict[str, object]] = []
    for arm in [name for name in (START, *ARMS) if name in by_arm]:
        of = by_arm[arm]
        row: dict[str, object] = {"arm": arm, "seeds": len(of)}
        row |= {
            title: f"{statistics.fmean(figures[key] for figures in of.values()):.4f}" for title, key in COLUMNS.items()
        }
        both = sorted(of.keys() & base.keys())
        for key in PAIRED:
            pairs = [of[seed][key] for seed in both], [base[seed][key] for seed in both]
            row[f"{key} - off-policy"] = told_of(paired(*pairs)) if both and arm != OFF_POLICY else ""
        rows.append(row)
    return rows


def main() -> None:
    """The bench; see module."""
    began_s = time.monotonic()
    parser = arguments_of("On-policy distillation of a real pair, beside off-policy at equal steps.")
    parser.add_argument("part", choices=[*STEPS, "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", help="names as in the table; all if left out")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds from the start to the last run's end")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the further steps")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--sampled", type=int, default=256, help="held-out prompts that are answered")
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.set_defaults(steps=None)
    options = parser.parse_args()
    if options.part == "table":
        print_table(options.work, as_json=options.json)
        return
    if options.real is None:
        parser.error("--real is needed: where tests.real.fetch brought the model")
    options.steps = options.steps or STEPS[options.part]
    arms = [START] if options.part == "warm" else (options.arms or list(ARMS))
    if unknown := [arm for arm in arms if arm not in (START, *ARMS)]:
        raise SystemExit(f"--arms: {unknown[0]!r} is none of {', '.join(ARMS)}")
    gpus = prepared(options)
    bench = Bench(options, gpus, began_s)
    jobs = [bench.job(arm, seed) for seed in options.seeds for arm in arms]
    if options.part == "more":
        lacking = [seed for seed in options.seeds if not (options.work / f"warm-{seed}" / "final").is_dir()]
        if lacking:
            raise SystemExit(f"{options.work / f'warm-{lacking[0]}' / 'final'} is not there: run `warm` first")
    from student_trainer.config.run import parse_config

    for job in jobs:
        parse_config(bench.settings(job), job.arm)
    server = Server(
        options.work, options.real / "smollm2", gpus,
        edge={"limits": {"replies_held_mb": 4096, "tenant_replies_held_mb": 4096}}, ray={"object_store_mb": 4096 if gpus else 512},
    )  # fmt: skip
    bench.address = server.address
    try:
        spread(jobs, gpus, options.per_gpu, bench.one)
    finally:
        server.stop()
    print_table(options.work, as_json=options.json)


def print_table(work: Path, *, as_json: bool) -> None:
    """Of all that is there."""
    if rows := table_rows(kept(work)):
        told = json.loads((work / "on_policy.json").read_text())["machine"]
        show(
            f"real pair, {told}: {STEPS['more']} more steps after {STEPS['warm']} off-policy; KL in nats a token",
            rows,
            as_json=as_json,
        )


if __name__ == "__main__":
    main()
