"""Task 2 of docs/concepts/method.md 12 with any number of digits, an end of turn, and a hint that only one side may see.

`[HINT c0 c1 ...] BOS a0 b0 a1 b1 ... = c0 c1 ... END`, least significant digits first. In: a seed; out: rows, and the share of fresh problems that
a model answers without a mistake.

Axes: B problems, L tokens of a row, Q of its question, C of its answer with END, H of the hint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.data.dataset import Example

BOS, EQUALS, END, HINT, VOCAB = 10, 11, 12, 13, 14
EVALUATED = 512
# Streams of numpy's generator; every set of problems has its own.
TEACHER, STUDENT, EVALUATION, BASE = range(4)


@dataclass(frozen=True)
class Addition:
    """The task with `digits` digits in each term.

    Attributes:
        question: Q, tokens of `BOS ... =`.
        answer: C, tokens of the sum and END.
        length: L, of a row without a hint.
    """

    digits: int

    @property
    def question(self) -> int:
        return 2 + 2 * self.digits

    @property
    def answer(self) -> int:
        return self.digits + 2

    @property
    def length(self) -> int:
        return self.question + self.answer

    @property
    def hint(self) -> int:
        """H, tokens before BOS where there is a hint."""
        return self.digits + 2

    def problems(self, count: int, noise: float, *stream: int) -> np.ndarray:
        """int64 [count, L], a pure function of the arguments; each digit of the sum is replaced by a random one with probability `noise`."""
        rng = np.random.default_rng((self.digits, *stream))
        a_B, b_B = rng.integers(10**self.digits, size=(2, count))
        terms_BD2 = np.stack([self._digits(a_B, self.digits), self._digits(b_B, self.digits)], -1)
        sum_BC = self._digits(a_B + b_B, self.digits + 1)
        sum_BC = np.where(rng.random(sum_BC.shape) < noise, rng.integers(10, size=sum_BC.shape), sum_BC)
        bos_B1, equals_B1, end_B1 = (np.full((count, 1), token) for token in (BOS, EQUALS, END))
        return np.concatenate([bos_B1, terms_BD2.reshape(count, -1), equals_B1, sum_BC, end_B1], 1)

    @staticmethod
    def _digits(x_B: np.ndarray, count: int) -> np.ndarray:
        return x_B[:, None] // 10 ** np.arange(count) % 10

    def hints(self, rows_BL: np.ndarray) -> np.ndarray:
        """int64 [B, H]: HINT and the right sums of the problems in rows."""
        terms_BD2 = rows_BL[:, 1 : self.question - 1].reshape(len(rows_BL), self.digits, 2)
        places = 10 ** np.arange(self.digits)
        sum_BC = self._digits((terms_BD2 * places[:, None]).sum((1, 2)), self.digits + 1)
        return np.concatenate([np.full((len(rows_BL), 1), HINT), sum_BC], 1)

    def examples(self, rows_BL: np.ndarray, name: str) -> list[Example]:
        """Rows whose answers are supervised."""
        mask_L = np.arange(self.length) >= self.question
        return [Example(ids_L.astype(np.int32), mask_L, 0, f"{name}, problem {n}") for n, ids_L in enumerate(rows_BL)]

    @torch.no_grad()
    def exact_match(self, model: Any, *, hinted: bool = False) -> float:
        """Share of fresh problems whose greedy answer is right in every token, END included."""
        right_BL = self.problems(EVALUATED, 0.0, EVALUATION)
        ids_BL = torch.from_numpy(right_BL[:, : self.question])
        if hinted:
            ids_BL = torch.cat([torch.from_numpy(self.hints(right_BL)), ids_BL], 1)
        asked = ids_BL.shape[1]
        was_training = model.training
        model.eval()
        for _ in range(self.answer):
            ids_BL = torch.cat([ids_BL, model(input_ids=ids_BL).logits[:, -1:].argmax(-1)], 1)
        model.train(was_training)
        return float((ids_BL[:, asked:].numpy() == right_BL[:, self.question :]).all(1).mean())

    @torch.no_grad()
    def right_probability(self, model: Any, *, hinted: bool = False) -> float:
        """Share of fresh problems whose answer, sampled at temperature 1, is right in every token: its expectation, in closed form."""
        right_BL = self.problems(EVALUATED, 0.0, EVALUATION)
        ids_BL = torch.from_numpy(np.concatenate([self.hints(right_BL), right_BL], 1) if hinted else right_BL)
        was_training = model.training
        model.eval()
        logp_BCV = model(input_ids=ids_BL).logits[:, -self.answer - 1 : -1].float().log_softmax(-1)
        model.train(was_training)
        return float(logp_BCV.gather(-1, ids_BL[:, -self.answer :, None]).sum((1, 2)).exp().mean())

    def fresh(self, count: int, *stream: int) -> tuple[Tensor, Tensor]:
        """A batch of clean problems with their loss mask."""
        ids_BL = torch.from_numpy(self.problems(count, 0.0, *stream))
        return ids_BL, (torch.arange(self.length) >= self.question).expand_as(ids_BL)
