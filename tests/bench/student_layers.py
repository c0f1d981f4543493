"""What compiled decoder layers are worth on one GPU: a student's step with peft's layers, ours, compiled, and ways to hold activations.

Model, batch and labels of `student_memory`. Columns: wall time of a step on end, time of its kernels, kernels and copies started, seconds
of the first step (compilation in it), most memory in use.
    python -m tests.bench.student_layers [--json]
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from student_trainer.model.speed import compiled
from tests.bench.student_memory import FKL, GIB, LENGTH, SEQUENCES, SFT, Bench, Case
from tests.bench.table import arguments, show

STEPS = 12
USUAL = Case("SFT, transformers", fast=True)
OURS = Case("SFT, ours", SFT, fast=True)
HIDDEN = Case("hidden", FKL, "hidden", fast=True, late=True)
TOP_K = Case("top_k", FKL, "top_k", fast=True, late=True)


@dataclass(frozen=True)
class Way:
    """How a step is computed.

    Attributes:
        layers: "peft", "fast" or "compiled".
        checkpointing: gradients of layers are computed from their inputs again.
        budget: of torch's own choice what to hold, from nothing (0) to all (1), instead of checkpointing.
        cudnn: its attention first.
    """

    layers: str
    checkpointing: bool = True
    budget: float | None = None
    cudnn: bool = False


RUNS = [
    ("peft's layers: SFT, transformers", USUAL, Way("peft")),
    ("fused LoRA: SFT, transformers", USUAL, Way("fast")),
    ("fused LoRA: hidden", HIDDEN, Way("fast")),
    ("compiled: SFT, transformers", USUAL, Way("compiled")),
    ("compiled: SFT, ours", OURS, Way("compiled")),
    ("compiled: hidden", HIDDEN, Way("compiled")),
    ("compiled: top-64", TOP_K, Way("compiled")),
    ("compiled: SFT, ours, cuDNN's attention", OURS, Way("compiled", cudnn=True)),
    ("compiled: SFT, ours, no checkpointing", OURS, Way("compiled", checkpointing=False)),
    *((f"compiled: SFT, ours, budget {b}", OURS, Way("compiled", False, b)) for b in (0.0, 0.3, 0.6)),
]


def place(bench: Bench, way: Way) -> Any:
    """The layers of a way; what it returns holds while steps are made."""
    model, causal_lm = bench.student.model, bench.student.causal_lm
    torch._dynamo.reset()
    compiled.uninstall(model)
    bench.place_layers(way.layers != "peft")
    if way.layers == "compiled":
        compiled.install(model)
    if way.checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        causal_lm.gradient_checkpointing_disable()
    functorch_config.activation_memory_budget = 1.0 if way.budget is None else way.budget
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    return sdpa_kernel(order, set_priority=True) if way.cudnn else nullcontext()


def measured(bench: Bench, name: str, case: Case, way: Way) -> dict[str, object]:
    """One row."""
    with place(bench, way):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        bench.step(case)
        torch.cuda.synchronize()
        first_s = time.perf_counter() - began_s
        bench.step(case)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began_s = time.perf_counter()
        for _ in range(STEPS):
            bench.step(case)
        torch.cuda.synchronize()
        ms = (time.perf_counter() - began_s) / STEPS * 1e3
        peak = torch.cuda.max_memory_allocated() / GIB
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            bench.step(case)
            torch.cuda.synchronize()
    events = trace.key_averages()
    row: dict[str, object] = {
        "step": name,
        "ms": round(ms, 1),
        "GPU ms": round(sum(event.self_device_time_total for event in events) / 1e3, 1),
        "events": sum(event.count for event in events),
        "first s": round(first_s, 1),
        "peak GiB": round(peak, 2),
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__ or "")
    bench = Bench()
    bench.optimizer = torch.optim.AdamW(bench.trained, lr=1e-5, fused=True)
    rows = [measured(bench, *run) for run in RUNS]
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    show(f"a student's step, {SEQUENCES} x {LENGTH} tokens; {where}", rows, as_json=options.json)


if __name__ == "__main__":
    main()
