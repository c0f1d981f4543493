"""Task 1 of docs/concepts/method.md 12: a stochastic language whose true next-token distribution is known.

Eight topics, each a Markov chain over 32 symbols; the first token of a sequence names the topic, every later one is
drawn. In: a model; out: the mean KL(truth | model) a token, which soft labels lower far more than hard ones can.

Axes: B sequences, L = 33 tokens, V = 40 ids (32 symbols, then 8 topics).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.data.dataset import Example
from tests.e2e.classroom import Shape, StudentRecipe, TeacherRecipe

SYMBOLS, TOPICS, LENGTH = 32, 8, 33
VOCAB = SYMBOLS + TOPICS
CONCENTRATION, UNIFORM_SHARE = 0.15, 0.02
FIXED, EVALUATED = 512, 256  # sequences a student has, sequences it is measured on
TEACHER = TeacherRecipe("task1-v1", Shape(VOCAB, 128, 3, 4, 2, 384), steps=300, batch_size=64)
STUDENT = StudentRecipe(Shape(VOCAB, 64, 2, 2, 1, 160), steps=250, batch_size=32)
# Streams of numpy's generator; every set of sequences has its own.
_WORLD, _TEACHER, _STUDENT, _EVALUATION = range(4)


class Language:
    """The truth.

    Attributes:
        next_TSS: [topic, symbol, next symbol] probabilities.
        first_TS: of the first symbol after the topic.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng([_WORLD, 0])
        drawn = rng.dirichlet(np.full(SYMBOLS, CONCENTRATION), size=(TOPICS, SYMBOLS + 1))
        mixed = (1 - UNIFORM_SHARE) * drawn + UNIFORM_SHARE / SYMBOLS
        self.next_TSS, self.first_TS = mixed[:, :SYMBOLS], mixed[:, SYMBOLS]

    def sample(self, count: int, *stream: int) -> np.ndarray:
        """int64 [count, LENGTH], a pure function of `stream`."""
        rng = np.random.default_rng(stream)
        topic_B = rng.integers(TOPICS, size=count)
        ids_BL = np.empty((count, LENGTH), np.int64)
        ids_BL[:, 0] = SYMBOLS + topic_B
        for t in range(1, LENGTH):
            p_BS = self.first_TS[topic_B] if t == 1 else self.next_TSS[topic_B, ids_BL[:, t - 1]]
            drawn_B = (p_BS.cumsum(-1) < rng.random(count)[:, None]).sum(-1)
            ids_BL[:, t] = np.minimum(drawn_B, SYMBOLS - 1)
        return ids_BL

    def truth(self, ids_BL: np.ndarray) -> Tensor:
        """float64 [B, L-1, SYMBOLS]: the distribution of every token but the first."""
        topic_B1 = ids_BL[:, :1] - SYMBOLS
        first_B1S = self.first_TS[topic_B1[:, 0]][:, None]
        return torch.from_numpy(np.concatenate([first_B1S, self.next_TSS[topic_B1, ids_BL[:, 1:-1]]], 1))


LANGUAGE = Language()


def fresh(step: int) -> tuple[Tensor, Tensor]:
    """A batch for the teacher."""
    ids_BL = torch.from_numpy(LANGUAGE.sample(TEACHER.batch_size, _TEACHER, step))
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    mask_BL[:, 0] = False
    return ids_BL, mask_BL


def examples(seed: int) -> list[Example]:
    """The fixed sequences of a seed, all tokens but the topic supervised."""
    mask_L = np.arange(LENGTH) > 0
    rows = LANGUAGE.sample(FIXED, _STUDENT, seed).astype(np.int32)
    return [Example(ids_L, mask_L, 0, f"seed {seed}, sequence {number}") for number, ids_L in enumerate(rows)]


@torch.no_grad()
def kl_to_truth(model: Any) -> float:
    """Mean KL(truth | model) in nats a token, over fresh sequences."""
    ids_BL = LANGUAGE.sample(EVALUATED, _EVALUATION, 0)
    p_BLS = LANGUAGE.truth(ids_BL)
    log_q_BLV = model(input_ids=torch.from_numpy(ids_BL)).logits[:, :-1].double().log_softmax(-1)
    return float((p_BLS * (p_BLS.log() - log_q_BLV[..., :SYMBOLS])).sum(-1).mean())


def entropy() -> float:
    """Nats a token that nobody can go below."""
    p_BLS = LANGUAGE.truth(LANGUAGE.sample(EVALUATED, _EVALUATION, 0))
    return float(-(p_BLS * p_BLS.log()).sum(-1).mean())
