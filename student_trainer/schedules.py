"""Numbers that change with the optimizer step, and randomness that has no state.

In: a step, a seed, a slot. Out: the same value on every rank, in every process, after every resume.
Must never remember a call: a run resumed at step s is the run that was never stopped.

Source: docs/concepts/method.md 11. Philox-4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from student_trainer.errors import ConfigError

KINDS = ("constant", "linear", "cosine", "exponential")

# What randomness is for -> second word of its key; append only, for a number that moves changes every past run.
STREAMS = {"data": 0, "on_policy": 1, "rollout": 2, "curriculum": 3, "curriculum pack": 4}


@dataclass(frozen=True)
class Schedule:
    """A number from `start` at step 0 to `end` at `steps`, and `end` for ever after.

    Attributes:
        kind: `constant` (start), `linear`, `cosine` (half a wave), `exponential` (equal ratios; both ends above 0).
        steps: optimizer steps from start to end; explicit, so that a longer run does not change it.
    Raises:
        ConfigError: an unknown kind, or numbers it cannot join.
    """

    kind: Literal["constant", "linear", "cosine", "exponential"]
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"schedule {self.kind!r} is unknown; choose from {', '.join(KINDS)}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, not {self.steps}")
        if self.kind == "exponential" and not (self.start > 0 and self.end > 0):
            raise ConfigError(f"an exponential schedule needs both ends above 0, not {self.start} and {self.end}")

    def at(self, step: int) -> float:
        """The value during optimizer step `step`, counted from 0."""
        share = min(1.0, max(0, step) / self.steps)
        if self.kind == "constant" or share == 0:
            return self.start
        if share == 1:
            return self.end
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** share
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


def uniform(seed: int, stream: str, step: int, slot: int) -> float:
    """A number in [0, 1), a pure function of its arguments.

    Args:
        seed: of the run, 0 <= seed < 2^32.
        stream: what it is for, a key of `STREAMS`; streams are independent of each other.
        step: optimizer step.
        slot: global index within the step's window, the same on 1 rank or 8.
    Raises:
        ConfigError: an unknown stream, or a number out of range.
    """
    return float(uniforms(seed, stream, step, np.asarray([slot]))[0])


def uniforms(seed: int, stream: str, step: int, slots_N: np.ndarray) -> np.ndarray:
    """float64 [N] in [0, 1), 53 random bits each: `uniform` of many slots at once."""
    if stream not in STREAMS:
        raise ConfigError(f"random stream {stream!r} is unknown; choose from {', '.join(STREAMS)}")
    if not 0 <= seed < 1 << 32:
        raise ConfigError(f"seed must lie in 0..2^32-1, not {seed}")
    if step < 0 or (slots_N.size and slots_N.min() < 0):
        raise ConfigError(f"step and slot must not be negative, at step {step}")
    slots_N = slots_N.astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    steps_N = np.full_like(slots_N, step)
    counter_N4 = np.stack([steps_N & low, steps_N >> shift, slots_N & low, slots_N >> shift], -1)
    bits_N4 = philox_4x32(counter_N4, (seed, STREAMS[stream])).astype(np.uint64)
    return ((bits_N4[:, 0] << np.uint64(21)) | (bits_N4[:, 1] >> np.uint64(11))) * 2.0**-53


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """int64 [n]: the order of n examples in an epoch, a pure function of its arguments.

    Sorts n keyed random numbers; unlike `Generator.permutation` it cannot change with the release of numpy.
    """
    return keyed_permutation(seed, "data", epoch, n)


def keyed_permutation(seed: int, stream: str, number: int, n: int) -> np.ndarray:
    """int64 [n]: permutation `number` of n things in a stream of its own; as `permutation`."""
    return np.argsort(uniforms(seed, stream, number, np.arange(n)), kind="stable").astype(np.int64)


def philox_4x32(counter_N4: np.ndarray, key_2: tuple[int, int]) -> np.ndarray:
    """Philox-4x32-10: uint32 [N, 4] random words for uint32 [N, 4] counters under a key of two 32-bit words."""
    word = np.uint64(0xFFFFFFFF)
    x0, x1, x2, x3 = counter_N4.astype(np.uint64).T
    key0, key1 = key_2
    for _ in range(10):
        product0, product1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)  # 32 x 32 bits: no overflow
        x0, x2 = (product1 >> np.uint64(32)) ^ x1 ^ np.uint64(key0), (product0 >> np.uint64(32)) ^ x3 ^ np.uint64(key1)
        x1, x3 = product1 & word, product0 & word
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], -1).astype(np.uint32)
