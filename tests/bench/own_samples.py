"""How far a student is from its teacher on what it writes itself: completions of held-out prompts, and both sides' distributions over them.

In: a student's folder, a served teacher, held-out rows; out: figures as JSON. Samples are the product's (`rollout.hf_sampler`, temperature 1), labels are
`hidden`, fetched by the product's client; divergences are exact, over the whole vocabulary. The streams of the samples do not depend on the student.

    python -m tests.bench.own_samples --student FOLDER --rows heldout.jsonl#256 --address HOST:PORT --out FILE

Axes: N rows of completions, C rows of a chunk, V vocabulary rows.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from student_trainer.config.data import DataConfig
from student_trainer.config.model import ModelConfig
from student_trainer.data.dataset import Example, IndexedExample
from student_trainer.data.inputs import load_data
from student_trainer.labels import event_loop
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.packing import pack
from student_trainer.labels.rows_on_device import head_on, rows_on
from student_trainer.losses.head import Head
from student_trainer.losses.rows import HiddenRows
from student_trainer.model.load import Student, load_student
from student_trainer.rollout.engines.hf_sampler import HfSampler, Sampling
from student_trainer.rollout.examples import example_of
from student_trainer.rollout.prompts import prompt_length, stop_ids
from student_trainer.rollout.sample import Rollout, RolloutPrompt
from student_trainer.teachers.artifact_cache import fetch_head
from student_trainer.training.windows import MicroBatch, padded
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of

AT_ONCE = 16  # completions of one request and one pass
CHUNK_BYTES = 512 << 20  # of logits at a time
SEED = 4_000_000_000  # apart from those of runs


async def labels_of(
    address: str, examples: Sequence[Example], vocab_rows: int, cache: Path
) -> tuple[TeacherInfo, object, list[TeacherSignals]]:
    """The teacher, its head, and its answers, AT_ONCE examples each."""
    async with TeacherClient(address) as client:
        info = await client.teacher(wait_for_s=60)
        spec = spec_of("hidden", vocab_rows)
        parts = [pack(examples[start : start + AT_ONCE]).batch for start in range(0, len(examples), AT_ONCE)]
        answers = await asyncio.gather(*(client.score(info, spec, part) for part in parts))
        return info, await fetch_head(client, info, cache), list(answers)


def samples_of(student: Student, rows: str, most: int, vocab_rows: int) -> list[Rollout]:
    """Completions of the prompts of held-out rows, in their order."""
    data, held_out = load_data(
        DataConfig.model_validate({"train": [rows], "eval": [], "max_tokens": 512, "overlong": "drop"}),
        student.tokenizer,
        Console(file=io.StringIO()),
    )
    assert held_out is None
    sampling = Sampling(SEED, most, stop_ids=stop_ids(student.tokenizer, student.causal_lm, data), batch=64)
    prompts = [
        RolloutPrompt(0, slot, row.example.token_ids[: prompt_length(row.example)], row.example.key)
        for slot, row in enumerate(data)
    ]
    written = HfSampler(student, sampling, vocab_rows, positions=student.outline.positions).sample(prompts)
    return [one for one in written if isinstance(one, Rollout)]


@torch.no_grad()
def divergences(
    student: Student,
    teacher_head: Head,
    examples: Sequence[Example],
    answers: Sequence[TeacherSignals],
    vocab_rows: int,
) -> dict[str, float]:
    """Means over all rows, in nats a token: KL(student || teacher), KL(teacher || student), NLL of both, the teacher's entropy; share of equal likeliest ids."""
    device = student.outline.device
    head = student.head(vocab_rows)
    chunk = max(16, CHUNK_BYTES // (16 * vocab_rows))
    sums: dict[str, float] = {}
    count = 0
    for number, signals in enumerate(answers):
        some = examples[number * AT_ONCE : (number + 1) * AT_ONCE]
        batch = padded(MicroBatch.of(number, [IndexedExample(i, e) for i, e in enumerate(some)]), student.pad_id)
        state_ND = student.states(batch.input_ids_BL.to(device)).flatten(0, 1)[batch.index_N.to(device)]
        rows = rows_on(LabelTensors.of(signals), teacher_head, device)
        assert isinstance(rows, HiddenRows)
        labels_N = batch.labels_N.to(device)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            ours_CV = head.logits(state_ND[part]).float().log_softmax(-1)
            theirs_CV = teacher_head.logits(rows.hidden_ND[part]).float().log_softmax(-1)
            for name, value in _sums(ours_CV, theirs_CV, labels_N[part]).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        count += len(labels_N)
    return {name: value / count for name, value in sums.items()} | {"tokens": float(count)}


def _sums(ours_CV: Tensor, theirs_CV: Tensor, labels_C: Tensor) -> dict[str, Tensor]:
    return {
        "kl_student_teacher": (ours_CV.exp() * (ours_CV - theirs_CV)).sum(),
        "kl_teacher_student": (theirs_CV.exp() * (theirs_CV - ours_CV)).sum(),
        "nll": -ours_CV.gather(-1, labels_C[:, None]).sum(),
        "teacher_nll": -theirs_CV.gather(-1, labels_C[:, None]).sum(),
        "teacher_entropy": -(theirs_CV.exp() * theirs_CV).sum(),
        "agreement": (ours_CV.argmax(-1) == theirs_CV.argmax(-1)).float().sum(),
    }


def main() -> None:
    """Measures one student; see module."""
    parser = argparse.ArgumentParser(description="KL to the teacher on a student's own samples.")
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/lyceum-real/cache"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    student = load_student(
        ModelConfig(path=str(options.student), dtype="float32", lora=None, compiled=False, graphs=False, threads=2),
        seed=0,
    )
    student.model.eval()
    vocab_rows = student.vocab_rows
    written = samples_of(student, options.rows, options.max_new_tokens, vocab_rows)
    examples = [example_of(one) for one in written]
    _, head, answers = event_loop.run(labels_of(options.address, examples, vocab_rows, options.cache))
    found = divergences(student, head_on(head, vocab_rows, student.outline.device), examples, answers, vocab_rows)  # type: ignore[arg-type]
    found |= {
        "samples": float(len(written)),
        "mean_length": float(np.mean([one.token_ids.size for one in written])),
        "finished": float(np.mean([one.finished for one in written])),
    }
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
