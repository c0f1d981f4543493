"""`make demo`: the main job from nothing to a table. A served teacher makes a better student than the data alone.

data -> teacher -> `teacher-server up` on Ray Serve -> three arms, three seeds, equal batches and steps -> report.
Everything it makes is under runs/demo (results) and .cache/demo (data and teacher, reused by a second run).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.markup import escape

from .corpus import CorpusConfig, build_corpus, train_tokenizer
from .models import SIZES, write_model

if TYPE_CHECKING:
    from student_trainer.evaluation.outcome import Outcome

EXAMPLES = Path(__file__).parents[1] / "examples"
SEEDS = (0, 1, 2)
STEPS = 200
BATCH_SIZE = 16
TRAIN_ROWS = STEPS * BATCH_SIZE  # one pass: no arm sees a row twice
HELD_OUT_ROWS = 256
MAX_TOKENS = 192
TOP_K = 32


def main() -> None:
    """Runs the demo; see module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the report; replaced if it exists"
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="data and teacher are kept here")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    with _step(console, "1/5 data: functions of this Python's standard library"):
        data, tokenizer = _data(options.cache.resolve(), console)
    with _step(console, "2/5 teacher"):
        teacher = _teacher(options.cache.resolve(), data, tokenizer, console)
    students = "4/5 students: three arms, three seeds, equal batches and steps"
    with _serving(options.output.resolve(), teacher, console) as address, _step(console, students):
        outcome = _arms(options, data, tokenizer, address, console)
    with _step(console, "5/5 report"):
        _report(options.output, outcome, time.monotonic() - started, console)


@contextmanager
def _step(console: Console, title: str) -> Iterator[None]:
    console.rule(f"[bold]{title}", align="left")
    began = time.monotonic()
    yield
    console.print(f"[dim]{title.split(':')[0]}: {time.monotonic() - began:.0f} s[/]")


def _data(cache: Path, console: Console) -> tuple[Path, Path]:
    """The folder with train.jsonl and heldout.jsonl, and the tokenizer's."""
    data, tokenizer = cache / "data", cache / "tokenizer"
    manifest = build_corpus(data, CorpusConfig(max_bytes=400))
    train_tokenizer(data / "train.jsonl", tokenizer, vocab_size=1024)
    console.print(
        f"rows: {manifest['train']['rows']:,} to learn from, {manifest['heldout']['rows']:,} held out (other files)"
    )  # type: ignore[index]
    return data, tokenizer


def _teacher(cache: Path, data: Path, tokenizer: Path, console: Console) -> Path:
    import torch
    from transformers import AutoTokenizer

    from student_trainer.data.dataset import build_dataset
    from student_trainer.data.rows.sources import DataSource

    from .teacher import TeacherRecipe, train_teacher

    torch.set_num_threads(2)
    rows = build_dataset(
        [DataSource(str(data / "train.jsonl"))],
        AutoTokenizer.from_pretrained(tokenizer),
        max_tokens=MAX_TOKENS,
        overlong="drop",
    )
    return train_teacher(cache, data / "train.jsonl", tokenizer, rows, TeacherRecipe(), console)


@contextmanager
def _serving(folder: Path, teacher: Path, console: Console) -> Iterator[str]:
    """The same command a user types, as a process of its own; the address it serves at, until the block ends."""
    from student_trainer.teachers.embedded import free_port

    port = free_port()
    config = yaml.safe_load((EXAMPLES / "teacher-cpu.yaml").read_text())
    config["edge"] = {"port": port}
    config["teachers"][0]["backend"]["model"] = str(teacher)
    file = folder / "teacher.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "teacher_server.cli", "up", "--until-stdin-closes", str(file)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True, start_new_session=True)
    try:
        with _step(console, "3/5 serving the teacher on Ray Serve"):
            console.print(f"teacher-server up {file}")
            _wait_until_ready(server, console)
        yield f"127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_until_ready(server: subprocess.Popen[str], console: Console) -> None:
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        console.print(f"  [dim]{escape(line.rstrip())}[/]")
        if "ready" in line:
            return
    raise SystemExit(f"the server did not come up: {''.join(lines)}")


def _arms(options: argparse.Namespace, data: Path, tokenizer: Path, address: str, console: Console) -> Outcome:
    """Trains every arm and seed against the served teacher, as `student-trainer compare` does; a student of its own per seed."""
    from student_trainer.comparison.arms import Arm, named_arm
    from student_trainer.comparison.plan import Comparison
    from student_trainer.comparison.run import compare

    students = {seed: options.output / "students" / f"seed{seed}" for seed in SEEDS}
    for seed, student in students.items():
        write_model(student, tokenizer, SIZES["student"], seed)
    example = yaml.safe_load((EXAMPLES / "student-cpu.yaml").read_text())
    tree = {
        **example,
        "run": {"output_dir": str(options.output / "student"), "cache_dir": str(options.cache / "heads")},
        "data": {
            **example["data"],
            "train": [f"{data / 'train.jsonl'}#{TRAIN_ROWS}"],
            "eval": [f"{data / 'heldout.jsonl'}#{HELD_OUT_ROWS}"],
        },
        "teacher": {"address": address},
    }
    comparison = Comparison(
        tree=tree,
        origin="demo",
        arms=[
            named_arm("sft"),  # hard labels alone, beside labels alone
            Arm("gkd_top_k", ("gkd",), ("labels.transport=top_k", f"labels.k={TOP_K}")),
            Arm("gkd_hidden", ("gkd",), ("labels.transport=hidden",)),
        ],
        seeds=SEEDS,
        folder=options.output.resolve(),
        of_seed=lambda arm, seed: {**arm, "model": {**arm["model"], "path": str(students[seed])}},
    )
    quiet = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=not console.is_terminal)
    outcome = compare(comparison, console, quiet)
    if not outcome.is_done:
        raise SystemExit("not every run came to its end; see above")
    return outcome


def _report(folder: Path, outcome: Outcome, seconds: float, console: Console) -> None:
    from student_trainer.comparison.reporting import write_page
    from student_trainer.evaluation.report import print_table
    from student_trainer.evaluation.report_folder import write_report

    summary = replace(outcome.results(), seconds=seconds)
    write_report(folder, summary, outcome.points())
    write_page([folder], [], folder / "report.html")
    print_table(summary, console)
    console.print(f"{folder / 'report.md'}, {folder / 'report.json'}, {folder / 'report.html'}")


if __name__ == "__main__":
    main()
