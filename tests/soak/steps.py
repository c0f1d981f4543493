"""Addition with written steps: a tiny teacher that answers in JSON traces, and problems whose answers are known.

The question is "471+938"; the trace quotes both numbers, adds column by column with its carry, and reads the answer off the
steps. In: a number of problems; out: questions, the right trace of each, tokens to train a teacher on.

Axes: B problems, L tokens (padded on the right).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.e2e.classroom import Shape, TeacherRecipe, teacher_folder

DIGITS = 3
VOCAB = 400
LENGTH = 88
END = "<|end|>"
# Streams of numpy's generator; every set of problems has its own.
TEACHER_STREAM, TRAIN_STREAM, EVALUATION_STREAM = range(3)
TEACHER = TeacherRecipe(
    "steps-v1", Shape(VOCAB, 128, 3, 4, 2, 384, max_positions=512, tied=False, init_std=0.06), steps=500, batch_size=64
)


def problems(count: int, *stream: int) -> list[tuple[int, int]]:
    """Pairs of numbers, a pure function of the arguments."""
    pairs_B2 = np.random.default_rng(stream).integers(10**DIGITS, size=(count, 2))
    return [(int(a), int(b)) for a, b in pairs_B2]


def question(a: int, b: int) -> str:
    return f"{a:0{DIGITS}}+{b:0{DIGITS}}"


def trace(a: int, b: int) -> dict[str, Any]:
    """The right trace, as a teacher is to write it."""
    steps, carry = [], 0
    for place in range(DIGITS):
        x, y = a // 10**place % 10, b // 10**place % 10
        text = f"{x}+{y}+{carry}={x + y + carry}"
        before = [place] if place else []
        steps.append({"id": place + 1, "kind": "compute", "text": text, "evidence": [0, 1], "depends_on": before})
        carry = (x + y + carry) // 10
    quotes = [(0, DIGITS, f"{a:0{DIGITS}}"), (DIGITS + 1, 2 * DIGITS + 1, f"{b:0{DIGITS}}")]
    evidence = [{"id": i, "start": start, "end": end, "text": text} for i, (start, end, text) in enumerate(quotes)]
    return {"evidence": evidence, "steps": steps, "answer": {"text": str(a + b)}}


def written(a: int, b: int) -> str:
    """The right trace as text."""
    return json.dumps(trace(a, b), separators=(",", ":"))


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """A byte-level BPE that keeps digits apart and has the constant parts of a trace as few tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2, show_progress=False,
    )  # fmt: skip
    rendered = '[reason] [answer] <think>\n1. 1 [ev: "1", "1"]\n</think>\n'
    bpe.train_from_iterator([*(written(a, b) for a, b in problems(200, 99)), *[rendered] * 50], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    assert len(made) <= VOCAB, len(made)
    return made


def encode(texts: Sequence[str]) -> list[list[int]]:
    return tokenizer()(list(texts), add_special_tokens=False)["input_ids"]


def fresh(step: int) -> tuple[Tensor, Tensor]:
    """A batch for the teacher: question, newline, trace, end; the trace and the end supervised."""
    pairs = problems(TEACHER.batch_size, TEACHER_STREAM, step)
    asked = encode([question(a, b) + "\n" for a, b in pairs])
    answered = encode([written(a, b) + END for a, b in pairs])
    ids_BL = torch.full((len(pairs), LENGTH), tokenizer().eos_token_id)
    mask_BL = torch.zeros((len(pairs), LENGTH), dtype=torch.bool)
    for row, (before, after) in enumerate(zip(asked, answered, strict=True)):
        ids_BL[row, : len(before) + len(after)] = torch.tensor(before + after)
        mask_BL[row, len(before) : len(before) + len(after)] = True
    return ids_BL, mask_BL


def teacher() -> Path:
    """The folder of the trained teacher."""
    folder = teacher_folder(TEACHER, fresh)
    tokenizer().save_pretrained(folder)
    return folder
