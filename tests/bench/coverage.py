"""How much every ordered pair of five real tokenizers can teach the other: groups, classes, and what becomes of numbers.

LYCEUM_REAL names the folder of real tokenizers (tests/real/fetch.py). A text is a completion with its end of turn; `masked` must be 0.
    LYCEUM_REAL=FOLDER python -m tests.bench.coverage [--json] [--write]
    LYCEUM_REAL=FOLDER python -m tests.bench.coverage --partitions FOLDER     # of each teacher of a Qwen3 student, for tests.bench.cross_loss

--write puts the figures into tests/bench/tables/coverage.json and the table into docs/train/cross_tokenizer.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from student_trainer.data.cross_tokenizer.alignment import align
from student_trainer.data.cross_tokenizer.classes import Partition, kept_classes, vocabulary_classes
from student_trainer.data.cross_tokenizer.coverage import Coverage, class_figures
from student_trainer.data.cross_tokenizer.first_tokens import first_tokens
from student_trainer.data.text.tokenizer_file import load_tokenizer
from teacher_wire.vocabulary.byte_table import ByteTable
from teacher_wire.vocabulary.tokenizer_file import byte_table
from tests.bench.cross_texts import KINDS
from tests.bench.table import show

FOLDERS = {
    "SmolLM2": "smollm2",
    "Qwen3": "tokenizers/qwen3",
    "Llama 3.1": "tokenizers/llama3_1",
    "Gemma 3": "tokenizers/gemma3",
    "DeepSeek V3": "tokenizers/deepseek_v3",
}
# What ends a turn or a text in each of them.
ENDS = {
    "SmolLM2": ("<|im_end|>", "<|endoftext|>"),
    "Qwen3": ("<|im_end|>", "<|endoftext|>"),
    "Llama 3.1": ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    "Gemma 3": ("<end_of_turn>", "<eos>"),
    "DeepSeek V3": ("<｜end▁of▁sentence｜>",),
}
TABLE = Path("tests/bench/tables/coverage.json")
PAGE = Path("docs/train/cross_tokenizer.md")


@cache
def tokenizer(name: str) -> Any:
    """One of the five."""
    return load_tokenizer(Path(os.environ["LYCEUM_REAL"]).expanduser() / FOLDERS[name])


@cache
def table(name: str) -> ByteTable:
    """Its bytes and roles."""
    made = tokenizer(name)
    return byte_table(made.backend_tokenizer.to_str(), bos=made.bos_token or "", ends=ENDS[name])


def classes(student: str, teacher: str) -> tuple[Partition, float]:
    """The partition of a pair, and the CPU seconds that it took; a pair and its reverse have the same classes."""
    made, took_s = _classes(*sorted((student, teacher)))
    if student < teacher:
        return made, took_s
    return Partition(made.teacher_Vt, made.student_Vs, made.classes, made.other), took_s


@cache
def _classes(student: str, teacher: str) -> tuple[Partition, float]:
    began_s = time.process_time()
    return made_for(student, teacher), time.process_time() - began_s


def made_for(student: str, teacher: str) -> Partition:
    """The partition, numbered as a run of this student numbers it."""
    tables, tokenizers = (table(student), table(teacher)), (tokenizer(student), tokenizer(teacher))
    return vocabulary_classes(*tables, *(first_tokens(*both) for both in zip(tokenizers, tables, strict=True)))


@cache
def written(name: str, kind: str) -> list[np.ndarray]:
    """The texts of a kind as completions."""
    made = tokenizer(name)
    end = made.convert_tokens_to_ids(ENDS[name][0])
    return [
        np.array([*one.ids, end], np.int64)
        for one in made.backend_tokenizer.encode_batch(KINDS[kind](), add_special_tokens=False)
    ]


def coverage(student: str, teacher: str, kind: str) -> Coverage:
    """Of all texts of a kind."""
    found = Coverage()
    partition, _ = classes(student, teacher)
    for ids_n, ids_m in zip(written(student, kind), written(teacher, kind), strict=True):
        found.add(align(ids_n, table(student), ids_m, table(teacher)), len(ids_n), len(ids_m), ids_n, partition)
    return found


def measured() -> list[dict[str, Any]]:
    """All figures of every ordered pair."""
    rows = []
    for student, teacher in itertools.permutations(FOLDERS, 2):
        partition, took_s = classes(student, teacher)
        figures = class_figures(partition, table(student), table(teacher)).figures()
        row: dict[str, Any] = {"student": student, "teacher": teacher, **figures, "seconds": took_s, "kinds": {}}
        for kind in KINDS:
            found = coverage(student, teacher, kind)
            row["kinds"][kind] = {**found.figures(), "groups": found.kind_shares()}
        rows.append(row)
    return rows


def told(rows: list[dict[str, Any]]) -> list[dict[str, object]]:
    """The table for people."""
    lines: list[dict[str, object]] = []
    for row in rows:
        line: dict[str, object] = {
            "student": row["student"],
            "teacher": row["teacher"],
            "classes": f"{row['classes']:,}",
        }
        line |= {"pairs": f"{row['pairs of classes']:.0%}"}
        for kind, figures in row["kinds"].items():
            line[kind] = f"{figures['1-1 of student tokens']:.0%}"
        line |= {name: f"{row[key]:.0%}" for name, key in _NUMBERS.items()}
        worst = max(row["kinds"].values(), key=lambda figures: figures["masked student tokens"])
        lines.append(line | {"masked": f"{worst['masked student tokens']:.0%}"})
    return lines


_NUMBERS = {"numbers by bytes": "numbers matched by bytes", "numbers by classes": "numbers kept"}


def write(rows: list[dict[str, Any]]) -> None:
    """The committed figures, and the table in the page about them."""
    rounded = json.loads(json.dumps(rows), parse_float=lambda text: round(float(text), 4))
    TABLE.write_text(
        json.dumps({"command": "python -m tests.bench.coverage --write", "rows": rounded}, indent=1) + "\n"
    )
    lines = told(rows)
    shown = ["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0])]
    shown += ["| " + " | ".join(map(str, line.values())) + " |" for line in lines]
    page = PAGE.read_text()
    marked = re.compile(r"(<!-- coverage -->\n).*?(<!-- end -->)", re.S)
    PAGE.write_text(marked.sub(lambda found: found[1] + "\n".join(shown) + "\n" + found[2], page))


def main() -> None:
    """The script; see module."""
    parser = argparse.ArgumentParser(description="What joins two real tokenizers.")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE} and the table in {PAGE}")
    parser.add_argument(
        "--partitions", type=Path, help="keep the classes of Qwen3 and each other one in this folder, and end"
    )
    options = parser.parse_args()
    if not os.environ.get("LYCEUM_REAL"):
        raise SystemExit("LYCEUM_REAL names no folder of real tokenizers: python -m tests.real.fetch FOLDER")
    if options.partitions is not None:
        for name in FOLDERS.keys() - {"Qwen3"}:
            kept_classes(options.partitions, name.replace(" ", "-").lower(), partial(made_for, "Qwen3", name))
        return
    rows = measured()
    if options.write:
        write(rows)
    show("1-1 of the student's tokens, and classes", told(rows), as_json=False)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
