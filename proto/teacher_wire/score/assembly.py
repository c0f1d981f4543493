"""An answer while its chunks come: every chunk is written to its place in the whole, so that nothing is joined afterwards.

In: what was asked; out: room for the rows of the next chunk, and in the end all of them. Memory is taken when the first chunk comes.
"""

from __future__ import annotations

import numpy as np

from teacher_wire.core.axes import Entries
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import LabelError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.tensor import DTYPES, Tensor


class Assembly:
    """The answer to `call` by the teacher of `info`, as far as it has come.

    Attributes:
        chunks, rows: that have come.
    """

    def __init__(self, call: ScoreCall, info: TeacherInfo) -> None:
        self.chunks = 0
        self.rows = 0
        self._asked_rows = call.batch.rows
        self._entries = Entries(call.batch)
        self._fields = {part.name: part for part in call.spec.fields_of(info)}
        self._whole: dict[str, Tensor] = {}

    @property
    def names(self) -> set[str]:
        """Of the tensors that every chunk holds."""
        return set(self._fields)

    def room(self, rows: int) -> dict[str, Tensor]:
        """The entries of the next `rows` rows in every tensor, to be written to.

        Raises:
            LabelError: that is more than was asked for.
        """
        stop = self.rows + rows
        if stop > self._asked_rows:
            raise LabelError("more rows than asked for", field="rows", value=stop, limit=self._asked_rows)
        if not self._whole:
            self._whole = {
                name: Tensor(part.dtype, np.empty((self._entries.total(part.axis), *part.entry), DTYPES[part.dtype][0]))
                for name, part in self._fields.items()
            }
        spans = {name: self._entries.span(part.axis, self.rows, stop) for name, part in self._fields.items()}
        return {name: tensor.rows(*spans[name]) for name, tensor in self._whole.items()}

    def took(self, rows: int) -> None:
        """Counts a chunk whose rows have all been written."""
        self.chunks += 1
        self.rows += rows

    def whole(self) -> dict[str, Tensor]:
        """Every tensor by name, once all rows have come; in memory of their own."""
        assert self.rows == self._asked_rows
        return self._whole
