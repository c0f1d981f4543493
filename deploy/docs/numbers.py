"""Numbers of README and pages from the JSON that benches wrote into tests/bench/tables, put between markers.

`<!-- number: NAME -->42<!-- /number -->` stands in a sentence or a cell, `<!-- table: NAME -->` ... `<!-- /table -->` around a whole table.
A name that is not known is an error, so that none is typed by hand. Derived figures (bytes of labels) come from the wire's own formats.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

TABLES = Path(__file__).parents[2] / "tests" / "bench" / "tables"
_NUMBER = re.compile(r"(<!-- number: ([\w.]+) -->).*?(<!-- /number -->)")
_TABLE = re.compile(r"(<!-- table: ([\w.]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_T95 = {2: 12.706, 3: 4.303, 5: 2.776}  # two-sided 95 % quantile of Student's t, by number of seeds


def filled(text: str, path: Path) -> str:
    """The text of a page with every marked number and table as the JSON has it.

    Raises:
        KeyError: the page names a number that nothing makes.
    """

    def number(found: re.Match[str]) -> str:
        if found[2] not in NUMBERS:
            raise KeyError(f"{path}: no number is called {found[2]}; there are {', '.join(NUMBERS)}")
        return found[1] + NUMBERS[found[2]]() + found[3]

    def table(found: re.Match[str]) -> str:
        if found[2] not in MADE_TABLES:
            raise KeyError(f"{path}: no table is called {found[2]}; there are {', '.join(MADE_TABLES)}")
        return found[1] + MADE_TABLES[found[2]]() + found[3]

    return _TABLE.sub(table, _NUMBER.sub(number, text))


@functools.cache
def read(name: str) -> Any:
    """One file of tables."""
    return json.loads((TABLES / name).read_text())


def difference(arm: Sequence[float], base: Sequence[float], digits: int = 3) -> str:
    """Paired difference of seeds with its 95 % interval."""
    each = [one - other for one, other in zip(arm, base, strict=True)]
    half = _T95[len(each)] * stdev(each) / math.sqrt(len(each))
    return f"{mean(each):+.{digits}f} [{mean(each) - half:+.{digits}f}, {mean(each) + half:+.{digits}f}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the real pair


def _real(arm: str) -> list[list[dict[str, float]]]:
    runs: list[list[dict[str, float]]] = read("real-2026-11-27.json")["results"][arm]
    return runs


def _best(arm: str) -> list[float]:
    """Lowest held-out NLL of each seed."""
    return [min(entry["nll_per_byte"] for entry in run) for run in _real(arm)]


def _last_kl(arm: str) -> float:
    return mean(run[-1]["kl_to_teacher"] for run in _real(arm))


def real_table() -> str:
    """Arms of the real pair: NLL at the best step, and KL at the end."""
    sft = _best("sft")
    rows = [["SFT on the rows' answers, stopped at its best", f"{mean(sft):.3f}", "", f"{_last_kl('sft'):.2f}"]]
    for arm, title in (
        ("gkd", "GKD, exact labels"),
        ("gkd + 0.5 hard labels", "**GKD with `sft_weight: 0.5`, the default**"),
    ):
        best = _best(arm)
        rows.append([title, f"{mean(best):.3f}", difference(best, sft), f"{_last_kl(arm):.2f}"])
    return _markdown(
        [
            "arm",
            "held-out NLL at its best step, nats/byte",
            "minus SFT's best, 95 % interval",
            "KL to teacher at step 1,200",
        ],
        rows,
    )


# ---------------------------------------------------------------- the demo


def demo_table() -> str:
    """Arms of `make demo`: means of three seeds."""
    report = read("demo-2026-11-27.json")
    names = {
        "sft": "SFT on the data's own tokens",
        "gkd_top_k": "GKD, `top_k` labels (k = 32 and the tail)",
        "gkd_hidden": "GKD, `hidden` labels (exact)",
    }
    figures = ("kl_to_teacher", "acc1", "acc3")
    base = report["arms"]["sft"]["nll_per_byte"]
    rows = []
    for arm, title in names.items():
        found = report["arms"][arm]
        more = "" if arm == "sft" else f", minus SFT {difference(found['nll_per_byte'], base)}"
        rows.append(
            [title, f"{mean(found['nll_per_byte']):.3f}{more}", *(f"{mean(found[name]):.3f}" for name in figures)]
        )
    teacher = report["teacher"]
    rows.append(["the teacher", *(f"{teacher[name]:.3f}" for name in ("nll_per_byte", *figures))])
    return _markdown(["arm", "held-out NLL, nats/byte", "KL to teacher, nats/token", "acc1", "acc3"], rows)


# ---------------------------------------------------------------- speed


def _served(title: str, labels: str, lengths: str = "uniform") -> float:
    """Label tokens per second over gRPC."""
    tables = dict(read("gpu-server-2026-11-27.json")["tables"])
    return float(
        next(row["label tokens/s"] for row in tables[title] if row["labels"] == labels and row["lengths"] == lengths)
    )


_WITH_RAY = "with Ray Serve: four client processes over gRPC"


def _prefill() -> float:
    return float(dict(read("gpu-server-2026-11-27.json")["tables"])["vLLM, tokens/s"][0]["prefill_32x2048"])


def _student(step: str) -> dict[str, float]:
    found: dict[str, float] = next(
        row for row in read("features-student-2026-11-27.json")["rows"] if row["step"] == step
    )
    return found


def measured_table() -> str:
    """What was measured: the real pair first; where weights are random it says so."""
    sft, both = _best("sft"), _best("gkd + 0.5 hard labels")
    labels, prefill, step = _served(_WITH_RAY, "hidden"), _prefill(), _student("output alone")
    hidden = _student("hidden, 3 layers")
    rows = [
        ["A trained pair: SmolLM2-135M-Instruct teaches 15 of its layers, 512 held-out functions, 3 seeds",
         f"best NLL {mean(both):.3f} nats/byte with GKD and hard labels, {mean(sft):.3f} with SFT: {difference(both, sft)}",
         "4 H100, 2026-11-27", "`python -m tests.bench.real`"],
        ["The same pair, what `loss.hidden` adds at 1,200 steps", f"{layers_gain()} nats/byte", "2 H200, 2026-11-27", "`python -m tests.bench.real_layers final`"],
        ["The same pair, 200 on-policy steps (JSD) in place of 200 off-policy ones, both after 400: KL to the teacher on the student's own samples, 3 seeds",
         own_samples_gain(), "1 H200, 2026-11-28", "`python -m tests.bench.real_on_policy warm`, then `more --engine vllm`"],
        ["Labels of a 7B shape, random weights, over gRPC through Ray Serve: `hidden` / `top_k` 64",
         f"{labels:,.0f} / {_served(_WITH_RAY, 'top-64'):,.0f} tokens/s; vLLM's prefill without labels {prefill:,.0f}",
         "1 H100, 2026-11-27", "`python -m tests.bench.gpu_server --ray`"],
        ["A step of a 1.5B shape, random weights, LoRA, 2 x 2,048 tokens, exact labels",
         f"{step['ms']:.0f} ms, {step['held GiB']:.1f} GiB held by torch; with `loss.hidden` on 3 layers {hidden['ms']:.0f} ms", "1 H200, 2026-11-27", "`python -m tests.bench.features_student`"],
        ["`make demo`: a trained 1.4 M-parameter teacher, 3 seeds", f"GKD minus SFT {demo_gain()} nats/byte", "2 CPU cores, 2026-11-27", "`make demo`"],
    ]  # fmt: skip
    return _markdown(["what", "result", "hardware, date", "command"], rows)


def layers_gain() -> str:
    """NLL of the recipe with `loss.hidden` 12, constant, minus the recipe alone, paired by seed, at the last step."""
    last: dict[tuple[str, int], float] = {}
    for run in read("layers-final-2026-11-27.json")["runs"]:
        if run["evaluations"]:
            last[run["arm"], run["seed"]] = run["evaluations"][-1]["nll_per_byte"]
    seeds = sorted(seed for arm, seed in last if arm == "recipe")
    return difference([last[HIDDEN_ARM, seed] for seed in seeds], [last["recipe", seed] for seed in seeds])


HIDDEN_ARM = "cos 12"


def own_samples_gain() -> str:
    """KL(student, teacher) of both, and the difference by seed; what it costs on held-out rows."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in read("on-policy-h200-2026-11-28.json")["runs"]:
        found.setdefault(run["arm"], {})[run["seed"]] = run["figures"]
    of = lambda arm, key: [found[arm][seed][key] for seed in sorted(found[arm])]  # noqa: E731
    own, data = "on-policy, JSD", "off-policy, the recipe"
    kl, nll = ([of(arm, key) for arm in (own, data)] for key in ("kl_student_teacher", "nll_per_byte"))
    return f"{mean(kl[0]):.3f} nats/token, against {mean(kl[1]):.3f}: {difference(*kl)}; held-out NLL {difference(*nll)} nats/byte, without hard labels"


def demo_gain() -> str:
    """NLL of exact labels minus SFT."""
    arms = read("demo-2026-11-27.json")["arms"]
    return difference(arms["gkd_hidden"]["nll_per_byte"], arms["sft"]["nll_per_byte"])


# ---------------------------------------------------------------- sizes


def _gb(count: float, digits: int = 1) -> str:
    return f"{count / 1e9:.{digits}f} GB"


_CARDS = {
    "12 GB": 12.9e9,
    "16 GB": 17.2e9,
    "24 GB": 25.8e9,
    "32 GB": 34.4e9,
    "48 GB": 51.5e9,
    "80 GB": 85.9e9,
    "141 GB": 150e9,
}


def _cards(count: float, more: str) -> str:
    """The smallest usual card that holds so many bytes with a tenth to spare, or `more`."""
    return next((name for name, size in _CARDS.items() if count * 1.1 <= size), more)


def teachers_table() -> str:
    """Teacher sizes: weights, card, head, and gigabytes of labels per million answer tokens."""
    rows = []
    for one in read("sizing.json")["teachers"]:
        room = one["weights"] + 4e9  # activations of a small batch, and logits at a time
        labels = one["row_bytes"]
        rows.append([
            one["size"], _gb(one["weights"]), _cards(room, "2 x 80 GB, by vLLM"), _gb(one["head"], 2),
            *(_gb(labels[name] * 1e6, 2 if name == "top_k 128" else 1) for name in ("hidden", "int8", "top_k 128")),
        ])  # fmt: skip
    head = [
        "teacher",
        "weights, bfloat16",
        "card of the teacher",
        "its output head, held by the student (`hidden`)",
        "labels per million answer tokens: `hidden`",
        "int8",
        "`top_k` 128",
    ]
    return _markdown(head, rows)


def students_table() -> str:
    """Student sizes by way of training: peak memory on a GPU, with a 7B teacher's head for exact labels and without it."""
    ways = {"lora": "LoRA", "qlora": "QLoRA", "full": "every weight"}
    rows = []
    for one in read("sizing.json")["students"]:
        rows.append(
            [
                f"{one['size']}, {ways[one['way']]}",
                *(f"{one[name] / 2**30:.1f} GiB" for name in ("hidden", "top_k")),
                _cards(one["hidden"], "none"),
            ]
        )
    return _markdown(
        ["student", "with `hidden` labels of a 7B teacher", "with `top_k` labels", "card of the student"], rows
    )


def _student_gib(size: str, way: str) -> str:
    found = next(one for one in read("sizing.json")["students"] if (one["size"], one["way"]) == (size, way))
    return f"{found['hidden'] / 2**30:.1f}"


def _mbit(labels: str, speed: int = 10_000) -> str:
    """Mbit/s of a student that takes so many answer tokens a second from a 7B teacher."""
    return f"{speed * read('sizing.json')['teachers'][0]['row_bytes'][labels] * 8 / 1e6:,.0f}"


def link_table() -> str:
    """Mbit/s that labels of a 7B teacher take at a student's speed."""
    rows = [
        [f"{speed:,}", *(_mbit(name, speed) for name in ("hidden", "int8", "top_k 128"))]
        for speed in (1_000, 5_000, 10_000, 40_000)
    ]
    return _markdown(
        ["answer tokens/s of the student", "`hidden`, Mbit/s", "int8, Mbit/s", "`top_k` 128, Mbit/s"], rows
    )


MADE_TABLES: dict[str, Callable[[], str]] = {
    "real": real_table,
    "demo": demo_table,
    "measured": measured_table,
    "teachers": teachers_table,
    "students": students_table,
    "link": link_table,
}
NUMBERS: dict[str, Callable[[], str]] = {
    "labels.hidden": lambda: f"{round(_served(_WITH_RAY, 'hidden'), -3):,.0f}",
    "labels.of_prefill": lambda: f"{_served(_WITH_RAY, 'hidden') / _prefill():.2f}",
    "step.ms": lambda: f"{_student('output alone')['ms']:.0f}",
    "step.gib": lambda: f"{_student('output alone')['held GiB']:.1f}",
    "real.gkd": lambda: f"{mean(_best('gkd + 0.5 hard labels')):.3f}",
    "real.sft": lambda: f"{mean(_best('sft')):.3f}",
    "real.difference": lambda: difference(_best("gkd + 0.5 hard labels"), _best("sft")),
    "real.teacher": lambda: f"{_real('sft')[0][0]['teacher_nll_per_byte']:.3f}",
    "student.lora": lambda: _student_gib("1.5B", "lora"),
    "student.3b": lambda: _student_gib("3B", "lora"),
    "student.7b": lambda: _student_gib("7B", "qlora"),
    "link.hidden": lambda: _mbit("hidden"),
    "link.int8": lambda: _mbit("int8"),
    "link.top_k": lambda: _mbit("top_k 128"),
    "head.7b": lambda: _gb(read("sizing.json")["teachers"][0]["head"], 2),
}
