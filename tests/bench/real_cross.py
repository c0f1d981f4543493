"""A real teacher with another tokenizer: SmolLM2-135M-Instruct teaches a small student that has Qwen3's tokenizer, on real rows, beside hard labels at equal steps.

Runs are the product's own `train` in this process; the teacher is the product's engine behind gRPC on a loopback port, and its labels are kept on disk, so that it is asked about
each row once. The student has random weights, two blocks of 64 channels and all 151,936 rows of Qwen3's vocabulary. Sized for two cores of a CPU and a quarter of an hour: the short rows alone.

    python -m tests.real.fetch REAL                       # once: model, rows and tokenizers
    python -m tests.bench.real_cross --real REAL [--seeds 3] [--steps 60] [--rows 192] [--work FOLDER] [--json]

Columns: held-out NLL in nats per UTF-8 byte at the evaluations, mean over seeds; the paired difference to hard labels at the last step with its 95 % t interval; every seed. A seed
decides the student's first weights and the order of the rows. Runs that `--work` holds from before are not made again.
Gate (issue 17): below hard labels alone at equal steps, with an interval that excludes 0.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.bench.real import log_of, told_of
from tests.bench.table import show

MAX_CHARACTERS, LEAST_ANSWER = 250, 30  # of a row's input and output together, and of its output
VOCAB, HIDDEN, LAYERS = 151_936, 64, 2
SFT, CROSS = "sft", "cross-tokenizer + 0.5 hard labels"
ARMS: dict[str, dict[str, Any]] = {
    SFT: {"output": None, "sft_weight": 1.0},
    CROSS: {"output": {"divergence": "forward_kl"}, "sft_weight": 0.5},
    "cross-tokenizer alone": {"output": {"divergence": "forward_kl"}, "sft_weight": 0.0},
}


def write_rows(real: Path, work: Path, train_rows: int, held_out_rows: int) -> None:
    """The first short rows of each file."""
    for name, count in (("train", train_rows), ("heldout", held_out_rows)):
        lines = (real / f"{name}.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if _is_short(json.loads(line))][:count]
        (work / f"{name}.jsonl").write_text("".join(kept))


def _is_short(row: dict[str, str]) -> bool:
    return len(row["input"] + row["output"]) <= MAX_CHARACTERS and len(row["output"]) >= LEAST_ANSWER


def student_folder(real: Path, work: Path, seed: int) -> Path:
    """A student at its start, with Qwen3's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = work / f"student-{seed}"
    if not (folder / "config.json").is_file():
        config = Qwen3Config(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=151_645, pad_token_id=151_643,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            Qwen3ForCausalLM(config).save_pretrained(folder)
        for file in (real / "tokenizers" / "qwen3").iterdir():
            shutil.copyfile(file, folder / file.name)
    return folder


@contextmanager
def served(model: Path, threads: int) -> Iterator[str]:
    """The address of the teacher."""
    from teacher_server.config.backends import TransformersBackend
    from teacher_server.config.server import TeacherConfig
    from teacher_server.replica.engine import TeacherEngine
    from teacher_wire.testing.loopback import serve
    from tests.e2e.classroom import EngineService

    backend = TransformersBackend.model_validate(
        {"model": str(model), "dtype": "float32", "device": "cpu", "threads": threads}
    )
    service = EngineService(TeacherEngine(TeacherConfig(name="smollm2", backend=backend)))
    with serve(service) as server:
        try:
            yield server.address
        finally:
            service.stop()


def settings_of(options: argparse.Namespace, arm: str, seed: int, address: str) -> dict[str, Any]:
    """The config of one run."""
    loss = ARMS[arm]
    return {
        "run": {"seed": seed, "output_dir": str(options.work / "run"), "cache_dir": str(options.work / "cache")},
        "model": {"path": str(student_folder(options.real, options.work, seed)), "dtype": "float32", "lora": None, "threads": options.threads},
        "data": {"train": [str(options.work / "train.jsonl")], "eval": [str(options.work / "heldout.jsonl")], "max_tokens": 256},
        "loss": loss,
        "labels": {"transport": "hidden"},
        **({"teacher": {"address": address, "retry_s": 600}} if loss["output"] else {}),
        "train": {
            "batch_size": options.batch, "accumulation": 1, "max_steps": options.steps, "learning_rate": 1e-2, "warmup_steps": options.steps // 10,
            "schedule": "cosine", "min_lr_share": 0.1, "log_steps": max(1, options.steps // 6), "eval_steps": max(1, options.steps // 2), "eval_batch_size": 8,
            "deterministic": False,
        },
    }  # fmt: skip


def of_arm(options: argparse.Namespace, arm: str, seed: int, address: str) -> dict[str, Any]:
    """The log of one run; kept in a file of `--work`."""
    from rich.console import Console

    from student_trainer.config.run import parse_config
    from student_trainer.training.run import train

    kept = options.work / f"arm{list(ARMS).index(arm)}-{seed}-{options.steps}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    shutil.rmtree(options.work / "run", ignore_errors=True)
    told, began_s = io.StringIO(), time.perf_counter()
    try:
        result = train(
            parse_config(settings_of(options, arm, seed, address), arm), console=Console(file=told, width=200)
        )
    except BaseException:
        print(told.getvalue()[-3000:], file=sys.stderr)
        raise
    entry = {
        "arm": arm,
        "seed": seed,
        "log": log_of(result.output_dir),
        "seconds": time.perf_counter() - began_s,
        "told": told.getvalue(),
    }
    shutil.rmtree(result.output_dir)
    kept.write_text(json.dumps(entry))
    print(f"{arm}, seed {seed}: {evaluations(entry)}, {entry['seconds']:.0f} s", file=sys.stderr, flush=True)
    return entry


def evaluations(run: dict[str, Any]) -> dict[int, float]:
    """Held-out NLL per byte by step."""
    return {int(entry["step"]): entry["eval_nll_per_byte"] for entry in run["log"] if "eval_nll_per_byte" in entry}


def table(runs: list[dict[str, Any]]) -> list[dict[str, object]]:
    """A row per arm; see module."""
    from student_trainer.evaluation.report import paired

    found = {arm: {run["seed"]: evaluations(run) for run in runs if run["arm"] == arm} for arm in ARMS}
    rows: list[dict[str, object]] = []
    for arm, by_seed in found.items():
        if not by_seed:
            continue
        steps = sorted(next(iter(by_seed.values())))
        row: dict[str, object] = {"arm": arm}
        row |= {f"NLL at {step}": f"{statistics.fmean(of[step] for of in by_seed.values()):.4f}" for step in steps}
        both = sorted(by_seed.keys() & found[SFT].keys())
        pairs = [by_seed[seed][steps[-1]] for seed in both], [found[SFT][seed][steps[-1]] for seed in both]
        row["minus sft"] = told_of(paired(*pairs)) if both and arm != SFT else ""
        rows.append(row | {"seeds": " ".join(f"{by_seed[seed][steps[-1]]:.4f}" for seed in sorted(by_seed))})
    return rows


def main() -> None:
    """The bench; see module."""
    parser = argparse.ArgumentParser(description="A real teacher with another tokenizer beside hard labels.")
    parser.add_argument("--real", type=Path, required=True, help="folder of tests.real.fetch")
    parser.add_argument("--work", type=Path, default=Path("/tmp/lyceum-real-cross"))
    parser.add_argument("--arms", nargs="+", default=[SFT, CROSS], choices=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only of what is there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.table:
        runs = [json.loads(file.read_text()) for file in sorted(options.work.glob(f"arm*-{options.steps}.json"))]
    else:
        write_rows(options.real, options.work, options.rows, options.held_out)
        with served(options.real / "smollm2", options.threads) as address:
            runs = [of_arm(options, arm, seed, address) for seed in range(options.seeds) for arm in options.arms]
    title = f"SmolLM2-135M teaches a student with Qwen3's tokenizer: held-out NLL, nats per byte; {options.steps} steps of {options.batch} rows, CPU"
    show(title, table(runs), as_json=options.json)


if __name__ == "__main__":
    main()
