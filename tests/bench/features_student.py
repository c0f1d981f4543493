"""What terms on layers cost a student's step on a GPU: the second half of `features`, by the runs of `gpu_student`.

Shapes of Qwen2.5-1.5B (student, LoRA, gradient checkpointing, bfloat16, 2 x 2,048 tokens a step) and 7B (teacher), random weights: what a card of 24 GiB takes.
Labels are in memory, fetched over gRPC before the clock starts, so that a step is the student's own; runs are `DistillationTrainer`'s, as it ships.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from student_trainer.labels.rows_on_device import head_on
from student_trainer.losses.features.layers import uniform
from student_trainer.teachers.features import FeaturePlan, plan_features
from tests.bench.gpu_student import BY_KERNEL, OUTPUT_ALONE, SPECS, InMemory, Remote, Room, Row, taken
from tests.bench.real import cards
from tests.bench.student_memory import STUDENT, V

ARTICLE = [1, 5, 12]
ALONE, BEFORE = "output alone", "before the clock counts"


def cases(blocks: int) -> dict[str, dict[str, Any]]:
    """Sections of `loss` beside the output's, of a student of so many blocks."""
    three = list(uniform(3, blocks))
    six = sorted({*three, *ARTICLE})
    late = [three[1]]
    return {
        f"hidden, {len(three)} layers": {"hidden": {"weight": 1.0, "layers": three}},
        f"hidden, {len(six)} layers": {"hidden": {"weight": 1.0, "layers": six}},
        "hidden, 3 layers, cka": {"hidden": {"weight": 1.0, "layers": three, "objective": "cka"}},
        "attention, 1 layer": {"attention": {"weight": 0.05, "layers": late}},
        "relation, 1 layer": {"attention": {"weight": 0.05, "layers": late, "objective": "relation"}},
        "ffn, 1 layer": {"ffn": {"weight": 0.05, "layers": late}},
        "hidden, 3 layers, attention and ffn, 1": {
            "hidden": {"weight": 1.0, "layers": three}, "attention": {"weight": 0.05, "layers": late}, "ffn": {"weight": 0.05, "layers": late},
        },
        "preset article": {"preset": "article"},
    }  # fmt: skip


def measured(steps: int) -> list[Row]:
    """A row per case: milliseconds a step and the ratio to the output term alone, recorded as it ships and kernel by kernel; GiB held and used."""
    blocks = int(str(STUDENT["num_hidden_layers"]))
    tried = cases(blocks)
    room = Room(steps)
    remote = Remote(cards()[0], sorted({*uniform(3, blocks), *ARTICLE}))
    try:
        room.head = head_on(remote.head, V, torch.device("cuda"))
        _case(room, remote, BEFORE, {})  # the first runs of a process measure and record otherwise
        _case(room, remote, ALONE, {})
        for name, sections in tried.items():
            try:
                _case(room, remote, name, sections)
            except Exception as error:  # a lent minute is not lost for one case
                print(f"FAILED {name}: {error!r}", flush=True)
        _case(room, remote, f"{ALONE}, again", {})
    finally:
        remote.stop()
    return _with_ratios([row for row in room.rows if not str(row["step"]).startswith(BEFORE)])


def _case(room: Room, remote: Remote, name: str, sections: dict[str, Any]) -> None:
    loss = (sections if "preset" in sections else OUTPUT_ALONE | sections) if sections else OUTPUT_ALONE
    config, spec = room.config(loss, "hidden", True), SPECS["hidden"]
    plan: FeaturePlan | None = None
    if config.loss.features:
        plan = plan_features(config.loss.features, remote.info, V, int(str(STUDENT["num_hidden_layers"])))
        spec = replace(spec, signals=(*spec.signals, *plan.signals.values()))
        plan = replace(plan, basis=remote.basis) if plan.needs_basis else plan
    data, order = room.data(0), room.order()
    kept = taken(remote.feed(spec, data, order), order)
    for graphs in (True, False):
        room.ours(name + ("" if graphs else BY_KERNEL), "hidden", lambda *_: InMemory(kept), graphs=graphs, loss=loss, features=plan)  # fmt: skip


def _with_ratios(rows: list[Row]) -> list[Row]:
    ms = {str(row["step"]): float(str(row["ms"])) for row in rows}
    found: list[Row] = []
    for row in rows:
        name = str(row["step"])
        kernels = BY_KERNEL if BY_KERNEL in name else ""
        alone = (ms[ALONE + kernels] + ms[f"{ALONE}, again{kernels}"]) / 2
        found.append({
            "step": name, "ms": round(ms[name], 1), "x output alone": round(ms[name] / alone, 3),
            "used GiB": row["used GiB"], "held GiB": row["held GiB"],
        })  # fmt: skip
    return found
