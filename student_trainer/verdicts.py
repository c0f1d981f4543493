"""What the device says of the labels it has used, read when it is there: no step waits for the check of its own labels.

In: the evidence of each micro-batch; out: an error that names the sample, some micro-batches later at most. Until then `refused` keeps the
optimizer from learning anything from bad labels, or from what came after them.
"""

from __future__ import annotations

from collections import deque

import torch

from student_trainer.feed.source import LabelRequest
from student_trainer.losses.integrity import Integrity, TeacherHeadMismatch

ON_THEIR_WAY = 2  # micro-batches that the host may be ahead of what it knows


class Verdicts:
    """Evidence under way.

    Args:
        device: of the student. On the host everything is known at once.

    Attributes:
        refused: float32 [], 1 from the first bad micro-batch on: an optimizer that is given it as `found_inf` updates nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.refused = torch.zeros((), device=device)
        self._ahead = ON_THEIR_WAY if device.type == "cuda" else 0
        self._open: deque[tuple[Integrity, LabelRequest]] = deque()

    def add(self, integrity: Integrity, request: LabelRequest) -> None:
        """Takes the evidence of the labels of `request`; raises what is known to be wrong by now.

        Raises:
            TeacherHeadMismatch: labels are not what the teacher's head makes of its states; names the sample.
        """
        torch.maximum(self.refused, integrity.refused, out=self.refused)
        self._open.append((integrity, request))
        while self._open and (len(self._open) > self._ahead or self._open[0][0].arrived):
            self._check(*self._open.popleft())

    def settle(self) -> None:
        """Waits for all verdicts; before anything is written down or shown. Raises as `add`."""
        while self._open:
            self._check(*self._open.popleft())

    @staticmethod
    def _check(integrity: Integrity, request: LabelRequest) -> None:
        try:
            integrity.check()
        except TeacherHeadMismatch as error:
            error.add_note(f"sample {request.names[request.batch.sequence_of_row(error.row)]}")
            raise
