"""What `plan` estimates of a student's peak memory, against what its step takes: must-show line 2 of the whole journey.

Shapes of Qwen2.5-1.5B and 0.5B with random weights, full, LoRA and QLoRA, with and without gradient checkpointing, 2 x 2,048 tokens and a 7B
teacher's head; the step is the trainer's own calls (`Learner`), compiled where `--compiled`, then AdamW. Each case in this process, one after the
other, everything let go between them.
    python -m tests.bench.plan_memory --device cuda [--json] [--graphs]
    python -m tests.bench.plan_memory --device cpu --tiny          # a rehearsal: no peak on a CPU, the estimate's parts alone
    python -m tests.bench.plan_memory --documented                 # the tables of docs/train/plan.md: estimates made now beside earlier peaks; no GPU

Columns: estimated and measured GiB in use and held, and estimate / measured. The figures are written to $OUT after each case.
Peaks are a process's own, so that two processes, one `--shape` each, may share a card.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from student_trainer.config.model import ModelConfig
from student_trainer.config.run import parse_config
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.losses.head import Head
from student_trainer.model.load import Student, quicken
from student_trainer.model.speed.cuda_graphs import GraphedBody
from student_trainer.model.speed.cuda_recorder import CudaRecorder
from student_trainer.planning.estimate.parts import Estimate, Step, estimate
from student_trainer.planning.estimate.shapes import shapes_of
from student_trainer.training.learner import Learner
from student_trainer.training.objective import Objective
from student_trainer.training.windows import FixedOrder, padded
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.core.tensor import Tensor as WireTensor
from teacher_wire.core.tensor import float32
from teacher_wire.score.signals import spec_of

GIB = 1 << 30
SHAPES = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
# The rows of docs/train/plan.md, 1.5B shape with LoRA: what differs from a compiled step with checkpointing and exact labels; the peaks in use and held, GiB,
# as they stand in docs/results/student-step.md, docs/results/speed.md and tests/bench/tables/features-student-2026-11-27.json ("" where none was written down).
_SFT = {"teacher_heads_bytes": 0, "label_bytes": 0, "teacher_logits": 0}
_HEAD_ALONE = {"label_bytes": 0, "teacher_logits": 0}
_TAPPED = 2 * 2048 * 1536 * 2  # bytes of one layer's states, bfloat16
DOCUMENTED: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("eager, checkpointing: SFT, ours", {"compiled": False, **_SFT}, "4.41", ""),
    ("the same, `hidden`", {"compiled": False}, "5.48", "6.1"),
    ("the same, `chunk_mb: 256` (peak in the backward pass)", {"compiled": False, "chunk_bytes": 256 << 20}, "5.01", ""),
    ("compiled, checkpointing: `hidden`, `graphs: false`", {}, "5.85 to 5.89", "6.3"),
    ("the same and `loss.hidden` of 3 layers", {"feature_bytes": 3 * _TAPPED}, "5.91", "6.30"),
    ("the same and `loss.hidden` of 6 layers", {"feature_bytes": 6 * _TAPPED}, "5.93", "6.30"),
    ("recorded passes: `hidden`", {"graphs": True}, "5.29 to 5.4", "7.3 to 7.8"),
    ("the same and `loss.hidden` of 3 layers", {"graphs": True, "feature_bytes": 6 * _TAPPED}, "5.38", "7.83"),
    ("the same and `loss.hidden` of 6 layers", {"graphs": True, "feature_bytes": 12 * _TAPPED}, "5.47", "7.80"),
    ("recorded passes: SFT, the teacher's head lying there", {"graphs": True, **_HEAD_ALONE}, "5.2", "7.3"),
    ("compiled, **no** checkpointing: SFT, the head lying there", {"checkpointing": False, **_HEAD_ALONE}, "13.0", ""),
)  # fmt: skip
PEAKS = [
    Path(__file__).parent / "tables" / f"memory-and-cross-loss-{card}-2026-11-28.json" for card in ("h100", "h200")
]
NAMES = {"lora": "LoRA", "qlora": "QLoRA", "full": "full"}
STEPS = 4  # the first makes the optimizer's state, the second may record


WAYS = ("lora", "qlora", "full")


def cases(shapes: list[str], ways: list[str]) -> list[tuple[str, str, bool]]:
    """Shape, way of training, checkpointing."""
    return [(shape, way, kept) for shape in shapes for way in ways for kept in (True, False)]


class Bench:
    """One case at a time.

    Args:
        device: `cuda` or `cpu`.
        tiny: sizes for a rehearsal.
        graphs: record passes.
    """

    def __init__(self, device: str, tiny: bool, graphs: bool) -> None:
        self.device, self.graphs = device, graphs and device == "cuda"
        self.sequences, self.length = (2, 32) if tiny else (2, 2048)
        self.vocab, self.teacher_width = (512, 48) if tiny else (151_936, 3584)

    def config(self, way: str, kept: bool) -> ModelConfig:
        """As a user's file would say it."""
        tree: dict[str, Any] = {"path": "random", "gradient_checkpointing": kept, "graphs": self.graphs}
        if way == "full":
            tree["lora"] = None
        if way == "qlora":
            tree["quantize"] = "nf4"
        return ModelConfig.model_validate(tree)

    def model_config(self, shape: str) -> Any:
        """Of transformers."""
        from transformers import Qwen2Config

        return Qwen2Config(
            **SHAPES[shape], vocab_size=self.vocab, max_position_embeddings=32_768, tie_word_embeddings=True
        )

    def estimated(self, shape: str, config: ModelConfig) -> Estimate:
        """What `plan` says."""
        on_gpu = self.device == "cuda"
        rows = self.sequences * (self.length - 1)
        spec = spec_of("hidden", self.vocab)
        step = Step(
            self.sequences, self.length, rows, checkpointing=config.gradient_checkpointing, compiled=on_gpu, graphs=self.graphs, fused=on_gpu,
            vocab_rows=self.vocab, teacher_heads_bytes=2 * self.vocab * self.teacher_width, label_bytes=rows * spec.row_bytes(self.teacher_width, 2),
        )  # fmt: skip
        return estimate(shapes_of(self.model_config(shape), config, bfloat16=True), step, on_gpu=on_gpu)

    def documented(self) -> list[str]:
        """The rows of docs/train/plan.md; see `DOCUMENTED`. The estimates are of a GPU, wherever this runs."""
        rows, spec = self.sequences * (self.length - 1), spec_of("hidden", self.vocab)
        told = ["| step | in use: estimate, measured, ratio | held: estimate, measured, ratio |", "|---|---|---|"]
        for name, changes, used, held in DOCUMENTED:
            settings: dict[str, Any] = {
                "checkpointing": True, "vocab_rows": self.vocab, "teacher_heads_bytes": 2 * self.vocab * self.teacher_width,
                "label_bytes": rows * spec.row_bytes(self.teacher_width, 2), **changes,
            }  # fmt: skip
            shapes = shapes_of(self.model_config("1.5B"), self.config("lora", settings["checkpointing"]), bfloat16=True)
            found = estimate(shapes, Step(self.sequences, self.length, rows, **settings), on_gpu=True)
            told.append(f"| {name} | {_beside(found.in_use, used)} | {_beside(found.held, held)} |")
        return told

    def beside_peaks(self) -> list[str]:
        """Estimates of now beside the peaks in `PEAKS`, as a table."""
        told = [
            "| 2 x 2,048 tokens | in use: estimate, measured, ratio | held: estimate, measured, ratio |",
            "|---|---|---|",
        ]
        for case, (used, held) in peaks().items():
            shape, way, kept = case
            found = self.estimated(shape, self.config(way, kept))
            name = f"{shape}, {NAMES[way]}, {'checkpointing' if kept else 'none'}"
            told.append(f"| {name} | {_beside(found.in_use, f'{used:.2f}')} | {_beside(found.held, f'{held:.2f}')} |")
        return told

    def measured(self, shape: str, config: ModelConfig) -> tuple[int, int]:
        """Peak bytes in use and held, of some steps after the first."""
        device = torch.device(self.device)
        learner, optimizer = self._learner(shape, config, device)
        batch = self._batch(learner)
        for number in range(STEPS):
            if number == 1 and self.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # what making the models left, which no loader of ours leaves
                torch.cuda.reset_peak_memory_stats()
            total = learner(batch, float(self.sequences * (self.length - 1)), 0)
            total.loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in learner.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del total
        if self.device != "cuda":
            return 0, 0
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def _learner(self, shape: str, config: ModelConfig, device: torch.device) -> tuple[Learner, torch.optim.Optimizer]:
        from transformers import Qwen2ForCausalLM

        from student_trainer.model.adapters import adapt

        if getattr(config, "quantize", None) is not None:
            return self._quantized(shape, config, device)
        torch.set_default_dtype(torch.bfloat16 if config.lora else torch.float32)
        try:
            with device:
                model = Qwen2ForCausalLM(self.model_config(shape))
        finally:
            torch.set_default_dtype(torch.float32)
        return self._around(adapt_checkpointed(model, config, adapt), config, device)

    def _quantized(
        self, shape: str, config: ModelConfig, device: torch.device
    ) -> tuple[Learner, torch.optim.Optimizer]:
        """By the loader itself, from a folder: quantisation is a part of loading."""
        from transformers import Qwen2ForCausalLM

        from student_trainer.model.load import load_student
        from tests.tiny import make_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            torch.set_default_dtype(torch.bfloat16)
            try:
                Qwen2ForCausalLM(self.model_config(shape)).save_pretrained(folder)
            finally:
                torch.set_default_dtype(torch.float32)
            make_tokenizer(Path(folder))
            student = load_student(config.model_copy(update={"path": folder}), 0)
        return self._with(student, device)

    def _around(self, model: Any, config: ModelConfig, device: torch.device) -> tuple[Learner, torch.optim.Optimizer]:
        narrowed = torch.bfloat16 if config.lora is None and config.dtype == "bfloat16" else None
        student = Student(model.to(device), None, narrowed=narrowed)
        quicken(student.model, config)
        return self._with(student, device)

    def _with(self, student: Student, device: torch.device) -> tuple[Learner, torch.optim.Optimizer]:
        tree = {
            "run": {"output_dir": "x"},
            "model": {"path": "x"},
            "data": {"train": ["x"]},
            "teacher": {"address": "127.0.0.1:1"},
            "loss": {"sft_weight": 0.5},
        }
        loss = parse_config(tree, "bench").loss
        objective = Objective(loss, self.vocab, spec_of("hidden", self.vocab).signals)
        head = Head(torch.randn(self.vocab, self.teacher_width, device=device, dtype=torch.bfloat16).mul_(0.03))
        learner = Learner(student, objective.terms(student), teacher_head=head)
        learner.train()
        trained = [p for p in learner.parameters() if p.requires_grad]
        if self.graphs:
            body = [p for p in student.body.parameters() if p.requires_grad]
            learner.passes = GraphedBody(learner.plain, body, CudaRecorder(), print, worth=2)
        return learner, torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")

    def _batch(self, learner: Learner) -> Any:
        from dataclasses import replace

        rng = np.random.default_rng(0)
        mask_L = np.ones(self.length, np.bool_)
        mask_L[0] = False
        data = TokenizedDataset(
            [
                Example(rng.integers(0, self.vocab, self.length, dtype=np.int32), mask_L, 0, str(n))
                for n in range(self.sequences)
            ]
        )
        order = RunOrder(self.sequences, batch_size=self.sequences, accumulation=1, epochs=1, max_steps=1, seed=0)
        made = padded(FixedOrder(data, order).window(0).batches[0], 0, lambda longest: longest)
        rows = self.sequences * (self.length - 1)
        bits = rng.integers(0, 16_000, (rows, self.teacher_width)).astype(np.uint16)  # bfloat16 between 0 and 0.1
        nothing = float32(np.zeros(rows, np.float32))
        signals = TeacherSignals(
            {"hidden_ND": WireTensor("bfloat16", bits), "lse_N": nothing, "label_logp_N": nothing}, "f"
        )
        return replace(made, labels=LabelTensors.of(signals))


def peaks() -> dict[tuple[str, str, bool], tuple[float, float]]:
    """GiB in use and held that were measured, by shape, way of training and checkpointing."""
    rows = [row for file in PEAKS for row in json.loads(file.read_text())["plan_memory"]]
    found = {(row["shape"], row["way"], row["checkpointing"]): (row["used"], row["held"]) for row in rows}
    return {case: found[case] for way in WAYS for case in cases(["0.5B", "1.5B"], [way])}


def _beside(estimated: int, measured: str) -> str:
    """`estimate, measured, ratio` in GiB; of a range of peaks both ratios, the smaller first."""
    if not measured:
        return f"{estimated / GIB:.2f}"
    ratios = sorted({f"{estimated / GIB / float(peak):.2f}" for peak in measured.split(" to ")})
    return f"{estimated / GIB:.2f}, {measured}, {' to '.join(ratios)}"


def adapt_checkpointed(model: Any, config: ModelConfig, adapt: Any) -> Any:
    """As the loader has it."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapt(model, config, None)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--shape", nargs="+", choices=["1.5B", "0.5B"], default=["1.5B", "0.5B"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--documented", action="store_true", help="print the table of docs/train/plan.md; no GPU is needed"
    )
    options = parser.parse_args()
    if options.documented:
        print("\n".join(Bench("cpu", False, False).documented()), end="\n\n")
        print("\n".join(Bench("cuda", False, False).beside_peaks()))
        return
    bench, rows = Bench(options.device, options.tiny, options.graphs), []
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU (estimates alone)"
    for shape, way, kept in cases(["tiny"] if options.tiny else options.shape, options.ways):
        row: dict[str, Any] = {"shape": shape, "way": way, "checkpointing": kept}
        try:
            config = bench.config(way, kept)
            found = bench.estimated(shape, config)
            row |= {
                "estimate in use": found.in_use / GIB,
                "estimate held": found.held / GIB,
                "moment": found.moment,
                "parts": found.parts,
            }
            used, held = bench.measured(shape, config)
            if used:
                row |= {
                    "used": used / GIB,
                    "held": held / GIB,
                    "ratio in use": found.in_use / used,
                    "ratio held": found.held / held,
                }
        except Exception as error:  # one case that cannot run must not cost the others their figures
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.clear_frames(error.__traceback__)
        rows.append(row)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch._dynamo.reset()
        if "OUT" in os.environ:
            Path(os.environ["OUT"], f"plan_memory-{options.shape[0]}-{'-'.join(options.ways)}.json").write_text(
                json.dumps({"where": where, "rows": rows}, indent=1)
            )
        shown = {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in row.items()
            if name != "parts"
        }
        print(json.dumps(shown) if options.json else shown, flush=True)


if __name__ == "__main__":
    main()
