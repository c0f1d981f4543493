"""Whether a model computes a sequence in a shared row as it computes it alone: tried, not believed.

In: a loaded student; out: nothing, or a refusal. Attention is kept apart by a mask; what else carries something from token to token (recurrent
states, convolutions, positions counted on by the model itself) would not be.
"""

from __future__ import annotations

import inspect

import torch

from student_trainer.data.row_packing import pack_rows
from student_trainer.errors import ModelError
from student_trainer.model.forward import SharedRows
from student_trainer.model.load import Student

_LENGTHS = (13, 7, 5)  # the second and third share a row
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-6,
}  # of the norm of a sequence's states; a leak is of the order of 1
_NARROW_TOLERANCE = 5e-2


@torch.no_grad()
def check_packing(student: Student) -> None:
    """Refuses a model that lets sequences of one row see one another.

    Raises:
        ModelError: naming the architecture, and what to set.
    """
    kind = type(student.causal_lm).__name__
    refusal = f"train.packing=true: {kind} %s: set train.packing=false"
    if "position_ids" not in inspect.signature(student.body.forward).parameters:
        raise ModelError(refusal % "takes no positions, so its rows cannot be shared")
    vocab, device = student.vocab_rows, student.outline.device
    made = torch.arange(sum(_LENGTHS), dtype=torch.int64) * 7919 % vocab
    sequences = made.split(list(_LENGTHS))
    packing = pack_rows(_LENGTHS)
    ids_RL = torch.zeros(packing.sequence_RL.shape, dtype=torch.int64)
    for b, ids in enumerate(sequences):
        ids_RL[packing.row_B[b], packing.start_B[b] : packing.start_B[b] + _LENGTHS[b]] = ids
    was_training = student.model.training
    student.model.eval()
    try:
        together_RLD = student.forward(ids_RL.to(device), shared=SharedRows.of(packing, device)).final_BLD
        worst = 0.0
        for b, ids in enumerate(sequences):
            alone_LD = student.forward(ids[None].to(device)).final_BLD[0].float()
            start = int(packing.start_B[b])
            found_LD = together_RLD[int(packing.row_B[b]), start : start + _LENGTHS[b]].float()
            worst = max(worst, float((found_LD - alone_LD).norm() / alone_LD.norm().clamp(min=1e-30)))
    finally:
        student.model.train(was_training)
    allowed = _TOLERANCE.get(together_RLD.dtype, _NARROW_TOLERANCE)
    if not worst <= allowed:
        raise ModelError(
            refusal
            % f"computes a sequence otherwise beside others in a row than alone (off by {worst:.2g} of its states, {allowed:g} allowed)"
        )
