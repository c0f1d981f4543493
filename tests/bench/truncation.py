"""What each way of sending labels costs in truth: loss bias, gradient error and cosine against the exact distribution.

In: a served teacher's rows and a student (the demo's by default), or synthetic rows of a large vocabulary. Reference of the
same run: the teacher's own states and head, in float64. Losses and gradients are the shipped ones; renormalised and partial
sums, which we do not offer, are written out here.
    python -m tests.bench.truncation [--json] [--teacher FOLDER] [--student FOLDER] [--rows JSONL] [--dtype bfloat16]
    python -m tests.bench.truncation --random-vocab 151936

Axes: N rows, V ids, K kept ids, D width.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from student_trainer.losses.divergence import Divergence, divergence_and_grad
from student_trainer.losses.head import Head
from student_trainer.losses.rows import FullRows, HiddenRows, TeacherRows, TopKRows
from student_trainer.losses.truncated import bucket_and_grad
from teacher_wire.core.signals import SignalSpec
from teacher_wire.score.signals import spec_of
from tests.bench.table import show

DIVERGENCES = {"FKL": Divergence(), "JSD": Divergence("jsd", 0.5), "RKL": Divergence("reverse_kl")}
KS = (4, 16, 64, 128, 256)
EXTRA = ((64, 16), (128, 32))  # teacher's k, and the student's own likeliest ids asked for beside them
TAUS = (1.2, 2.0, 4.0, 8.0)
DEMO = Path(".cache/demo")
LossAndGrad = tuple[Tensor, Tensor]
Exact = HiddenRows | FullRows


@dataclass(frozen=True, eq=False)
class Labels:
    """One way to send them.

    Attributes:
        name: in the table.
        row_bytes: a token, with the two figures of the integrity check.
        rows: as the losses take them.
        loss: replaces the shipped loss of `rows`; None where it says nothing.
    """

    name: str
    row_bytes: float
    rows: TeacherRows
    loss: Callable[[TopKRows, Tensor, Divergence, float], LossAndGrad | None] | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """Rows to measure on: exact labels, a student, and every way to send the labels."""

    title: str
    exact: Exact
    student_NV: Tensor
    labels: list[Labels]


# ------------------------------------------------------- what others compute


def renormalised(rows: TopKRows, z_NV: Tensor, spec: Divergence, tau: float) -> LossAndGrad:
    """Both sides made to sum to 1 over the kept ids."""
    ids_NK = rows.topk_ids_NK
    log_p_NK = (rows.topk_logits_NK.double() / tau).log_softmax(-1)
    loss_N, grad_NK = divergence_and_grad(log_p_NK, (z_NV.gather(-1, ids_NK) / tau).log_softmax(-1), spec)
    return loss_N, torch.zeros_like(z_NV).scatter_(-1, ids_NK, grad_NK / tau)


def partial_sum(rows: TopKRows, z_NV: Tensor, spec: Divergence, tau: float) -> LossAndGrad | None:
    """Forward KL's terms of the kept ids alone."""
    if spec.kind != "forward_kl" or tau != 1:
        return None
    log_p_NK = rows.topk_logits_NK.double() - rows.lse_N.double()[:, None]
    log_q_NV = z_NV.log_softmax(-1)
    p_NK = log_p_NK.exp()
    loss_N = (p_NK * (log_p_NK - log_q_NV.gather(-1, rows.topk_ids_NK))).sum(-1)
    return loss_N, (log_q_NV.exp() * p_NK.sum(-1, keepdim=True)).scatter_add_(-1, rows.topk_ids_NK, -p_NK)


def shipped(rows: TeacherRows, z_NV: Tensor, spec: Divergence, tau: float) -> LossAndGrad:
    """Ours: the bucket of top-k labels at temperature 1, all ids else."""
    if isinstance(rows, TopKRows):
        assert tau == 1
        return bucket_and_grad(rows.topk_ids_NK, *rows.bucket(torch.float64), z_NV.log_softmax(-1), spec)
    log_p_NV = (rows.logits(torch.float64) / tau).log_softmax(-1)
    loss_N, grad_NV = divergence_and_grad(log_p_NV, (z_NV / tau).log_softmax(-1), spec)
    return loss_N, grad_NV / tau


# -------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Error:
    """Of a loss and its gradient, over all rows."""

    bias: float
    gradient: float
    cosine: float

    @classmethod
    def of(cls, found: LossAndGrad, exact: LossAndGrad) -> Error:
        gap = (found[1] - exact[1]).norm() / exact[1].norm()
        cosine = torch.nn.functional.cosine_similarity(found[1].flatten(), exact[1].flatten(), dim=0)
        return cls(float(found[0].sum() / exact[0].sum() - 1), float(gap), float(cosine))

    def shown(self) -> str:
        bias = "0" if abs(self.bias) < 5e-7 else f"{self.bias:+.2%}" if abs(self.bias) >= 5e-5 else f"{self.bias:+.0e}"
        return f"{bias} / {self.gradient:.2g} / {self.cosine:.4f}"


def table(scene: Scene) -> list[dict[str, object]]:
    """Every transport under every divergence."""
    exact = {name: shipped(scene.exact, scene.student_NV, spec, 1.0) for name, spec in DIVERGENCES.items()}
    lines = []
    for labels in scene.labels:
        line: dict[str, object] = {"labels": labels.name, "bytes/token": f"{labels.row_bytes:,.0f}"}
        for name, spec in DIVERGENCES.items():
            if labels.loss is not None:
                assert isinstance(labels.rows, TopKRows)
                found = labels.loss(labels.rows, scene.student_NV, spec, 1.0)
            else:
                found = shipped(labels.rows, scene.student_NV, spec, 1.0)
            line[f"{name}: bias / gradient error / cosine"] = (
                "" if found is None else Error.of(found, exact[name]).shown()
            )
        lines.append(line)
    return lines


def temperature_table(scene: Scene, k: int = 64) -> list[dict[str, object]]:
    """Forward KL: what k logits are worth at a temperature, even with the exact tail mass at that temperature."""
    named = {labels.name: labels for labels in scene.labels}
    top = named[f"top_k {k} + tail"].rows
    assert isinstance(top, TopKRows)
    lines = []
    for tau in (1.0, *TAUS):
        exact = shipped(scene.exact, scene.student_NV, Divergence(), tau)
        log_p_NV = (scene.exact.logits(torch.float64) / tau).log_softmax(-1)
        tail_N = log_p_NV.scatter(-1, top.topk_ids_NK, -torch.inf).logsumexp(-1)
        log_q_NV = (scene.student_NV / tau).log_softmax(-1)
        kept_NK = log_p_NV.gather(-1, top.topk_ids_NK)
        loss_N, grad_NV = bucket_and_grad(top.topk_ids_NK, kept_NK, tail_N, log_q_NV, Divergence())
        line: dict[str, object] = {
            "tau": f"{tau:g}",
            f"mass outside top {k}": f"{float(tail_N.exp().mean()):.3f}",
            f"{k} logits + tail at tau": Error.of((loss_N, grad_NV / tau), exact).shown(),
            f"{k} logits renormalised": Error.of(renormalised(top, scene.student_NV, Divergence(), tau), exact).shown(),
        }
        for labels in scene.labels:
            if isinstance(labels.rows, HiddenRows):
                line[labels.name] = Error.of(shipped(labels.rows, scene.student_NV, Divergence(), tau), exact).shown()
        lines.append(line)
    return lines


def with_extra(rows: Exact, student_NV: Tensor, k: int, extra: int) -> TopKRows:
    """The teacher's k likeliest ids and the `extra` likeliest others of the student, with the exact tail."""
    logits_NV = rows.logits(torch.float64)
    lse_N = logits_NV.logsumexp(-1)
    own_NK = logits_NV.topk(k, -1).indices
    asked_NM = student_NV.scatter(-1, own_NK, -torch.inf).topk(extra, -1).indices
    ids_NK = torch.cat([own_NK, asked_NM], -1)
    tail_N = logits_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1) - lse_N
    return TopKRows(ids_NK, logits_NV.gather(-1, ids_NK), tail_N, lse_N, rows.label_logp_N)


def extras(exact: Exact, student_NV: Tensor, vocab_rows: int, value_bytes: int) -> Iterator[Labels]:
    """Rows of `EXTRA` that fit into the vocabulary."""
    for k, extra in EXTRA:
        if k + extra < vocab_rows:
            size = spec_of("top_k", vocab_rows, k=k + extra).row_bytes(0, value_bytes)
            yield Labels(f"top_k {k} + student's {extra} + tail", size, with_extra(exact, student_NV, k, extra))


def truncations(rows: TopKRows, k: int, size: float) -> list[Labels]:
    """The same kept ids, read in three ways."""
    return [
        Labels(f"top_k {k} + tail", size, rows),
        Labels(f"top {k} renormalised", size, rows, renormalised),
        Labels(f"top {k} partial sum", size, rows, partial_sum),
    ]


# ----------------------------------------------------------------- real rows


def served(teacher: Path, student: Path, jsonl: Path, dtype: str, rows: int) -> Scene:
    """Rows of a real teacher over the real wire."""
    from transformers import AutoTokenizer

    from student_trainer.config.model import ModelConfig
    from student_trainer.data.dataset import build_dataset
    from student_trainer.data.rows.sources import parse_source
    from student_trainer.labels.device_transfer import LabelTensors
    from student_trainer.labels.packing import pack
    from student_trainer.labels.rows_on_device import rows_on
    from student_trainer.model.load import load_student
    from tests.e2e.classroom import classroom

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = build_dataset(
        [parse_source(f"{jsonl}#64")], AutoTokenizer.from_pretrained(teacher), max_tokens=512, overlong="drop"
    )
    examples = [row.example for row in data]
    own = load_student(ModelConfig(path=str(student), dtype="float32", lora=None), 0)
    own.model.eval().to(device)
    with classroom(teacher, dtype=dtype, device=device.type) as room, torch.no_grad():
        vocab_rows = min(room.info.vocab_rows, own.vocab_rows, len(own.tokenizer))
        head = room.head.slice(vocab_rows)
        total = sum(int(example.loss_mask.sum()) for example in examples)
        count = min(total, rows or max(64, (1 << 25) // vocab_rows))
        chosen_N = torch.linspace(0, total - 1, count).long()

        def ask(spec: SignalSpec) -> tuple[TeacherRows, float]:
            signals = room.labels(examples, spec)
            return rows_on(LabelTensors.of(signals), head, device).take(
                chosen_N.to(device)
            ), signals.payload_bytes / signals.rows

        states = []
        for example in examples:
            ids_1L = torch.from_numpy(example.token_ids)[None].long().to(device)
            wanted_L = torch.from_numpy(pack([example]).batch.wanted_T).to(device)
            states.append(own.states(ids_1L)[0][wanted_L])
        student_NV = own.head(vocab_rows).logits(torch.cat(states)[chosen_N.to(device)]).double()
        hidden, size = ask(spec_of("hidden", vocab_rows))
        assert isinstance(hidden, HiddenRows)
        exact = replace(hidden, hidden_ND=hidden.hidden_ND.double())
        labels = []
        if vocab_rows * room.info.value_bytes * total <= room.info.limits.max_reply_bytes:
            every, every_bytes = ask(spec_of("full", vocab_rows))
            labels.append(Labels("full", every_bytes, every))
        labels.append(Labels(f"hidden {room.info.dtype}", size, hidden))
        if room.info.dtype == "float32":
            narrow = replace(hidden, hidden_ND=hidden.hidden_ND.bfloat16())
            labels.append(Labels("hidden bfloat16 (cast)", 8 + 2 * room.info.hidden_size, narrow))
        packed, size = ask(spec_of("hidden", vocab_rows, reduction="int8"))
        labels.append(Labels("hidden int8", size, packed))
        for k in KS:
            top, size = ask(spec_of("top_k", vocab_rows, k=k))
            assert isinstance(top, TopKRows)
            labels += truncations(top, k, size)
        labels += extras(exact, student_NV, vocab_rows, room.info.value_bytes)
    title = (
        f"{count:,} real rows of {jsonl.name} from the served teacher {teacher} ({dtype}, V = {vocab_rows:,}, "
        f"D = {room.info.hidden_size}), student {student}; {facts(exact, student_NV)}"
    )
    return Scene(title, exact, student_NV, labels)


def facts(exact: Exact, student_NV: Tensor) -> str:
    """What kind of rows these are."""
    p_NV = exact.logits(torch.float64).softmax(-1)
    entropy = float(torch.special.entr(p_NV).sum(-1).mean())
    mass = p_NV.topk(64, -1).values.double()
    losses = [float(shipped(exact, student_NV, spec, 1.0)[0].mean()) for spec in DIVERGENCES.values()]
    distances = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(DIVERGENCES, losses, strict=True))
    return (
        f"teacher: {entropy:.2f} nats, top-1 {float(mass[:, 0].mean()):.2f}, top-64 {float(mass.sum(-1).mean()):.3f}; "
        f"student: {distances} nats"
    )


# ------------------------------------------------------------ synthetic rows


def synthetic(vocab_rows: int, rows: int, width: int = 3584, forward_kl: float = 0.116) -> Scene:
    """Rows like those of docs/concepts/method.md 2.2: states with eight outlier channels, 64 leading ids over a random bulk.

    The student's logits are the teacher's, 3 % flatter (so that it has mass of its own in the tail), with independent
    noise as large as gives the stated forward KL.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    leading, count = min(64, vocab_rows // 4), rows or 96
    weight_VD = (torch.randn(vocab_rows, width, generator=g) * 0.015 * math.sqrt(3584 / width)).to(device)
    state_ND = torch.randn(count, width, generator=g)
    state_ND[:, :8] *= 30 * math.sqrt(width / 3584)
    lead_NK = 19 + 1.5 * torch.randn(count, 1, generator=g) - 2.4 * torch.arange(1, leading + 1).log()
    ids_NK = torch.stack([torch.randperm(vocab_rows, generator=g)[:leading] for _ in range(count)])
    noise_NV = torch.randn(count, vocab_rows, generator=g).to(device).double()
    state_ND, lead_NK, ids_NK = state_ND.to(device), lead_NK.to(device), ids_NK.to(device)
    aims_NKD = weight_VD[ids_NK]  # the smallest change of a state that gives its ids their leads
    missing_NK = lead_NK - torch.einsum("nkd,nd->nk", aims_NKD, state_ND)
    gram_NKK = aims_NKD @ aims_NKD.transpose(1, 2)
    state_ND += torch.einsum("nkd,nk->nd", aims_NKD, torch.linalg.solve(gram_NKK, missing_NK))
    head = Head(weight_VD)
    logits_NV = head.logits(state_ND)
    lse_N = logits_NV.logsumexp(-1)
    label_N = logits_NV.amax(-1) - lse_N
    exact = FullRows(logits_NV.double(), lse_N, label_N)
    low, high = 0.0, 4.0
    for _ in range(20):
        scale = (low + high) / 2
        loss_N, _ = shipped(exact, 0.97 * exact.logits_NV + scale * noise_NV, Divergence(), 1.0)
        low, high = (scale, high) if float(loss_N.mean()) < forward_kl else (low, scale)
    student_NV = 0.97 * exact.logits_NV + low * noise_NV
    narrow_ND = state_ND.bfloat16()
    labels = [
        Labels("full bfloat16", 8 + 2 * vocab_rows, FullRows(logits_NV.bfloat16(), lse_N, label_N)),
        Labels("hidden bfloat16", 8 + 2 * width, HiddenRows(narrow_ND.float(), head, lse_N, label_N)),
    ]
    from teacher_server.signals import state

    size = spec_of("hidden", vocab_rows, reduction="int8").row_bytes(width, 2)
    packed_ND = state.pack(narrow_ND).unpack(torch.float32)
    labels.append(Labels("hidden int8", size, HiddenRows(packed_ND, head, lse_N, label_N)))
    for k in (k for k in KS if k < vocab_rows):
        values_NK, kept_NK = logits_NV.topk(k, -1)
        tail_N = logits_NV.scatter(-1, kept_NK, -torch.inf).logsumexp(-1) - lse_N
        top = TopKRows(kept_NK, values_NK, tail_N, lse_N, label_N)
        labels += truncations(top, k, spec_of("top_k", vocab_rows, k=k).row_bytes(width, 2))
    labels += extras(exact, student_NV, vocab_rows, 2)
    title = (
        f"SYNTHETIC: {count} random rows, no model (V = {vocab_rows:,}, D = {width}, on {device}); "
        f"{facts(exact, student_NV)}"
    )
    return Scene(title, exact, student_NV, labels)


def main() -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print each table as one JSON object in a line of its own")
    parser.add_argument("--teacher", type=Path, help="model folder to serve; the demo's newest if left out")
    parser.add_argument("--student", type=Path, default=Path("runs/demo/arms/sft-0/final"), help="model folder")
    parser.add_argument("--rows", type=Path, default=DEMO / "data/heldout.jsonl", help="rows to score")
    parser.add_argument("--dtype", default="float32", help="in which the teacher is served")
    parser.add_argument("--random-vocab", type=int, metavar="V", help="synthetic rows over V ids instead of a model")
    parser.add_argument("--count", type=int, default=0, help="rows to compare; by default what 0.25 GB a tensor holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.random_vocab:
        scene = synthetic(options.random_vocab, options.count)
    else:
        trained = [
            f for f in DEMO.glob("teacher-*") if (f / "model.safetensors").is_file() and f.name != "teacher-start"
        ]
        teacher = options.teacher or max(trained, key=lambda f: f.stat().st_mtime, default=DEMO / "teacher-*")
        missing = [str(path) for path in (teacher, options.student, options.rows) if not path.exists()]
        if missing:
            print(
                f"not found: {', '.join(missing)}; run make demo, name others, or use --random-vocab", file=sys.stderr
            )
            return 2
        scene = served(teacher, options.student, options.rows, options.dtype, options.count)
    show(scene.title, table(scene), as_json=options.json)
    title = "the same rows, forward KL at a temperature: bias / gradient error / cosine"
    show(title, temperature_table(scene), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
