"""States after the final norm, made smaller for the wire.

In: states [C, D] on the model's device; out: int8 in blocks, scales, and the outlier channels as they are.
Axes: C rows, D width, G blocks of 128 channels, O outlier channels per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_wire.score.signals.hidden import BLOCK_CHANNELS, blocks_of, outliers_of

_SMALLEST_SCALE = 2.0**-24  # the smallest float16 above 0: an all-zero block still divides
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class PackedState:
    """A compressed state; `unpack` gives what the student will see.

    Attributes:
        int8_CD: 0 at the outliers.
        scales_CG: float16.
        outlier_ids_CO: int64, rising.
        outlier_values_CO: bfloat16.
    """

    int8_CD: Tensor
    scales_CG: Tensor
    outlier_ids_CO: Tensor
    outlier_values_CO: Tensor

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """[C, D] in `dtype`."""
        width = self.int8_CD.shape[1]
        scales_CD = self.scales_CG.float().repeat_interleave(BLOCK_CHANNELS, dim=1)[:, :width]
        state_CD = self.int8_CD.float() * scales_CD
        return state_CD.scatter(1, self.outlier_ids_CO, self.outlier_values_CO.float()).to(dtype)


def pack(state_CD: Tensor) -> PackedState:
    """int8 in blocks of 128 with the 16 channels of largest magnitude kept apart (docs/concepts/method.md 3.4).

    Without the outliers a block's scale is that of its bulk: KL of the labels 1.1e-4 instead of 3e-3 where some
    channels are 30 times the others, as they are in trained models.
    """
    wide_CD = state_CD.float()
    width = wide_CD.shape[1]
    ids_CO = wide_CD.abs().topk(outliers_of(width), dim=1).indices.sort(dim=1).values
    values_CO = wide_CD.gather(1, ids_CO).to(torch.bfloat16)
    bulk_CD = wide_CD.scatter(1, ids_CO, 0.0)
    padded = blocks_of(width) * BLOCK_CHANNELS
    bulk_CGS = torch.nn.functional.pad(bulk_CD, (0, padded - width)).view(len(wide_CD), -1, BLOCK_CHANNELS)
    scales_CG = (bulk_CGS.abs().amax(-1) / 127).clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    steps_CGS = (bulk_CGS / scales_CG.float()[..., None]).round().clamp(-127, 127)
    return PackedState(steps_CGS.to(torch.int8).view(len(wide_CD), padded)[:, :width], scales_CG, ids_CO, values_CO)


def pack_rows(values_CX: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [C, X] and float16 [C]: values of any dtype as whole multiples of one scale a row."""
    wide_CX = values_CX.float()
    scale_C = (wide_CX.abs().amax(-1) / 127).clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    return (wide_CX / scale_C.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale_C
