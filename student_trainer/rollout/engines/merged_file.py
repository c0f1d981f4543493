"""A written model file whose weights are replaced where they lie: new weights for an engine without a second copy of them, nor of the frozen ones.

In: a file that `merged.MergedWriter` has written, in memory or on a disk of this machine, and values of the trained weights; out: the same file with these.
Whoever reads it must not do so meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from student_trainer.model.load import Student
from student_trainer.model.merged import sources
from student_trainer.rollout.engines.mapped_weights import MappedWeights


class MergedFile:
    """See module.

    Args:
        student: whose model it is.
        mapped: the file.
        placed: of each weight that training changes, its place in the file.
    """

    def __init__(self, student: Student, mapped: MappedWeights, placed: Mapping[str, Tensor]) -> None:
        self._student = student
        self._mapped = mapped
        self._placed = placed

    @classmethod
    def of(cls, student: Student, file: Path) -> MergedFile | None:
        """Opens a file of all weights of the student, its vocabulary cut or not; None if it does not hold them under their names and in their shapes, as of
        architectures whose files hold experts apart.

        Raises:
            OSError: it cannot be opened or mapped.
        """
        mapped = MappedWeights(file)
        changing = {name: source for name, source in sources(student).items() if source.changes}
        placed = {}
        for name, source in changing.items():
            held, own = mapped.tensors.get(name), source.shape
            if held is None:
                continue
            is_cut = held.shape[1:] == own[1:] and held.dim() > 0 and held.shape[0] < own[0]
            if held.shape == own or is_cut:
                placed[name] = held
        tied = {changing[name].place for name in placed} - {None}  # of these the file has one name
        missing = [name for name in changing.keys() - placed.keys() if changing[name].place not in tied]
        if missing:
            return None
        mapped.register()
        return cls(student, mapped, placed)

    @torch.no_grad()
    def update(self, trained: Mapping[str, Tensor]) -> None:
        """Puts new values in.

        Args:
            trained: as of `merged.merged_state`; read before this returns.

        Raises:
            ModelError: the names are not the student's.
        """
        found = sources(self._student, trained)
        for name, held in self._placed.items():
            value = found[name].make()
            value = value if value.shape == held.shape else value[: len(held)]
            held.copy_(value.to(held.dtype))  # rounded where it lies, before it travels
