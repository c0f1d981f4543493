"""Task 2 of docs/concepts/method.md 12: reversed, interleaved addition, learned from noisy answers.

`BOS a0 b0 a1 b1 a2 b2 = c0 c1 c2 c3`, least significant digits first. The fixed problems of a student have each digit of
the sum replaced by a random one with probability 0.2; a teacher that knows how to add labels them all the same.
In: a model; out: the share of fresh problems it answers without a mistake.

Axes: B problems, L = 12 tokens, V = 12 ids (ten digits, BOS, `=`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.data.dataset import Example
from tests.e2e.classroom import Shape, StudentRecipe, TeacherRecipe

DIGITS = 3
BOS, EQUALS, VOCAB = 10, 11, 12
QUESTION = 2 + 2 * DIGITS  # tokens before the sum
LENGTH = QUESTION + DIGITS + 1
FIXED, NOISE, EVALUATED = 1500, 0.2, 512
# The design gives no initial weights: from the library's 0.02 the teacher has no exact answer after 400 steps, from 0.06
# 99 % after 200. And 256 problems a step, not the design's 64: at 64 some initial weights are still on the plateau after
# 800 steps (distilled, seeds 0..4: .107 .113 .799 .008 .998), at 256 the worst four seeds found reached .855 to 1.
# Settings were chosen on seeds 0..4 and 200..205; the gate uses others.
_START = {"tied": False, "init_std": 0.06}
TEACHER = TeacherRecipe("task2-v1", Shape(VOCAB, 128, 3, 4, 2, 384, **_START), steps=400, batch_size=128)
STUDENT = StudentRecipe(Shape(VOCAB, 64, 2, 2, 1, 160, **_START), steps=500, batch_size=256)
# Streams of numpy's generator; every set of problems has its own.
_TEACHER, _STUDENT, _EVALUATION = range(3)


def problems(count: int, noise: float, *stream: int) -> np.ndarray:
    """int64 [count, LENGTH], a pure function of the arguments."""
    rng = np.random.default_rng(stream)
    a_B, b_B = rng.integers(10**DIGITS, size=(2, count))
    places = 10 ** np.arange(DIGITS + 1)
    digits = lambda x_B, n: x_B[:, None] // places[:n] % 10  # noqa: E731
    terms_BD2 = np.stack([digits(a_B, DIGITS), digits(b_B, DIGITS)], -1)
    sum_BC = digits(a_B + b_B, DIGITS + 1)
    sum_BC = np.where(rng.random(sum_BC.shape) < noise, rng.integers(10, size=sum_BC.shape), sum_BC)
    ends = np.full((count, 1), BOS), np.full((count, 1), EQUALS)
    return np.concatenate([ends[0], terms_BD2.reshape(count, -1), ends[1], sum_BC], 1)


def fresh(step: int) -> tuple[Tensor, Tensor]:
    """A batch of clean problems for the teacher."""
    ids_BL = torch.from_numpy(problems(TEACHER.batch_size, 0.0, _TEACHER, step))
    return ids_BL, (torch.arange(LENGTH) >= QUESTION).expand_as(ids_BL)


def examples(seed: int) -> list[Example]:
    """The fixed, noisy problems of a seed; the digits of the sum are supervised."""
    mask_L = np.arange(LENGTH) >= QUESTION
    rows = problems(FIXED, NOISE, _STUDENT, seed).astype(np.int32)
    return [Example(ids_L, mask_L, 0, f"seed {seed}, problem {number}") for number, ids_L in enumerate(rows)]


@torch.no_grad()
def exact_match(model: Any) -> float:
    """Share of fresh problems whose greedy answer is right in every digit."""
    right_BL = torch.from_numpy(problems(EVALUATED, 0.0, _EVALUATION))
    ids_BL = right_BL[:, :QUESTION]
    while ids_BL.shape[1] < LENGTH:
        ids_BL = torch.cat([ids_BL, model(input_ids=ids_BL).logits[:, -1:].argmax(-1)], 1)
    return float((ids_BL == right_BL).all(1).double().mean())
