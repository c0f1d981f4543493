"""How fast a student's own samples come: the engines beside each other, and steps whose rollouts and labels are made ahead beside one after the other.

`engines`: completions of one batch of prompts by `hf` and by `vllm`, tokens per second, and seconds to take new weights; the ratio that issue 16 asks for is vllm / hf (>= 4 at
1.5B shapes on a GPU). `pipeline`: the product's own run (`training.run.train`, share 1) with max_staleness 0 and above, seconds per step; the ratio to 0 is asked to be >= 1.5.
Random weights that never end a completion: Qwen2.5-1.5B's shapes on a GPU (LoRA, bfloat16), a small model on the CPU (`--shape`). The teacher of `pipeline` is the
student's base or one of other shapes (`--teacher-shape`), served by the product's edge and engine in a process of its own; with several GPUs on the first one, the student on
the last.

    python -m tests.bench.rollouts engines [--shape 1.5b] [--batch 32 128] [--json]
    python -m tests.bench.rollouts pipeline [--shape cpu] [--staleness 0 1 2] [--engine hf vllm] [--teacher-delay 0.0] [--json]

What there is, is written into $OUT/rollouts-PART.json after every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.random_models import SHAPES, make_folder, write_rows
from tests.bench.stacks import Stacks
from tests.bench.table import show

USUAL: dict[str, dict[str, int]] = {
    "1.5b": {"prompt_tokens": 128, "new_tokens": 256, "batch": 64},
    "7b": {"prompt_tokens": 128, "new_tokens": 256, "batch": 64},
    "cpu": {"prompt_tokens": 32, "new_tokens": 48, "batch": 16},
    "tiny": {"prompt_tokens": 8, "new_tokens": 8, "batch": 4},
}
MICRO_BATCHES = 8  # of a step of `pipeline`
SKIPPED = 3  # steps before the clock starts: they compile, record and fill the pipeline
Rows = list[dict[str, object]]


def model_section(folder: Path) -> dict[str, Any]:
    """Of a config: adapters over a frozen base."""
    return {
        "path": str(folder),
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "lora": {"rank": 16},
        "threads": 1,
    }


class Found:
    """Figures, kept as they come."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.rows: Rows = []

    def add(self, **row: object) -> None:
        """Keeps a row and says it."""
        self.rows.append(row)
        print(f"  {row}", file=sys.stderr, flush=True)
        if "OUT" in os.environ:
            Path(os.environ["OUT"], f"rollouts-{self.part}.json").write_text(
                json.dumps({"machine": machine(), "rows": self.rows}, indent=1)
            )


def machine() -> str:
    """Of a table's title."""
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "CPU"


# ------------------------------------------------------------------- engines


def engines(options: argparse.Namespace, folder: Path) -> Rows:
    """A row per engine and batch."""
    from student_trainer.config.model import ModelConfig
    from student_trainer.model.load import load_student
    from student_trainer.rollout.engines.hf_sampler import HfSampler, Sampling
    from student_trainer.rollout.engines.vllm_engine import VllmSampler
    from student_trainer.rollout.sample import Rollout, RolloutPrompt

    found = Found("engines")
    student = load_student(
        ModelConfig.model_validate(model_section(folder) | {"compiled": False, "graphs": False}), seed=0
    )
    student.model.eval()
    vocab = student.vocab_rows
    trained = {name: p.detach() for name, p in student.model.named_parameters() if p.requires_grad}
    rng = np.random.default_rng(1)
    longest = options.prompt_tokens + options.new_tokens
    for batch in options.batches:
        sampling = Sampling(0, options.new_tokens, batch=batch)
        rates: dict[str, float] = {}
        for engine in options.engine:
            began_s = time.perf_counter()
            sampler = (
                HfSampler(student, sampling, vocab)
                if engine == "hf"
                else VllmSampler(student, sampling, vocab, longest=longest)
            )
            started_s, loads, times = time.perf_counter() - began_s, [], []
            try:
                for repeat in range(options.repeat + 1):  # the first one warms up
                    prompts = [
                        RolloutPrompt(
                            repeat, slot, rng.integers(3, min(vocab, 280), options.prompt_tokens).astype(np.int32), ""
                        )
                        for slot in range(batch)
                    ]
                    began_s = time.perf_counter()
                    sampler.load(trained, repeat)
                    loads.append(time.perf_counter() - began_s)
                    began_s = time.perf_counter()
                    written = sampler.sample(prompts)
                    times.append(time.perf_counter() - began_s)
                    assert all(isinstance(one, Rollout) and one.token_ids.size == options.new_tokens for one in written)
            finally:
                sampler.close()
                del sampler
                gc.collect()
                torch.cuda.empty_cache()
            rates[engine] = batch * options.new_tokens / statistics.median(times[1:])
            found.add(
                engine=engine, batch=batch, tokens_per_s=round(rates[engine]), x_hf=round(rates[engine] / rates["hf"], 2) if "hf" in rates else "",
                load_s=round(statistics.median(loads[1:]), 3), start_s=round(started_s, 1),
            )  # fmt: skip
    return found.rows


# ------------------------------------------------------------------ pipeline


def pipeline(options: argparse.Namespace, folder: Path) -> Rows:
    """A row per engine and staleness; each run is a process of its own."""
    from tests.bench.gpu_client import free_port

    found = Found("pipeline")
    port = free_port()
    gpus = (
        os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if os.environ.get("CUDA_VISIBLE_DEVICES")
        else [str(n) for n in range(torch.cuda.device_count())]
    )
    rows = folder / "rows.jsonl"
    write_rows(rows, options.batch * MICRO_BATCHES, options.prompt_tokens)
    teaching = folder
    if options.teacher_shape not in (None, options.shape):
        teaching = make_folder(options.teacher_shape, folder / "teacher")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    teacher = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.bench.rollouts", "serve", "--folder", str(teaching), "--port", str(port), "--teacher-delay", str(options.teacher_delay)],
        env={**os.environ, **({"CUDA_VISIBLE_DEVICES": gpus[0]} if gpus else {})},
    )  # fmt: skip
    try:
        for engine in options.engine:
            serial_s = 0.0
            for place, staleness in itertools.product(options.rollouts_on, options.staleness):
                apart = place == "teacher"
                out = folder / f"{engine}-{staleness}.json"
                out.unlink(missing_ok=True)
                command = [
                    sys.executable, "-W", "ignore", "-m", "tests.bench.rollouts", "run", "--folder", str(folder), "--port", str(port), "--engine", engine, "--staleness",
                    str(staleness), "--steps", str(options.steps), "--batch", str(options.batch), "--new-tokens", str(options.new_tokens), "--prompt-tokens",
                    str(options.prompt_tokens), "--sync-steps", str(options.sync_steps), "--out", str(out), *(["--stacks"] if options.stacks else []), *(["--rollouts-on", "teacher"] if apart else []),
                ]  # fmt: skip
                seen = f"{gpus[-1]},{gpus[0]}" if apart else gpus[-1] if gpus else None
                env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": seen} if seen else {})}
                with (folder / f"{engine}-{staleness}.log").open("w") as log:
                    code: int | str
                    try:
                        code = subprocess.call(
                            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=options.limit
                        )
                    except subprocess.TimeoutExpired:  # the others are worth their time
                        code = f"not done in {options.limit:g} s"
                if code:
                    print(
                        f"FAILED {engine}, staleness {staleness} ({code}):\n{(folder / f'{engine}-{staleness}.log').read_text()[-2000:]}",
                        file=sys.stderr,
                        flush=True,
                    )
                    continue
                figures: dict[str, float] = json.loads(out.read_text())
                serial_s = serial_s or (figures["step_s"] if staleness == 0 else 0.0)
                ratio = round(serial_s / figures["step_s"], 2) if serial_s else ""
                found.add(
                    engine=engine,
                    rollouts_on=place,
                    max_staleness=staleness,
                    faster=ratio,
                    **{name: round(value, 3) for name, value in figures.items()},
                )
    finally:
        teacher.terminate()
        teacher.wait()
    return found.rows


def run(options: argparse.Namespace) -> None:
    """One run of the product, its steps timed; in a process of its own."""
    from transformers import TrainerCallback

    from student_trainer.config.run import parse_config
    from student_trainer.training import run as product

    times: list[float] = []
    stacks = Stacks() if options.stacks else None
    plain = product.ConsoleProgress

    class Clocked(plain):  # type: ignore[misc,valid-type]
        """Notes when each step is done on the device."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available() and state.global_step in (SKIPPED, timed):
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            if stacks is not None and state.global_step == SKIPPED:
                stacks.begin()
            if stacks is not None and state.global_step == timed:
                kept = Path(
                    os.environ.get("OUT", options.folder),
                    f"stacks-{options.engine[0]}-{options.rollouts_on[0]}-{staleness}.json",
                )
                kept.write_text(
                    json.dumps({"steps_s": np.diff(times).round(2).tolist(), "threads_s": stacks.end()}, indent=1)
                )
            super().on_step_end(args, state, control, **kwargs)

    assert issubclass(plain, TrainerCallback)
    product.ConsoleProgress = Clocked  # type: ignore[misc]
    staleness = options.staleness[0]
    timed = SKIPPED + options.steps
    steps = timed + staleness  # in the last ones nothing is written ahead any more, and they are faster
    sync = min(options.sync_steps, max(1, staleness))
    tree = {
        "run": {"output_dir": str(options.folder / "run"), "cache_dir": str(options.folder / "cache")},
        "model": model_section(options.folder),
        "data": {"train": [str(options.folder / "rows.jsonl")], "eval": [], "max_tokens": options.prompt_tokens + 64},
        "teacher": {"address": f"127.0.0.1:{options.port}", "wait_s": 300},  # it is loading
        "labels": {"transport": "hidden"},
        "loss": {"output": {"divergence": "jsd", "beta": 0.5}, "sft_weight": 0.0},
        "on_policy": {
            "share": 1.0, "max_new_tokens": options.new_tokens, "max_staleness": staleness, "sync_steps": sync, "engine": options.engine[0],
            "device": 1 if options.rollouts_on == ["teacher"] else None,
        },
        "train": {"batch_size": options.batch, "accumulation": MICRO_BATCHES, "max_steps": steps, "learning_rate": 1e-5, "log_steps": steps, "deterministic": False},
    }  # fmt: skip
    shutil.rmtree(options.folder / "run", ignore_errors=True)
    folder = product.train(parse_config(tree, "bench")).output_dir
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    last = next(entry for entry in reversed(log) if "loss" in entry)
    found = {
        "step_s": (times[timed - 1] - times[SKIPPED - 1]) / options.steps, "waited_rollouts": last.get("rollout_wait_share", 0.0), "waited_labels": last["wait_share"],
        "staleness": last["staleness"],
    }  # fmt: skip
    options.out.write_text(json.dumps(found))


def serve(options: argparse.Namespace) -> None:
    """The teacher's process: the product's engine and edge; each answer is held back by `--teacher-delay` seconds, as by a larger teacher far away."""
    from teacher_server.backends.transformers import backend as transformers_backend
    from teacher_server.config.backends import TransformersBackend
    from tests.bench.gpu_server import started

    settings = {"model": str(options.folder), "dtype": "bfloat16" if torch.cuda.is_available() else "float32"}
    torch.set_num_threads(1)
    model = transformers_backend.load(TransformersBackend.model_validate(settings), deterministic=False)

    async def run() -> None:
        _edge, _engine, watched = await started(model, options.port, memory_mb=1024)  # unheld, it would stop
        begin = watched.begin

        def later(jobs: Any) -> Any:
            answer = begin(jobs)

            def waited() -> Any:
                time.sleep(options.teacher_delay)
                return answer()

            return waited

        if options.teacher_delay:
            watched.begin = later  # type: ignore[method-assign]
        await asyncio.Event().wait()

    asyncio.run(run())


def main(arguments: Sequence[str] | None = None) -> None:
    """The bench; see module."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Engines of rollouts, and the pipeline around them.")
    parser.add_argument("part", choices=["engines", "pipeline", "run", "serve"])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.5b" if on_gpu else "cpu")
    parser.add_argument("--engine", nargs="+", choices=["hf", "vllm"])
    parser.add_argument(
        "--batch", type=int, nargs="+", dest="batches", help="sequences at a time; of `pipeline` the first one"
    )
    parser.add_argument(
        "--teacher-shape", choices=sorted(SHAPES), help="of `pipeline`: the teacher's; the student's base if left out"
    )
    parser.add_argument(
        "--rollouts-on",
        nargs="+",
        choices=["student", "teacher"],
        default=["student"],
        help="of `pipeline`: whose GPU they are written on",
    )
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sync-steps", type=int, default=1, help="where the staleness allows it")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a run")
    parser.add_argument("--teacher-delay", type=float, default=0.0, help="seconds")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run is given up")
    parser.add_argument(
        "--stacks",
        action="store_true",
        help="of `pipeline`: write where the threads of each run were in the timed steps into $OUT/stacks-*.json",
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    for name, value in USUAL[options.shape].items():
        if name == "batch":
            options.batches = options.batches or [value]
        elif getattr(options, name) is None:
            setattr(options, name, value)
    options.batch = options.batches[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a bench that is cut off ends its processes
    if options.part in ("run", "serve"):
        {"run": run, "serve": serve}[options.part](options)
        return
    if "teacher" in options.rollouts_on and (torch.cuda.device_count() < 2 or "hf" in (options.engine or ["hf"])):
        parser.error("--rollouts-on teacher needs --engine vllm and two GPUs")
    options.engine = options.engine or (["hf", "vllm"] if options.part == "engines" else ["hf"])
    with tempfile.TemporaryDirectory(prefix="lyceum-rollouts-") as work:
        folder = make_folder(options.shape, options.folder or Path(work))
        rows = {"engines": engines, "pipeline": pipeline}[options.part](options, folder)
    if rows:
        told = f"{options.prompt_tokens} + {options.new_tokens} tokens"
        if options.part == "pipeline":
            told += f", {MICRO_BATCHES} x {options.batch} sequences a step, teacher {options.teacher_shape or options.shape}"
        show(f"rollouts, {options.part}: {options.shape} shapes, {told}, {machine()}", rows, as_json=options.json)


if __name__ == "__main__":
    main()
