"""Mean, massive channels and principal components of the states of blocks, from passes over a sample of text.

In: states of the sample, twice, piece by piece; out: a `LayerBasis`. All sums are float64 and in one order, so that the same states give the
same bytes. Axes: C rows of a piece, D width, R components, M massive channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from teacher_server.errors import ServerConfigError
from teacher_server.signals.features.basis import normed
from teacher_wire.artifacts.kinds.layer_basis import MASSIVE_CHANNELS, LayerBasis, OneLayer
from teacher_wire.core.tensor import Tensor as WireTensor

MOMENT_BYTES = 1 << 30  # of second moments held at a time; the blocks are taken in groups
_ROWS_A_COMPONENT = 2  # fewer say nothing about the last components

# The states [C, D] of these blocks in the model's dtype, piece by piece of the sample; the same at every call.
States = Callable[[Sequence[int]], Iterable[Mapping[int, Tensor]]]


def calibrate(states: States, layers: Sequence[int], width: int, rank: int) -> LayerBasis:
    """The basis of each of these blocks.

    Args:
        states: passes over the sample.
        layers: numbers of blocks, rising.
        width: D.
        rank: R, at most D.

    Raises:
        ServerConfigError: the sample has fewer rows than two for each component, or a state is not finite.
    """
    found: dict[int, OneLayer] = {}
    for group in _groups(layers, max(1, MOMENT_BYTES // (8 * width * width))):
        massive, rows = _massive(states, group, width)
        if rows < _ROWS_A_COMPONENT * rank:
            raise ServerConfigError(
                f"features.calibration: the sample has {rows} rows behind the first tokens of its sequences, "
                f"a basis of rank {rank} needs {_ROWS_A_COMPONENT * rank}: give a longer text or a lower features.rank"
            )
        found |= _components(states, massive, rows, rank)
    return LayerBasis(found)


def _massive(states: States, layers: Sequence[int], width: int) -> tuple[dict[int, Tensor], int]:
    """int64 [M] of each block, rising: the channels of greatest mean square; and the rows of the sample."""
    squares: dict[int, Tensor] = {}
    rows = 0
    for piece in states(layers):
        for number, state_CD in piece.items():
            square_D = state_CD.double().square().sum(0)
            squares[number] = squares[number] + square_D if number in squares else square_D
        rows += len(next(iter(piece.values())))
    for number, square_D in squares.items():
        if not torch.isfinite(square_D).all():
            raise ServerConfigError(
                f"features: the states of block {number} of the calibration's sample are not finite"
            )
    count = min(MASSIVE_CHANNELS, width // 8)
    largest = {number: (-square_D).argsort(stable=True)[:count].sort().values for number, square_D in squares.items()}
    return largest, rows


def _components(states: States, massive: Mapping[int, Tensor], rows: int, rank: int) -> dict[int, OneLayer]:
    sums: dict[int, Tensor] = {}
    products: dict[int, Tensor] = {}
    for piece in states(list(massive)):
        for number, state_CD in piece.items():
            wide_CD = normed(state_CD, massive[number]).double()
            if number not in sums:
                sums[number] = wide_CD.new_zeros(wide_CD.shape[1])
                products[number] = wide_CD.new_zeros(wide_CD.shape[1], wide_CD.shape[1])
            sums[number] += wide_CD.sum(0)
            products[number].addmm_(wide_CD.T, wide_CD)
    found = {}
    for number, sum_D in sums.items():
        mean_D = sum_D / rows
        spread_DD = products.pop(number) / rows - torch.outer(mean_D, mean_D)
        basis_DR = torch.linalg.eigh(spread_DD).eigenvectors.flip(1)[:, :rank]
        largest_1R = basis_DR.abs().argmax(0, keepdim=True)
        basis_DR = (
            basis_DR * basis_DR.gather(0, largest_1R).sign()
        )  # an eigenvector's sign is nobody's: the largest entry is positive
        found[number] = OneLayer(
            WireTensor("float32", mean_D.float().cpu().numpy()),
            WireTensor("float16", basis_DR.half().cpu().contiguous().numpy()),
            WireTensor("int32", massive[number].int().cpu().numpy()),
        )
    return found


def _groups(layers: Sequence[int], size: int) -> Iterator[list[int]]:
    rest = iter(layers)
    while group := list(islice(rest, size)):
        yield group
