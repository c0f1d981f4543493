"""What terms on layers are worth on the real pair: beside the recipe alone, at equal steps and at equal time, with seeds and intervals.

Teacher, students, rows and commands are those of `tests.bench.real`; the recipe alone is forward KL with half the hard labels (docs/results/results.md); the arms are
`layer_arms`. Each part reads what the one before has left in --work, so that all run unattended one after the other:

    python -m tests.bench.real_layers sweep --real REAL    # every arm, 400 steps: all of the first seed, then of the others as far as --budget-s goes
    python -m tests.bench.real_layers final --real REAL    # the best of the sweep, its neighbours and others, 1,200 steps
    python -m tests.bench.real_layers time  --real REAL    # the arms of `final`, each alone on its card with its labels on disk
    python -m tests.bench.real_layers table                # the tables of what is there

`--arms "cos 12" "cos 24"` names the arms of a part, which then needs no part before it. Runs that the budget leaves no time for are not started, those under way at its end are cut off, and what they have logged counts; one that fails is told of
and the others go on. WORK/layers-PART.json, and a copy in $OUT, is written after every run.

Weights are of 1 - cosine (0..2): the trial of docs/concepts/method.md 4.2 took half of it, so that its 6 is 3 here. Columns: held-out NLL (nats per UTF-8 byte) / KL
to the teacher (nats per token) at three steps; differences to the recipe alone of the same student at the last step, and at the time that the recipe took
for it (read between two evaluations, before the arm's own schedule has ended, which is to its disadvantage), paired by seed, with 95 % t intervals.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from tests.bench.layer_arms import NARROW, STUDENT, Arm, Run, final_arms, named, sweep_arms
from tests.bench.real import (
    Evaluations,
    Job,
    Server,
    arguments_of,
    at_step,
    log_of,
    machine,
    prepared,
    run,
    settings_of,
    shown_steps,
    spread,
    told_of,
)
from tests.bench.table import show

STEPS = {"sweep": 400, "final": 1200, "time": 300}
TIMED_FROM = 150  # steps before it compile and record
LEAST_SHARE = 0.6  # of the time that a run takes: with less left none is started
METRICS = {"NLL": "nll_per_byte", "KL": "kl_to_teacher"}


class Bench:
    """The runs of one part.

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
        self._arms: dict[Job, Arm] = {}
        self.runs: list[Run] = []
        self.address = ""

    def job(self, number: int, arm: Arm, seed: int) -> Job:
        """A run of an arm."""
        part, steps = self._options.part, self._options.steps
        changes: dict[str, dict[str, Any]] = {
            "model": {"path": str(self._options.real / arm.student), "graphs": arm.graphs}, "loss": dict(arm.loss),
        }  # fmt: skip
        if part == "time":
            changes |= {"data": {"eval": []}, "train": {"eval_steps": 0}}
        job = Job(arm.name, seed, f"{part}-{number}-{seed}", steps, changes)
        self._arms[job] = arm
        return job

    def check(self, jobs: Sequence[Job]) -> None:
        """All configs are read before anything is started."""
        from student_trainer.config.run import parse_config

        for job in jobs:
            parse_config(settings_of(self._options, job, "127.0.0.1:1", self._gpus), job.arm)

    def one(self, job: Job, gpu: int | None) -> None:
        """Makes a run and adds what it left: its arm, evaluations by step, training log, seconds, card, and `error` if it failed."""
        left_s = self._ends_s - time.monotonic()
        with self._lock:
            usual_s = statistics.median([run["seconds"] for run in self.runs] or [0.0])
        if left_s < max(1.0, LEAST_SHARE * usual_s):
            print(f"{job.arm}, seed {job.seed}: not started, {left_s:.0f} s are left", file=sys.stderr, flush=True)
            return
        arm, began_s = self._arms[job], time.monotonic()
        evaluations: Evaluations = []
        error = ""
        try:
            evaluations = run(self._options, job, self.address, gpu, self._gpus, left_s)
        except SystemExit as failed:
            error = str(failed)
            print(f"FAILED {error}", file=sys.stderr, flush=True)
        training = [entry for entry in log_of(self._options.work / job.folder) if "loss" in entry]
        left: Run = {
            "arm": job.arm, "seed": job.seed, "loss": arm.loss, "student": arm.student, "graphs": arm.graphs, "steps": job.steps,
            "gpu": gpu, "seconds": time.monotonic() - began_s, "error": error, "evaluations": evaluations, "training": training,
        }  # fmt: skip
        with self._lock:
            self.runs.append(left)
            self.keep()

    def keep(self, **more: Any) -> None:
        """Writes what there is."""
        text = json.dumps(
            {"machine": machine(self._gpus), "part": self._options.part, **more, "runs": self.runs}, indent=1
        )
        for folder in (self._options.work, os.environ.get("OUT")):
            if folder:
                Path(folder, f"layers-{self._options.part}.json").write_text(text)


def jobs_of(bench: Bench, options: argparse.Namespace, gpus: int) -> list[Job]:
    """The runs of a part in their order."""
    if options.part == "sweep":
        arms = _chosen(options.arms) if options.arms else sweep_arms()
        return [bench.job(number, arm, seed) for seed in options.seeds for number, arm in enumerate(arms)]
    arms = _chosen(options.arms) if options.arms else final_arms(_runs(options.work, "sweep"))
    if options.part == "final":
        return [bench.job(number, arm, seed) for number, arm in enumerate(arms) for seed in options.seeds]
    # The recipe first on every card, since cards differ by some percent; with recorded passes, as a run alone on its card has them.
    arms = [replace(arm, graphs="auto" if gpus else False) for arm in arms if arm.student == STUDENT]
    jobs = [bench.job(number, arms[0], options.seeds[0]) for number in range(max(1, gpus))]
    return jobs + [bench.job(number, arm, options.seeds[0]) for number, arm in enumerate(arms[1:], len(jobs))]


def _chosen(names: Sequence[str]) -> list[Arm]:
    """Any arms, by name; the recipe alone comes first, since all are measured by it."""
    try:
        arms = [named(name) for name in names]
    except ValueError as error:
        raise SystemExit(f"--arms: {error}") from error
    alone = [arm.alone for arm in arms if arm.loss]
    return list({arm.name: arm for arm in (*alone, *arms)}.values())


def _runs(work: Path, part: str) -> list[Run]:
    file = work / f"layers-{part}.json"
    if not file.is_file():
        raise SystemExit(f"{file} is not there: run `{part}` first")
    found: list[Run] = json.loads(file.read_text())["runs"]
    return found


def tokens_per_step(options: argparse.Namespace) -> float:
    """Mean tokens of a step: what tokens per second are divided by."""
    from rich.console import Console

    from student_trainer.config.run import parse_config
    from student_trainer.data.inputs import load_data
    from student_trainer.data.text.tokenizer_file import load_tokenizer

    config = parse_config(settings_of(options, Job("", 0, "tokens", 1), "127.0.0.1:1", 0), "tokens")
    data, _ = load_data(config.data, load_tokenizer(config.model.path), Console(file=io.StringIO()), None, config.run.cache_dir)  # fmt: skip
    return options.batch * statistics.fmean(item.example.token_ids.size for item in data)


def speeds(runs: Sequence[Run]) -> dict[str, float]:
    """By arm, tokens per second of its steps from TIMED_FROM on, as multiples of the recipe's on the same card."""
    rates: dict[tuple[str, int | None], list[float]] = {}
    for left in runs:
        last = left["training"][-1]["step"] if left["training"] else 0
        taken = [entry["tokens_per_s"] for entry in left["training"] if entry["step"] > min(TIMED_FROM, last / 2)]
        rates.setdefault((left["arm"], left["gpu"]), []).extend(taken)
    of_arm = {Arm.of(left).name: Arm.of(left) for left in runs}
    found: dict[str, list[float]] = {}
    for (name, gpu), taken in rates.items():
        alone = rates.get((of_arm[name].alone.name, gpu)) or []
        if taken and alone:
            found.setdefault(replace(of_arm[name], graphs=False).name, []).append(
                statistics.median(taken) / statistics.median(alone)
            )
    return {name: statistics.fmean(several) for name, several in found.items()}


def layers_table(runs: Sequence[Run], speed: Mapping[str, float]) -> list[dict[str, object]]:
    """A row per arm; see module."""
    from student_trainer.evaluation.report import paired

    steps = max(left["steps"] for left in runs)
    arms = {left["arm"]: Arm.of(left) for left in runs}
    by_seed = {name: {left["seed"]: left["evaluations"] for left in runs if left["arm"] == name} for name in arms}
    rows: list[dict[str, object]] = []
    for name, arm in arms.items():
        ours, alone = by_seed[name], by_seed.get(arm.alone.name, {})
        row: dict[str, object] = {
            "arm": name,
            "seeds": len(ours),
            "speed": round(speed[name], 3) if name in speed else "",
        }
        row |= {f"{step}: NLL / KL": at_step(list(ours.values()), step) for step in shown_steps(steps)}
        for metric, key in METRICS.items():
            for when, at in (("", steps), (", equal time", steps * speed[name] if name in speed else None)):
                pairs = list(_pairs(ours, alone, key, at, steps)) if at and arm.loss else []
                row[f"{metric}{when}"] = told_of(paired(*zip(*pairs, strict=True))) if pairs else ""
        rows.append(row)
    return rows


def _pairs(
    ours: Mapping[int, Evaluations], alone: Mapping[int, Evaluations], key: str, at: float, steps: int
) -> Iterator[tuple[float, float]]:
    """Of the seeds that both have: the arm's figure at step `at`, the recipe's at its last. An arm that is faster is read at its end."""
    for seed in sorted(ours.keys() & alone.keys()):
        mine, theirs = ours[seed], [entry[key] for entry in alone[seed] if entry["step"] == steps]
        if theirs and mine and mine[-1]["step"] >= min(at, steps):
            yield float(np.interp(at, [entry["step"] for entry in mine], [entry[key] for entry in mine])), theirs[0]


def tables(work: Path, *, as_json: bool) -> None:
    """Prints one per part that is there."""
    timed = (
        json.loads((work / "layers-time.json").read_text()) if (work / "layers-time.json").is_file() else {"runs": []}
    )
    speed = speeds(timed["runs"])
    for part in ("sweep", "final"):
        file = work / f"layers-{part}.json"
        kept = json.loads(file.read_text()) if file.is_file() else {"runs": []}
        if kept["runs"]:
            title = f"{part}: terms on layers beside the recipe alone, {kept['machine']}"
            show(title, layers_table(kept["runs"], speed), as_json=as_json)
    if timed["runs"]:
        tokens = timed.get("tokens_per_step")
        rows: list[dict[str, object]] = [
            {
                "arm": left["arm"], "card": left["gpu"], "step": entry["step"], "tokens/s": round(entry["tokens_per_s"]),
                "ms a step": round(tokens / entry["tokens_per_s"] * 1e3, 1) if tokens else "", "waited": round(entry.get("wait_share", 0.0), 3),
            }
            for left in timed["runs"] for entry in left["training"][-1:]
        ]  # fmt: skip
        if rows:
            show(f"steps of a run alone on its card, {timed['machine']}", rows, as_json=as_json)


def main() -> None:
    """The bench; see module."""
    began_s = time.monotonic()
    parser = arguments_of("Terms on layers on a real pair, beside the recipe alone.")
    parser.add_argument("part", choices=[*STEPS, "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arms",
        nargs="*",
        help="names as in the tables, also of arms that no sweep has, in this order after the recipe alone; all of the part if left out",
    )
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds from the start to the last run's end")
    parser.set_defaults(steps=None)
    options = parser.parse_args()
    if options.part == "table":
        tables(options.work, as_json=options.json)
        return
    if options.real is None:
        parser.error("--real is needed: where tests.real.fetch brought the model")
    options.steps = options.steps or STEPS[options.part]
    gpus = prepared(options)
    if not (options.real / NARROW).is_dir():
        from tests.real.narrow import narrow

        narrow(options.real / "smollm2-15", options.real / NARROW)
    bench = Bench(options, gpus, began_s)
    jobs = jobs_of(bench, options, gpus)
    bench.check(jobs)
    print(f"{len(jobs)} runs: {', '.join(dict.fromkeys(job.arm for job in jobs))}", file=sys.stderr, flush=True)
    server = Server(
        options.work, options.real / "smollm2", gpus,
        edge={"limits": {"replies_held_mb": 4096, "tenant_replies_held_mb": 4096}},
        ray={"object_store_mb": 4096 if gpus else 512},
        teacher={"features": {"layers": "all", "folder": str(options.work / "basis")}},
    )  # fmt: skip
    bench.address = server.address
    try:
        spread(jobs, gpus, 1 if options.part == "time" else options.per_gpu, bench.one)
    finally:
        server.stop()
    bench.keep(seconds=time.monotonic() - began_s, **({"tokens_per_step": tokens_per_step(options)} if options.part == "time" else {}))  # fmt: skip
    tables(options.work, as_json=options.json)


if __name__ == "__main__":
    main()
