"""How an answer is drawn: greedily, or from a distribution with a random stream of its own for each answer.

The noise of an answer is a function of the seed and the answer's number alone, so that its company in a batch, and a restart, change nothing
but rounding. The distributions are transformers' own (temperature, top-k, top-p); the draw is the largest of log p + Gumbel noise, which is
a sample from p.

Axes: B answers of a batch, V vocabulary rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from student_trainer.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 for the likeliest token every time.
        top_p: share of the probability that is drawn from, likeliest tokens first; 1 for all of it.
        top_k: how many likeliest tokens are drawn from; 0 for all of them.
        max_new_tokens: of an answer.
        seed: of all answers; each has a stream of its own.

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, good, limit in (
            ("temperature", self.temperature, self.temperature == 0 or 1e-3 <= self.temperature <= 100, "0, or 0.001 to 100"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
        ):  # fmt: skip
            if not (good and math.isfinite(value)):
                raise ConfigError(f"--{name} {value}: must be {limit}")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise ConfigError(
                f"--top-p {self.top_p:g}, --top-k {self.top_k}: mean nothing at --temperature 0, which takes the likeliest token; set a temperature"
            )

    def processors(self, numbers: Sequence[int]) -> LogitsProcessorList:
        """What makes greedy decoding draw so; `numbers` are those of the answers in the batch."""
        made = LogitsProcessorList()
        if not self.temperature:
            return made
        made.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            made.append(TopPLogitsWarper(self.top_p))
        made.append(_Gumbel([_stream(self.seed, number) for number in numbers]))
        return made


class _Gumbel(LogitsProcessor):
    """Adds each answer's own Gumbel noise."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        rows = scores.shape[-1]
        noise_BV = torch.stack([torch.empty(rows).exponential_(generator=one) for one in self._generators])
        return scores.float() - noise_BV.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)


def _stream(seed: int, number: int) -> int:
    """The seed of one answer's stream."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1
