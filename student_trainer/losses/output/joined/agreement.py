"""How often teachers agree on the likeliest id, row by row.

In: the likeliest id that each teacher has in the rows of which it has a distribution. Out: counts on the device.

Axes: M kept rows, P of them that a teacher has a distribution of, Q that two have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.output.parts import TeacherPart, on_device


def agreements(
    parts: Sequence[TeacherPart], likeliest: Mapping[str, Tensor], count: int, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """By teacher: rows where the heaviest other teacher that has the row has the same likeliest id, and rows that another has at all.

    Args:
        likeliest: int64 [P] of each teacher, as ids of the student; those without an entry, which have no distribution, are left out.
            Between vocabularies the id stands for its class.
        count: M.
    """
    seen = [part for part in parts if part.name in likeliest and len(part.place)]
    if len(seen) < 2:
        return {}
    share_TM = np.zeros((len(seen), count))
    for part, share_M in zip(seen, share_TM, strict=True):
        share_M[part.place.host_P] = part.share_M[part.place.host_P]
    id_TM = torch.stack([_everywhere(likeliest[part.name], part, count) for part in seen])
    found = {}
    for at, part in enumerate(seen):
        others_TM = share_TM.copy()
        others_TM[at] = 0
        heaviest_M = others_TM.argmax(0)
        both_M = (share_TM[at] > 0) & (others_TM.max(0) > 0)
        agreeing = torch.zeros((), dtype=torch.float64, device=device)
        for other in np.unique(heaviest_M[both_M]):
            rows_Q = on_device(torch.from_numpy(np.flatnonzero(both_M & (heaviest_M == other))), device)
            own_Q, their_Q = id_TM[at][rows_Q], id_TM[other][rows_Q]
            same_Q = own_Q == their_Q
            for one in (part, seen[other]):
                if one.bridge is not None:
                    class_V = one.bridge.classes.student_Vs
                    same_Q = same_Q | (class_V[own_Q] == class_V[their_Q])
            agreeing = agreeing + same_Q.sum().double()
        found[part.name] = agreeing, torch.full_like(agreeing, float(both_M.sum()))
    return found


def _everywhere(id_P: Tensor, part: TeacherPart, count: int) -> Tensor:
    """int64 [M]; 0 where it has none, which is never read."""
    return id_P.new_zeros(count).index_copy_(0, part.place.device_P, id_P)
