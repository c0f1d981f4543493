"""`make demo`: the main job from nothing to a table. A served teacher makes a better student than the data alone.

data -> teacher -> `teacher-server up` on Ray Serve -> three arms, three seeds, equal batches and steps -> report.
Everything it makes is under runs/demo (results) and .cache/demo (data and teacher, reused by a second run).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from deploy.demo.corpus import CorpusConfig, build_corpus, train_tokenizer
from deploy.demo.models import SIZES, write_model

EXAMPLES = Path(__file__).parents[1] / "examples"
SEEDS = (0, 1, 2)
STEPS = 200
BATCH_SIZE = 16
TRAIN_ROWS = STEPS * BATCH_SIZE  # one pass: no arm sees a row twice
HELD_OUT_ROWS = 256
MAX_TOKENS = 192
TOP_K = 32
PURE = {"output": {"divergence": "forward_kl"}, "sft_weight": 0.0}  # labels alone beside hard labels alone
LOSSES: dict[str, dict[str, Any]] = {
    "sft": {"loss": {"output": None, "sft_weight": 1.0}},
    "gkd_top_k": {"labels": {"transport": "top_k", "k": TOP_K}, "loss": PURE},
    "gkd_hidden": {"labels": {"transport": "hidden"}, "loss": PURE},
}
METRICS = ("nll_per_byte", "kl_to_teacher", "acc1", "acc3")


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
        results = _arms(options, data, tokenizer, address, console)
    with _step(console, "5/5 report"):
        _report(options.output, results, time.monotonic() - started, console)


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

    from deploy.demo.teacher import TeacherRecipe, train_teacher
    from student_trainer.data.dataset import build_dataset
    from student_trainer.data.rows.sources import DataSource

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
        console.print(f"  [dim]{line.rstrip()}[/]")
        if "ready" in line:
            return
    raise SystemExit(f"the server did not come up: {''.join(lines)}")


def _arms(options: argparse.Namespace, data: Path, tokenizer: Path, address: str, console: Console) -> dict[str, Any]:
    """Trains every arm and seed against the served teacher; results and curves."""
    from student_trainer.config.run import parse_config
    from student_trainer.training.run import train

    values: dict[str, dict[str, list[float]]] = {arm: {metric: [] for metric in METRICS} for arm in LOSSES}
    curves = []
    teacher: dict[str, float] = {}
    example = yaml.safe_load((EXAMPLES / "student-cpu.yaml").read_text())
    for seed in SEEDS:
        student = options.output / "students" / f"seed{seed}"
        write_model(student, tokenizer, SIZES["student"], seed)
        for arm, sections in LOSSES.items():
            folder = options.output / "arms" / f"{arm}-{seed}"
            console.print(f"[bold]{arm}[/] seed {seed}")
            tree = {
                **example,
                "run": {"output_dir": str(folder), "seed": seed, "cache_dir": str(options.cache / "heads")},
                "model": {**example["model"], "path": str(student)},
                "data": {
                    **example["data"],
                    "train": [f"{data / 'train.jsonl'}#{TRAIN_ROWS}"],
                    "eval": [f"{data / 'heldout.jsonl'}#{HELD_OUT_ROWS}"],
                },
                "teacher": {"address": address},
                **sections,
            }
            result = train(
                parse_config(tree, "demo"),
                console=Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=not console.is_terminal),
            )
            for metric in METRICS:
                values[arm][metric].append(result.metrics[metric])
            teacher["nll_per_byte"] = result.metrics["teacher_nll_per_byte"]
            teacher["acc1"], teacher["acc3"] = result.metrics["teacher_acc1"], result.metrics["teacher_acc3"]
            curves += _points(arm, seed, result.curve)
            console.print("  " + "  ".join(f"{metric} {result.metrics[metric]:.4f}" for metric in METRICS))
    return {"arms": values, "teacher": {**teacher, "kl_to_teacher": 0.0}, "curves": curves}


def _points(arm: str, seed: int, curve: list[dict[str, float]]) -> list[Any]:
    """Log entries as the report's curves."""
    from student_trainer.evaluation.report import CurvePoint

    points = []
    for entry in curve:
        step = int(entry["step"])
        if "loss" in entry:
            points.append(CurvePoint(arm, seed, step, "loss", entry["loss"]))
        for metric in ("nll_per_byte", "kl_to_teacher"):
            if f"eval_{metric}" in entry:
                points.append(CurvePoint(arm, seed, step, metric, entry[f"eval_{metric}"]))
    return points


def _report(folder: Path, results: dict[str, Any], seconds: float, console: Console) -> None:
    from student_trainer.evaluation.report import Results, print_table
    from student_trainer.evaluation.report_folder import write_report

    summary = Results(results["arms"], results["teacher"], STEPS, SEEDS, seconds)
    write_report(folder, summary, results["curves"])
    print_table(summary, console)
    console.print(f"{folder / 'report.md'}, {folder / 'report.json'}")


if __name__ == "__main__":
    main()
