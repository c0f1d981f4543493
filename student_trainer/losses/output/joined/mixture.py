"""The divergence of the student from the mixture of its teachers (`prob_mix`), which a sum of divergences is not (docs/concepts/method.md 9).

In: what all teachers say of a chunk of rows. Out: one distribution a row, held against the student's as a single teacher's would be, at
any temperature: what is softened is the mixture, not its parts.

Axes: C rows of a chunk, P of them that a teacher has, Q that any has, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.output.joined.chunk import Chunk, Piece
from student_trainer.losses.output.joined.evidence import Read
from student_trainer.losses.output.parts import Index, TeacherPart
from student_trainer.losses.rows import FullRows


@dataclass(eq=False)
class Mixture:
    """Of one micro-batch.

    Attributes:
        parts: the teachers, all with full distributions over the student's ids.
        kd, weight: of each chunk, losses of the rows that a teacher has, and weight times the sum of their shares.
    """

    parts: list[TeacherPart]
    kd: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)

    def add(
        self,
        chunk: Chunk,
        read: dict[str, Read],
        number: int,
        bounds: tuple[int, int],
        vocab_rows: int,
        factor: float | Tensor,
        dtype: torch.dtype,
    ) -> None:
        """The mixture's part on one chunk, rows `bounds` of the micro-batch; `factor` is kd_weight over the normalizer."""
        start, stop = bounds
        mixed_CV: Tensor | None = None
        weight_C: Tensor | None = None
        has_C = np.zeros(stop - start, np.bool_)
        for part in self.parts:
            of_part = read[part.name]
            first, last = of_part.place_B1[number : number + 2]
            if first == last:
                continue
            looked = of_part.look(number, dtype)
            if looked.likeliest_P is not None:
                of_part.likeliest.append(looked.likeliest_P)
            rows = looked.rows
            assert isinstance(rows, FullRows), "others are refused before"
            log_p_PV = rows.logits_NV.log_softmax(-1).add_(part.log_share_P[first:last, None])
            where, weight_P = of_part.where(number, stop - start), part.weight_P[first:last]
            has_C[part.place.host_P[first:last] - start] = True
            if mixed_CV is None or weight_C is None:
                if last - first == stop - start:
                    mixed_CV, weight_C = log_p_PV, weight_P.clone()
                    continue
                mixed_CV = log_p_PV.new_full((stop - start, vocab_rows), -torch.inf)
                weight_C = weight_P.new_zeros(stop - start)
            mixed_CV[where] = torch.logaddexp(mixed_CV[where], log_p_PV)
            weight_C[where] += weight_P
        if mixed_CV is None or weight_C is None:
            return
        some = Index.of(np.flatnonzero(has_C), mixed_CV.device)
        where = some.part(0, len(some))
        weight_Q, nothing_Q = weight_C[where], weight_C.new_zeros(len(some))
        found = chunk.add(Piece(where, FullRows(mixed_CV[where], nothing_Q, nothing_Q), weight_Q * factor))
        self.kd.append(found.kd_P)
        self.weight.append(weight_Q)

    def kd_sum(self, nothing: Tensor) -> Tensor:
        """Of the losses, each times its weight."""
        return torch.cat(self.weight).double() @ torch.cat(self.kd).double() if self.kd else nothing
