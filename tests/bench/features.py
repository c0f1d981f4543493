"""What signals of chosen layers cost: the server, per tapped layer, as a share of a batch's forward; and a student's step with terms on them beside the output's alone.

On a CUDA device the teacher is of Qwen2.5-7B's shape (random weights) and a batch 8 x 2,048 tokens; elsewhere 6 layers of 256 channels and
4 x 256 tokens on one thread, in its own CPU time. `captured` is the pass alone, `whole` also the reduction and the copies to the host. Rounds of both alternate.
The student's half needs a CUDA device: see `features_student`. Both need one card of 40 GiB or more, since the teacher's process is on the student's.
    python -m tests.bench.features [--json] [--half server|student] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from teacher_server.backends.transformers.backend import TransformersModel, load
from teacher_server.config.backends import TransformersBackend
from teacher_server.config.features import FeaturesConfig
from teacher_server.signals.captured import Wish
from teacher_server.signals.reduce import wish_of
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.signals import SignalSpec
from teacher_wire.score.signals import SIGNALS, Hidden
from tests.bench.table import show
from tests.tiny import make_model

ROUNDS = 9
KINDS: dict[str, dict[str, object]] = {
    "layers pca": {"reduction": "pca"},
    "layers int8": {"reduction": "int8"},
    "attention": {},
    "relation": {},
    "ffn": {},
    "ffn quantiles": {"reduction": "quantiles"},
}


def teacher() -> tuple[TransformersModel, int, int, int]:
    """A model; vocabulary, sequences and tokens of each."""
    if torch.cuda.is_available():
        from tests.bench import gpu_teacher

        return gpu_teacher.backend(gpu_teacher.random_model()), gpu_teacher.VOCAB, 8, 2048
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"num_hidden_layers": 6, "max_position_embeddings": 512}
        model = make_model(Path(folder), "qwen2", vocab=4096, hidden=256, **shape)
        config = TransformersBackend(model=str(model), dtype="float32", device="cpu", layers="fused")
        return load(config, deterministic=False), 4096, 4, 256


def alternating(functions: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each, one after the other in every round, after one round to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    for round_ in range(ROUNDS + 1):
        for function, spent in zip(functions, times, strict=True):
            began = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                spent.append(clock() - began)
    return [statistics.median(spent) for spent in times]


@torch.inference_mode()
def server() -> tuple[str, list[dict[str, object]]]:
    """Title and rows of the server's half."""
    model, vocab, count, length = teacher()
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, vocab, length).astype(np.int32) for _ in range(count)]
    batch, rows = TokenBatch.pack([row.tolist() for row in ids]), [np.arange(length - 1) for _ in ids]
    blocks = model.facts.layers
    tapped = tuple(round(blocks * part) for part in (1 / 3, 2 / 3, 1))
    rank = min(256, model.facts.hidden_size)
    model.calibrate(FeaturesConfig(layers=tapped, rank=rank, folder=None))
    KINDS["layers pca"] |= {"rank": rank, "basis": model.facts.artifacts[-1].sha256}
    plain = SignalSpec(vocab, (Hidden(),), "sampled")
    found: list[dict[str, object]] = []
    for name, settings in KINDS.items():
        spec = SignalSpec(vocab, (Hidden(), SIGNALS[name.split()[0]](layers=tapped, **settings)), "sampled")
        wish = wish_of(spec)
        without_s, with_s, bare_s, whole_s = alternating(
            [
                lambda: model._body.run(ids, rows, Wish()),
                lambda wish=wish: model._body.run(ids, rows, wish),  # type: ignore[misc]
                lambda: model.score([(batch, plain)]),
                lambda spec=spec: model.score([(batch, spec)]),  # type: ignore[misc]
            ]
        )
        found.append(
            {
                "kind": name,
                "layers": len(tapped),
                "forward ms": round(without_s * 1e3, 2),
                "captured, per layer": f"{(with_s - without_s) / without_s / len(tapped):.2%}",
                "whole, per layer": f"{(whole_s - bare_s) / without_s / len(tapped):.2%}",
            }
        )
    return f"{model._body.name}, {count} x {length} tokens, {model.facts.dtype}", found


def student(steps: int) -> tuple[str, list[dict[str, object]]]:
    """Title and rows of the student's half."""
    from tests.bench import features_student
    from tests.bench.student_memory import LENGTH, SEQUENCES

    return f"a student's step, {SEQUENCES} x {LENGTH} tokens", features_student.measured(steps)


def main() -> None:
    """The bench; see module."""
    parser = argparse.ArgumentParser(
        description="What signals of chosen layers cost the server, and terms on them a student."
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON too")
    parser.add_argument("--half", choices=["server", "student", "both"], default="both")
    parser.add_argument("--steps", type=int, default=24, help="counted steps of a student's run")
    options = parser.parse_args()
    halves: dict[str, Callable[[], tuple[str, list[dict[str, object]]]]] = {"server": server, "student": lambda: student(options.steps)}  # fmt: skip
    if options.half == "both" and not torch.cuda.is_available():
        print("the student's half needs a CUDA device (tests/bench/rehearse.sh tries it without)")
        halves.pop("student")
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if torch.cuda.is_available() else f"CPU, torch {torch.__version__}"  # fmt: skip
    for name, half in halves.items():
        if options.half in ("both", name):
            title, rows = half()
            show(f"{title}; {where}", rows, as_json=options.json)
            if "OUT" in os.environ:
                Path(os.environ["OUT"], f"features-{name}.json").write_text(json.dumps({"title": title, "where": where, "rows": rows}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
