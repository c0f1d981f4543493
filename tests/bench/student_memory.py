"""A student's step on one GPU: peak memory in all and time, with exact labels, with top-k labels and without a teacher.

Reference of the same run: the usual supervised step, transformers' own cross-entropy over full logits.
Shapes of Qwen2.5-1.5B (student) and 7B (teacher), random weights, LoRA r=16 on every linear layer, gradient
checkpointing, bfloat16, 2 x 2048 tokens. The step is `DistillationTrainer.compute_loss` by the same calls: states,
`rows_on` from host memory, `output_loss`, the integrity check, backward, clipping, AdamW.
    python -m tests.bench.student_memory [--json]

Columns: wall time of a step, median and least of the rounds, as ratios to the SFT step with the same LoRA layers; time
of the kernels of one step on the GPU, and its ratio; the loss with its gradient alone; memory in use at most, and held
by torch's allocator (the CUDA context comes on top); distance of the gradient from the plain path's.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.rows_on_device import rows_on
from student_trainer.losses import fused
from student_trainer.losses.align import row_index
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.head import Head
from student_trainer.losses.output.loss import OutputLoss, output_loss
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.model.adapters import adapt
from student_trainer.model.load import Student
from student_trainer.model.speed import lora
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.core.tensor import Tensor as WireTensor
from teacher_wire.core.tensor import float32
from tests.bench.table import arguments, show

V, K, SEQUENCES, LENGTH, TEACHER_WIDTH = 151_936, 64, 2, 2048, 3584
ROUNDS, STEPS = 6, 2  # rounds go through all the steps in turn, so that a drifting machine is fair to each
STUDENT = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "vocab_size": V,
}
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Attributes:
        name: in the table.
        spec: of our loss; None is transformers' own.
        labels: transport, or "" without a teacher.
        late: the integrity check comes after the backward pass instead of before it.
        resident: labels are on the device already, instead of in host memory.
        fast: LoRA layers are `fast_lora`'s instead of peft's.
        plain: our kernels are switched off.
    """

    name: str
    spec: OutputLossSpec | None = None
    labels: str = ""
    late: bool = False
    resident: bool = False
    fast: bool = False
    plain: bool = False


def _spec(kind: str = "forward_kl", chunk_mb: int = 1024, **settings: float) -> OutputLossSpec:
    return OutputLossSpec(Divergence(kind, beta=0.5), chunk_bytes=chunk_mb << 20, **settings)  # type: ignore[arg-type]


FKL, JSD = _spec(), _spec("jsd")
SFT = _spec(kd_weight=0.0, sft_weight=1.0)
CASES = [
    # as shipped: fused LoRA layers, chunks of 1 GiB, labels from host memory, checked after the backward pass
    Case("SFT, transformers", fast=True),
    Case("SFT, ours", SFT, fast=True),
    Case("hidden, forward KL", FKL, "hidden", fast=True, late=True),
    Case("hidden, JSD 0.5", JSD, "hidden", fast=True, late=True),
    Case("top-64 + tail", FKL, "top_k", fast=True, late=True),
    # what each choice is worth
    Case("hidden FKL, labels resident", FKL, "hidden", fast=True, late=True, resident=True),
    Case("hidden FKL, checked before backward", FKL, "hidden", fast=True),
    Case("hidden FKL, chunks of 256 MiB", _spec(chunk_mb=256), "hidden", fast=True, late=True),
    Case("peft's LoRA: SFT, transformers"),
    Case("peft's LoRA: SFT, ours", SFT),
    Case("peft's LoRA: hidden, forward KL", FKL, "hidden", late=True),
    Case("peft's LoRA: hidden, JSD 0.5", JSD, "hidden", late=True),
    Case("plain torch: hidden FKL", FKL, "hidden", late=True, plain=True),
]


class Bench:
    """Model, batch and labels of all cases; the teacher's head is on the device only where it is needed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = Qwen2ForCausalLM(Qwen2Config(**STUDENT))
        torch.set_default_dtype(torch.float32)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        settings = ModelConfig(path="random", lora=LoraSettings(fused=False), gradient_checkpointing=True)
        self.student = Student(adapt(model, settings, None), None)
        self.student.model.train()
        self.trained = [p for p in self.student.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        ids_BL = np.random.default_rng(0).integers(0, V, (SEQUENCES, LENGTH)).astype(np.int32)
        packed = TokenBatch.pack(ids_BL.tolist())
        self.ids_BL = torch.from_numpy(ids_BL).long().cuda()
        self.mask_BL = torch.ones_like(self.ids_BL)
        self.index_N = torch.from_numpy(row_index(packed.cu_lengths_B1, packed.wanted_T, LENGTH)).cuda()
        self.labels_N = torch.from_numpy(packed.labels_N()).long().cuda()
        self.window_rows = torch.tensor(float(self.labels_N.numel()), device="cuda")
        self.teacher_weight_VD = (torch.randn(V, TEACHER_WIDTH, device="cuda") * 0.03).bfloat16().cpu()
        self.head: Head | None = None
        self.place_head(True)
        self.signals = self._serve()
        self.rows = {
            name: rows_on(LabelTensors.of(signals), self.head, torch.device("cuda"))
            for name, signals in self.signals.items()
        }

    def place_head(self, wanted: bool) -> None:
        """The teacher's head onto the device, or off it."""
        if wanted and self.head is None:
            self.head = Head(self.teacher_weight_VD.cuda())
        elif not wanted:
            self.head, self.rows = None, {}

    def place_layers(self, fast: bool) -> None:
        """peft's LoRA layers, or `fast_lora`'s."""
        lora.install(self.student.model) if fast else lora.uninstall(self.student.model)

    def _serve(self) -> dict[str, TeacherSignals]:
        """What a teacher of these shapes would answer, in host memory."""
        assert self.head is not None
        hidden_ND = torch.randn(self.labels_N.numel(), TEACHER_WIDTH, device="cuda").bfloat16()
        parts: list[tuple[Tensor, ...]] = []
        for h_CD, label_C in zip(hidden_ND.split(256), self.labels_N.split(256), strict=True):
            z_CV = self.head.logits(h_CD)
            lse_C, top = z_CV.logsumexp(-1), z_CV.topk(K, -1)
            tail_C = z_CV.scatter(-1, top.indices, -torch.inf).logsumexp(-1) - lse_C
            parts.append((lse_C, z_CV.gather(-1, label_C[:, None])[:, 0] - lse_C, top.values, top.indices, tail_C))
        lse_N, label_N, logits_NK, ids_NK, tail_N = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        two = {"lse_N": float32(lse_N.numpy()), "label_logp_N": float32(label_N.numpy())}
        bits = lambda t: WireTensor("bfloat16", t.bfloat16().cpu().view(torch.int16).numpy().view(np.uint16))  # noqa: E731
        top_k = {
            "topk_ids_NK": WireTensor("uint24", ids_NK.numpy().astype(np.uint32)),
            "topk_logits_NK": bits(logits_NK),
            "tail_logp_N": float32(tail_N.numpy()),
        }
        return {
            "hidden": TeacherSignals({**two, "hidden_ND": bits(hidden_ND)}, "f"),
            "top_k": TeacherSignals({**two, **top_k}, "f"),
        }

    def loss(self, case: Case, state_ND: Tensor) -> OutputLoss:
        """As `DistillationTrainer.compute_loss` has it, after the body."""
        device = state_ND.device
        if not case.labels:
            rows = None
        elif case.resident:
            rows = self.rows[case.labels]
        else:
            rows = rows_on(LabelTensors.of(self.signals[case.labels]), self.head, device)
        ones_N = torch.ones_like(self.labels_N, dtype=torch.float32)
        assert case.spec is not None
        head = self.student.head(V)
        return output_loss(state_ND, head, rows, self.labels_N, ones_N, self.window_rows, case.spec)

    def states(self) -> Tensor:
        """[N, D] of the supervised rows."""
        with torch.autocast("cuda", torch.bfloat16):
            state_BLD = self.student.states(self.ids_BL)
        return state_BLD.reshape(-1, state_BLD.shape[-1])[self.index_N]

    def step(self, case: Case) -> None:
        """One micro-batch and one update."""
        if case.spec is None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = self.student.model(input_ids=self.ids_BL, attention_mask=self.mask_BL, labels=self.ids_BL).loss
            loss.backward()
        else:
            result = self.loss(case, self.states())
            if result.integrity is not None and not case.late:
                result.integrity.check()
            result.total.backward()
            if result.integrity is not None and case.late:
                result.integrity.check()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_gib(self, case: Case) -> tuple[float, float]:
        """Most memory in use at once, and most held by the allocator, with nothing of other cases on the device."""
        self.place_layers(case.fast)
        self.place_head(False)
        self.place_head(case.labels == "hidden")
        if case.resident:
            self.rows = {
                case.labels: rows_on(LabelTensors.of(self.signals[case.labels]), self.head, torch.device("cuda"))
            }
        self.step(case)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            self.step(case)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB

    def step_ms(self, case: Case) -> float:
        """Wall time of a step among several, as a run has them: the device is waited for at the end alone."""
        self.place_layers(case.fast)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            self.step(case)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / STEPS * 1e3

    def difference(self, case: Case) -> float | None:
        """Of the gradient on the states from the plain path's, relative."""
        if case.spec is None or case.plain:
            return None
        grads = []
        state_ND = torch.randn(self.labels_N.numel(), STUDENT["hidden_size"], device="cuda").bfloat16()
        for wanted in (True, False):
            x_ND = state_ND.clone().requires_grad_()
            with _kernels(wanted):
                self.loss(case, x_ND).total.backward()
            assert x_ND.grad is not None
            grads.append(x_ND.grad.double())
        return float((grads[0] - grads[1]).norm() / grads[1].norm())

    def loss_ms(self, case: Case) -> float | None:
        """The loss with its gradient on the states, alone."""
        if case.spec is None:
            return None
        state_ND = torch.randn(self.labels_N.numel(), STUDENT["hidden_size"], device="cuda").bfloat16().requires_grad_()
        return _median_ms(lambda: self.loss(case, state_ND).total.backward())

    def busy_ms(self, case: Case) -> float:
        """Time of all kernels of a step: what remains of its wall time is the host's."""
        self.place_layers(case.fast)
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            self.step(case)
            torch.cuda.synchronize()
        return sum(event.self_device_time_total for event in trace.key_averages()) / 1e3


def _ratio(taken: list[float], reference: list[float]) -> float:
    """Median over rounds: both of a round ran within seconds of one another."""
    return round(statistics.median(one / other for one, other in zip(taken, reference, strict=True)), 3)


def _kernels(wanted: bool) -> contextlib.AbstractContextManager[object]:
    """Our kernels, or the plain path in their place."""
    return contextlib.nullcontext() if wanted else mock.patch.object(fused, "usable", return_value=False)


def _median_ms(function: Callable[[], object], repeat: int = 5) -> float:
    times = []
    for _ in range(repeat + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def main() -> None:
    """Prints the table."""
    options = arguments(__doc__ or "")
    bench = Bench()
    figures: list[dict[str, object]] = []
    times: list[list[float]] = [[] for _ in CASES]
    peaks = []
    for case in CASES:
        with _kernels(not case.plain):
            peaks.append(bench.peak_gib(case))
        print(case.name, peaks[-1], flush=True)
    bench.place_head(True)
    bench.rows = {
        name: rows_on(LabelTensors.of(signals), bench.head, torch.device("cuda"))
        for name, signals in bench.signals.items()
    }
    for _ in range(ROUNDS):
        for case, taken in zip(CASES, times, strict=True):
            with _kernels(not case.plain):
                taken.append(bench.step_ms(case))
    busy = []
    for case in CASES:
        with _kernels(not case.plain):
            busy.append(bench.busy_ms(case))
    for case, taken, busy_ms, (peak, reserved) in zip(CASES, times, busy, peaks, strict=True):
        with _kernels(not case.plain):
            loss_ms, difference = bench.loss_ms(case), bench.difference(case)
        usual, ours = (i for i, other in enumerate(CASES) if other.fast == case.fast and not other.labels)
        figures.append(
            {
                "step": case.name,
                "ms": round(statistics.median(taken), 1),
                "least": round(min(taken), 1),
                "x SFT usual": _ratio(taken, times[usual]),
                "least/least": round(min(taken) / min(times[usual]), 3),
                "x SFT ours": _ratio(taken, times[ours]),
                "GPU ms": round(busy_ms, 1),
                "x usual's": round(busy_ms / busy[usual], 3),
                "loss ms": loss_ms and round(loss_ms, 1),
                "peak GiB": round(peak, 2),
                "held GiB": round(reserved, 2),
                "off plain": difference,
            }
        )
    card = torch.cuda.get_device_name()
    show(
        f"a student's step, {SEQUENCES} x {LENGTH} tokens, {card}, torch {torch.__version__}",
        figures,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
