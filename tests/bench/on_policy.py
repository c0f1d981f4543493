"""On-policy distillation on tasks whose truth is known: addition with five digits, and self-distillation with a hint; five seeds, paired intervals.

`addition`: a teacher that adds, students on noisy rows. At equal steps: off-policy alone against an off-policy warm-up after which the share of the
student's own samples grows in a straight line (`on_policy.share`). `hint`: a base that reads a hint well and has learned to add from noisy sums teaches itself: served frozen it
sees the right sum before the problem, the student sees the problem alone; beside it SFT on the right sums at equal steps.
Samples are the product's (`rollout.hf_sampler`, `rollout.plan`), labels come over gRPC from the product's engine, and are learned from by the
product's own terms in a plain loop. CPU, `--workers` processes of one thread; a run that is cut off leaves what it has in $OUT/on_policy-TASK.json.

    python -m tests.bench.on_policy addition [--digits 5] [--seeds 5] [--workers 2] [--json]
    python -m tests.bench.on_policy hint [--digits 3] [--seeds 5] [--workers 2] [--json]

Gates: `addition`: the ramp is not worse than off-policy alone by more than 0.1; `hint`: the lower end of the interval of the gain is above 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from student_trainer.config.losses import LossConfig
from student_trainer.config.on_policy import OnPolicyConfig, ShareConfig
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example, IndexedExample
from student_trainer.evaluation.report import paired
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import pack
from student_trainer.model.load import Student
from student_trainer.rollout.engines.hf_sampler import HfSampler, Sampling
from student_trainer.rollout.examples import example_of
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.rollout.sample import Rollout, RolloutPrompt
from student_trainer.training.learner import Learner
from student_trainer.training.objective import Objective
from student_trainer.training.windows import MicroBatch, padded
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.score.signals import spec_of
from tests.bench.addition import BASE, END, STUDENT, TEACHER, VOCAB, Addition
from tests.bench.real import told_of
from tests.bench.table import show
from tests.e2e.classroom import (
    Classroom,
    Shape,
    StudentRecipe,
    TeacherRecipe,
    classroom,
    optimization,
    take_step,
    teacher_folder,
)

FIXED, NOISE = 1500, 0.2  # as in task 2
ROWS = 2000  # problems of the hinted task, whose sums are right
BASE_NOISE = 0.3  # of the sums that its base has seen without a hint: it is unsure, and seldom samples an answer without a mistake
_START = {"tied": False, "init_std": 0.06}  # tests/soak/task2.py says why
TEACHER_SHAPE = Shape(VOCAB, 128, 3, 4, 2, 384, **_START)
STUDENT_SHAPE = Shape(VOCAB, 64, 2, 2, 1, 160, **_START)
RAMP = ShareConfig(start=0.0, end=0.7, warmup=0.2, ramp=0.3)
FIRST_SEED = 10  # as in tests.bench.tasks: settings are chosen on others
DISTIL: dict[str, Any] = {"sft_weight": 0.0}


@dataclass(frozen=True)
class Way:
    """An arm.

    Attributes:
        loss: the section of a config.
        share: of the rows that the student writes itself.
    """

    loss: dict[str, Any]
    share: ShareConfig


NONE, ALL = ShareConfig(start=0.0, end=0.0), ShareConfig(start=1.0, end=1.0)
FORWARD = DISTIL | {"output": {"divergence": "forward_kl"}}
JSD = DISTIL | {"output": {"divergence": "jsd", "beta": 0.5}}
REVERSE = DISTIL | {"output": {"divergence": "reverse_kl"}}
METRICS = {"exact": "greedy", "sampled": "sampled"}
OFF_POLICY, START = "off-policy alone", "the base, before"
WAYS: dict[str, dict[str, Way]] = {
    "addition": {
        OFF_POLICY: Way(FORWARD, NONE),
        "ramp to 0.7": Way(FORWARD, RAMP),
        "off-policy alone, JSD": Way(JSD, NONE),
        "ramp to 0.7, JSD": Way(JSD, RAMP),
    },
    "hint": {
        "SFT on the right sums": Way({"output": None, "sft_weight": 1.0}, NONE),
        "off-policy, forward KL": Way(FORWARD, NONE),
        "on-policy, forward KL": Way(FORWARD, ALL),
        "on-policy, JSD": Way(JSD, ALL),
        "on-policy, reverse KL": Way(REVERSE, ALL),
    },
}


def train(
    model: Any, task: Addition, rows: Sequence[Example], hints: Sequence[np.ndarray] | None, way: Way, recipe: StudentRecipe, seed: int, room: Classroom,
) -> Any:  # fmt: skip
    """The model after its steps; `hints` is what the teacher sees before the rows."""
    student = Student(model, SimpleNamespace(pad_token_id=0, eos_token_id=END))
    loss = LossConfig.model_validate(way.loss)
    spec = spec_of("hidden", VOCAB)
    asks = loss.output is not None
    learner = Learner(
        student,
        Objective(loss, VOCAB, spec.signals if asks else (), None, recipe.steps).terms(student),
        teacher_head=room.head,
    )
    sampling = Sampling(seed, task.answer + 1, stop_ids=frozenset({END}), batch=recipe.batch_size)
    sampler = HfSampler(student, sampling, VOCAB) if way.share.end else None
    student.model.train()
    order = RunOrder(
        len(rows), batch_size=recipe.batch_size, accumulation=1, epochs=1, max_steps=recipe.steps, seed=seed
    )

    plan = RolloutPlan(OnPolicyConfig(share=way.share), seed=seed, steps=recipe.steps, window=recipe.batch_size)

    def labels_of(examples: Sequence[Example], indices: Sequence[int]) -> list[TeacherSignals]:
        seen = (
            examples
            if hints is None
            else [_with(hints[index], example) for index, example in zip(indices, examples, strict=True)]
        )
        return room.labels(seen, spec).cut(pack(seen).batch)

    kept = labels_of(rows, range(len(rows))) if asks and way.share.start < 1 else []
    optimizer, scheduler = optimization(student.model, recipe.steps)
    for step in range(recipe.steps):
        indices = order.batch(step)
        examples: list[Example] = [rows[index] for index in indices]
        labels: list[TeacherSignals] = [kept[index] for index in indices] if kept else []
        places = [place.slot for place in plan.places(step)]
        if places and sampler is not None:
            sampler.load({name: p.detach() for name, p in student.model.named_parameters()}, step)
            prompts = [
                RolloutPrompt(step, place, rows[indices[place]].token_ids[: task.question], rows[indices[place]].key)
                for place in places
            ]
            written = [example_of(rollout) for rollout in sampler.sample(prompts) if isinstance(rollout, Rollout)]
            told = labels_of(written, [indices[place] for place in places])
            labels = labels or [told[0]] * len(indices)  # with a share of 1 every place is written over
            for place, example, answer in zip(places, written, told, strict=True):
                examples[place], labels[place] = example, answer
        batch = padded(
            MicroBatch.of(
                step, [IndexedExample(index, example) for index, example in zip(indices, examples, strict=True)]
            ),
            pad_id=0,
        )
        if asks:
            batch = replace(batch, labels=LabelTensors.of(TeacherSignals.join(labels)))
        found = learner(batch, batch.weight, step)
        for evidence in found.evidence:
            evidence.check()
        take_step(learner, optimizer, scheduler, found.loss)
    student.model.eval()
    return student.model


def _with(hint_H: np.ndarray, example: Example) -> Example:
    """What the teacher sees: the hint, then all that the student sees; the same rows are wanted."""
    token_ids = np.concatenate([hint_H.astype(np.int32), example.token_ids])
    return Example(token_ids, np.concatenate([np.zeros(len(hint_H), np.bool_), example.loss_mask]), 0, example.key)


# ------------------------------------------------------------------ teachers


def adder(task: Addition, steps: int) -> TeacherRecipe:
    """A teacher that learns from clean problems."""
    return TeacherRecipe(f"addition{task.digits}-v1", TEACHER_SHAPE, steps=steps, batch_size=128)


def adder_folder(task: Addition, steps: int) -> Path:
    """It, trained."""
    recipe = adder(task, steps)
    return teacher_folder(recipe, lambda step: task.fresh(recipe.batch_size, TEACHER, step))


def base_folder(task: Addition, steps: int, seed: int) -> Path:
    """A model that reads hints, and has seen noisy sums without one; all problems are fresh."""
    recipe = TeacherRecipe(
        f"hinted{task.digits}-{BASE_NOISE:g}-v2", TEACHER_SHAPE, steps=steps, batch_size=128, seed=seed
    )

    def fresh(step: int) -> tuple[Tensor, Tensor]:
        """Half of each; those without a hint are padded behind."""
        half = recipe.batch_size // 2
        hinted_BL = task.problems(half, 0.0, BASE, seed, step, 0)
        hinted_BL = np.concatenate([task.hints(hinted_BL), hinted_BL], 1)
        plain_BL = np.concatenate(
            [task.problems(half, BASE_NOISE, BASE, seed, step, 1), np.zeros((half, task.hint), np.int64)], 1
        )
        place_L = np.arange(hinted_BL.shape[1])
        answers = place_L >= task.hint + task.question, (place_L >= task.question) & (place_L < task.length)
        mask_BL = np.stack([answers[0]] * half + [answers[1]] * half)
        return torch.from_numpy(np.concatenate([hinted_BL, plain_BL])), torch.from_numpy(mask_BL)

    return teacher_folder(recipe, fresh)


# ---------------------------------------------------------------------- runs


def of_addition(options: argparse.Namespace, seed: int, name: str) -> dict[str, float]:
    """What an arm reached with a seed."""
    task = Addition(options.digits)
    recipe = StudentRecipe(STUDENT_SHAPE, options.steps, options.batch)
    rows = task.examples(task.problems(FIXED, NOISE, STUDENT, seed), f"seed {seed}")
    with classroom(adder_folder(task, options.teacher_steps)) as room:
        model = train(recipe.shape.build(1000 + seed), task, rows, None, WAYS["addition"][name], recipe, seed, room)
    return {"exact": task.exact_match(model), "sampled": task.right_probability(model)}


def of_hint(options: argparse.Namespace, seed: int, name: str) -> dict[str, float]:
    """The same, and what the base of the seed could before."""
    task = Addition(options.digits)
    folder = base_folder(task, options.teacher_steps, seed)
    recipe = StudentRecipe(TEACHER_SHAPE, options.steps, options.batch)
    problems_BL = task.problems(ROWS, 0.0, STUDENT, seed)
    rows = task.examples(problems_BL, f"seed {seed}")
    model = Qwen2ForCausalLM.from_pretrained(folder)
    before = {
        "exact before": task.exact_match(model), "sampled before": task.right_probability(model), "sampled with the hint": task.right_probability(model, hinted=True),
    }  # fmt: skip
    with classroom(folder) as room:
        model = train(model, task, rows, list(task.hints(problems_BL)), WAYS["hint"][name], recipe, seed, room)
    return {"exact": task.exact_match(model), "sampled": task.right_probability(model), **before}


TASKS: dict[str, Callable[[argparse.Namespace, int, str], dict[str, float]]] = {
    "addition": of_addition,
    "hint": of_hint,
}
USUAL: dict[str, dict[str, int]] = {
    "addition": {"digits": 5, "steps": 800, "teacher_steps": 1500, "batch": 256},
    "hint": {"digits": 3, "steps": 200, "teacher_steps": 500, "batch": 64},
}


def quiet() -> None:
    """One thread, and none of transformers' bars."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


def one(options: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    """A run, in a process of its own."""
    quiet()
    began_s = time.perf_counter()
    found = TASKS[options.task](options, seed, name)
    seconds = time.perf_counter() - began_s
    print(f"{options.task}, seed {seed}, {name}: {found}, {seconds:.0f} s", flush=True)
    return {"arm": name, "seed": seed, "seconds": seconds, **found}


def prepare(options: argparse.Namespace, seed: int) -> None:
    """Trains the teacher of a seed, if it is not there."""
    quiet()
    task, began_s = Addition(options.digits), time.perf_counter()
    hinted = options.task == "hint"
    folder = base_folder(task, options.teacher_steps, seed) if hinted else adder_folder(task, options.teacher_steps)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    told = f", with the hint {task.exact_match(model, hinted=True):.3f}" if hinted else ""
    print(
        f"teacher of seed {seed}: exact {task.exact_match(model):.3f}{told}, {time.perf_counter() - began_s:.0f} s",
        flush=True,
    )


def main() -> None:
    """The bench; see module."""
    parser = argparse.ArgumentParser(description="On-policy distillation on tasks whose truth is known.")
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--digits", type=int)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--arms", nargs="*", help="names as in the table; all if left out")
    parser.add_argument("--steps", type=int, help="of a student")
    parser.add_argument("--teacher-steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name, value in USUAL[options.task].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    ways = WAYS[options.task]
    names = options.arms or list(ways)
    if unknown := [name for name in names if name not in ways]:
        raise SystemExit(f"--arms: {unknown[0]!r} is none of {', '.join(ways)}")
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [(options, seed, name) for seed in seeds for name in names]
    runs: list[dict[str, Any]] = []
    with ProcessPoolExecutor(min(options.workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        list(
            pool.map(
                prepare,
                *zip(*((options, seed) for seed in (seeds if options.task == "hint" else seeds[:1])), strict=True),
            )
        )
        for done in as_completed([pool.submit(one, *job) for job in jobs]):
            runs.append(done.result())
            keep(options, runs)
    table(options, runs, names, seeds)


def keep(options: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """Writes what there is."""
    if "OUT" in os.environ:
        ways = {name: {"loss": way.loss, "share": way.share.model_dump()} for name, way in WAYS[options.task].items()}
        Path(os.environ["OUT"], f"on_policy-{options.task}.json").write_text(
            json.dumps({"options": vars(options), "arms": ways, "runs": runs}, indent=1)
        )


def table(
    options: argparse.Namespace, runs: Sequence[dict[str, Any]], names: Sequence[str], seeds: Sequence[int]
) -> None:
    """A row per arm, beside off-policy alone with the same loss, or the base before."""
    by_seed = {(run["arm"], run["seed"]): run for run in runs}
    values = {name: {key: [by_seed[name, seed][key] for seed in seeds] for key in METRICS} for name in names}
    if options.task == "hint":
        first = [by_seed[names[0], seed] for seed in seeds]
        values = {START: {key: [run[f"{key} before"] for run in first] for key in METRICS}} | values
    rows: list[dict[str, object]] = []
    for name, found in values.items():
        base = START if options.task == "hint" else name.replace("ramp to 0.7", OFF_POLICY)
        row: dict[str, object] = {"arm": name}
        for key, title in METRICS.items():
            row[title] = f"{statistics.fmean(found[key]):.4f}"
            row[f"{title} - {'before' if base == START else 'off-policy'}"] = (
                told_of(paired(found[key], values[base][key])) if base != name and base in values else ""
            )
            row[f"{title}, seeds"] = " ".join(f"{value:.3f}" for value in found[key])
        row["s"] = round(statistics.fmean([by_seed[name, seed]["seconds"] for seed in seeds])) if name != START else 0
        rows.append(row)
    told = f"{options.digits} digits, {options.steps} steps of {options.batch}"
    if options.task == "hint":
        told += f"; with the hint the base samples right answers in {statistics.fmean(run['sampled with the hint'] for run in runs):.3f}"
    show(f"on-policy, {options.task}: share of answers without a mistake; {told}", rows, as_json=options.json)


if __name__ == "__main__":
    main()
