"""The projection of states on the principal components of their block (docs/concepts/method.md 4.2).

Axes: C rows, D width, R components, M massive channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_wire.artifacts.kinds.layer_basis import LayerBasis, OneLayer

EPSILON = 1e-6  # under the root of the mean square
_CHUNK_BYTES = 64 << 20  # of states in float32 at a time


@dataclass(frozen=True)
class Projection:
    """Of one block, on the model's device: float32, and massive_M int64."""

    mean_D: Tensor
    basis_DR: Tensor
    massive_M: Tensor

    @classmethod
    def of(cls, layer: OneLayer, device: torch.device) -> Projection:
        """That of an artifact, with the bits that students have too."""
        mean_D, basis_DR, massive_M = (
            torch.from_numpy(part.array.copy()).to(device) for part in (layer.mean_D, layer.basis_DR, layer.massive_M)
        )
        return cls(mean_D, basis_DR.float(), massive_M.long())

    def coordinates(self, state_CD: Tensor, rank: int) -> Tensor:
        """float32 [C, rank]: the first components of states in any dtype."""
        rows = max(1, _CHUNK_BYTES // (4 * state_CD.shape[1]))
        basis_DR = self.basis_DR[:, :rank]
        return torch.cat([(normed(part, self.massive_M) - self.mean_D) @ basis_DR for part in state_CD.split(rows)])


def projections(basis: LayerBasis, device: torch.device) -> Mapping[int, Projection]:
    """Of all blocks of an artifact, by number."""
    return {number: Projection.of(layer, device) for number, layer in basis.layers.items()}


def normed(state_CD: Tensor, massive_M: Tensor) -> Tensor:
    """float32 [C, D]: states with their massive channels set to 0, divided by the root of their mean square."""
    plain_CD = state_CD.float().index_fill(1, massive_M, 0.0)
    return plain_CD * torch.rsqrt(plain_CD.square().mean(-1, keepdim=True) + EPSILON)
