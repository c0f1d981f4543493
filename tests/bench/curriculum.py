"""Easy rows first against all rows at once on task 1 of docs/concepts/method.md 12, whose truth is known: five seeds, paired intervals.

Rows, students and labels over gRPC are those of `tests/e2e/task1.py`; the order is the product's (`training/curriculum`), from the likelihood in the
labels that the student learns from. All rows of the task are of one length, so that the likelihood alone orders them. Beside `easy first` and `uniform` there is
`hard first`, the same list from the other end: it says whether the order matters, or only that a part of the rows is seen more often. CPU, one thread.

    python -m tests.bench.curriculum [--seeds 5] [--steps 250 80] [--json]

On the real pair, which needs a GPU: python -m tests.bench.real --real REAL --arms gkd "gkd, curriculum"
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from student_trainer.config.order.curriculum import CurriculumConfig
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example
from student_trainer.labels.packing import pack
from student_trainer.training.curriculum.difficulty import difficulty, easy_to_hard
from student_trainer.training.curriculum.order import CurriculumOrder, Pace
from teacher_wire.score.signals import spec_of
from tests.bench.table import show
from tests.e2e import task1
from tests.e2e.classroom import Arm, Classroom, classroom, paired, teacher_folder, train_student

ARMS = ("uniform", "easy first", "hard first")
SPEC = spec_of("hidden", task1.VOCAB)


def order_of(name: str, score_N: np.ndarray, examples: list[Example], steps: int, seed: int) -> RunOrder | None:
    """The list of an arm; None for the uniform one."""
    if name == "uniform":
        return None
    settings = CurriculumConfig()
    ranked = easy_to_hard(score_N if name == "easy first" else -score_N, [example.key for example in examples])
    pace = Pace(settings.start, settings.power, steps // 2, settings.mix)
    return CurriculumOrder(
        ranked, pace, batch_size=task1.STUDENT.batch_size, accumulation=1, epochs=1, max_steps=steps, seed=seed
    )


def scores(room: Classroom, examples: list[Example]) -> np.ndarray:
    """float64 [N]: how hard each row is, from the labels."""
    parts = room.labels(examples, SPEC).cut(pack(examples).batch)
    nll_N = np.array([-float(part.label_logp_N.array.mean()) for part in parts])
    tokens_N = np.array([example.token_ids.size for example in examples])
    return difficulty(CurriculumConfig(), nll_N, tokens_N, np.zeros(len(examples)))


def main() -> None:
    """The bench; see module."""
    parser = argparse.ArgumentParser(description="Easy rows first against all rows at once.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[task1.STUDENT.steps, 80])
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    rows: list[dict[str, object]] = []
    with classroom(teacher_folder(task1.TEACHER, task1.fresh)) as room:
        for steps in options.steps:
            recipe = replace(task1.STUDENT, steps=steps)
            found: dict[str, list[float]] = {name: [] for name in ARMS}
            for seed in range(options.seeds):
                examples = list(task1.examples(seed))
                score_N = scores(room, examples)
                for name in ARMS:
                    order = order_of(name, score_N, examples, steps, seed)
                    student = train_student(recipe, examples, Arm(SPEC), seed, room, order)
                    found[name].append(task1.kl_to_truth(student.model))
                    print(f"{steps} steps, seed {seed}, {name}: {found[name][-1]:.4f}", flush=True)
            for name in ARMS:
                kls = found[name]
                row: dict[str, object] = {
                    "steps": steps, "arm": name, "KL to the truth": statistics.mean(kls),
                    "sd": statistics.stdev(kls) if len(kls) > 1 else float("nan"),
                    "uniform minus arm, 95 %": "",
                    "seeds": " ".join(f"{kl:.4f}" for kl in kls),
                }  # fmt: skip
                if name != "uniform" and len(kls) > 1:
                    mean, low, high = paired(found["uniform"], kls)
                    row["uniform minus arm, 95 %"] = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
                rows.append(row)
    show(
        f"task 1, nats per token, {time.perf_counter() - began_s:.0f} s, load {os.getloadavg()[0]:.1f}",
        rows,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
