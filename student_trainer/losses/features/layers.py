"""Which block of the student learns from which of the teacher: the settings of a config as pairs of blocks.

In: `uniform(n)`, blocks of the student, or explicit pairs; out: pairs. Blocks are counted by their outputs from 1; 0 is the embedding, the
input of block 1. The output of the last block is the residual stream before the final norm, unlike the last of transformers' `hidden_states`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from student_trainer.errors import ConfigError

_UNIFORM = re.compile(r"uniform\((\d+)\)")
Given = str | Sequence[int | Sequence[int]]


@dataclass(frozen=True)
class LayerPair:
    """The output of block `student` of the student is held against that of block `teacher` of the teacher."""

    student: int
    teacher: int


def uniform_count(text: str) -> int | None:
    """n of `uniform(n)`; None if the text says something else."""
    found = _UNIFORM.fullmatch(text.replace(" ", ""))
    return int(found.group(1)) if found else None


def uniform(count: int, blocks: int) -> tuple[int, ...]:
    """`count` of a model's blocks, evenly spread; the last one is the last but one of the model (docs/concepts/method.md 4.2): 5, 10, 14 of 15.

    Args:
        count: 1..blocks - 1.
    """
    spread = (int(place * blocks / count + 0.5) for place in range(1, count + 1))
    return tuple(min(block, blocks - 1 - (count - place)) for place, block in enumerate(spread, 1))


def pairs_of(
    layers: Given, student_blocks: int, teacher_blocks: int, *, setting: str, first: int
) -> tuple[LayerPair, ...]:
    """The pairs that a setting means, rising by the student's block.

    Args:
        layers: `uniform(n)`; blocks s of the student, of which each is paired with round(s * teacher_blocks / student_blocks); or [s, t].
        student_blocks, teacher_blocks: how many there are.
        setting: its name, for errors.
        first: the lowest block that means something: 0 for states, 1 for what a block computes inside.

    Raises:
        ConfigError: naming the setting, the block and the range.
    """
    given: Sequence[int | Sequence[int]]
    if isinstance(layers, str):
        count = uniform_count(layers)
        if count is None:
            raise ConfigError(f"{setting}: {layers!r} is neither uniform(n) nor a list of blocks")
        if not 1 <= count < max(student_blocks, 2):
            raise ConfigError(
                f"{setting}={layers}: the student has {student_blocks} blocks, so at most uniform({max(1, student_blocks - 1)}) is possible"
            )
        given = uniform(count, student_blocks)
    else:
        given = layers
    pairs = [
        LayerPair(one, int(one * teacher_blocks / student_blocks + 0.5)) if isinstance(one, int) else LayerPair(*one)
        for one in given
    ]
    if not pairs:
        raise ConfigError(f"{setting} is empty: name blocks, or set the weight to 0")
    for pair in pairs:
        for whose, block, last in (
            ("student", pair.student, student_blocks),
            ("teacher", pair.teacher, teacher_blocks),
        ):
            if not first <= block <= last:
                zero = " (0: the embedding)" if first == 0 else ""
                raise ConfigError(
                    f"{setting}: block {block} of the {whose} is out of range: its blocks are {max(first, 1)}..{last}{zero}"
                )
    seen = [pair.student for pair in pairs]
    twice = sorted({block for block in seen if seen.count(block) > 1})
    if twice:
        raise ConfigError(
            f"{setting}: block {twice[0]} of the student is named twice; each learns from one of the teacher"
        )
    return tuple(sorted(pairs, key=lambda pair: pair.student))


def teacher_layers(pairs: Sequence[LayerPair]) -> tuple[int, ...]:
    """The distinct blocks of the teacher, rising, as a request asks for them."""
    return tuple(sorted({pair.teacher for pair in pairs}))
