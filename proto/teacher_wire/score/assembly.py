"""An answer while its chunks come: every chunk is written to its place in the whole, so that nothing is joined afterwards.

In: what was asked; out: room for the rows of the next chunk, and in the end all of them. Memory is taken when the first chunk comes.
"""

from __future__ import annotations

import numpy as np

from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import LabelError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec, blocks_of, outliers_of
from teacher_wire.core.tensor import DTYPES, Tensor, token_id_dtype

_ALWAYS = frozenset({"lse_N", "label_logp_N"})
_EXPECTED = {
    ("top_k", "none"): _ALWAYS | {"topk_ids_NK", "topk_logits_NK", "tail_logp_N"},
    ("hidden", "none"): _ALWAYS | {"hidden_ND"},
    ("hidden", "int8"): _ALWAYS | {"state_int8_ND", "state_scales_NG", "outlier_ids_NO", "outlier_values_NO"},
    ("full", "none"): _ALWAYS | {"logits_NV"},
}


def row_types(spec: SignalSpec, info: TeacherInfo) -> dict[str, tuple[tuple[int, ...], str]]:
    """Attribute of TeacherSignals -> shape of one row and dtype on the wire, of all tensors that such an answer holds."""
    width = info.hidden_size
    types: dict[str, tuple[tuple[int, ...], str]] = {
        "lse_N": ((), "float32"),
        "label_logp_N": ((), "float32"),
        "tail_logp_N": ((), "float32"),
        "topk_ids_NK": ((spec.kept,), token_id_dtype(spec.vocab_rows)),
        "topk_logits_NK": ((spec.kept,), info.dtype),
        "hidden_ND": ((width,), info.dtype),
        "logits_NV": ((spec.vocab_rows,), info.dtype),
        "state_int8_ND": ((width,), "int8"),
        "state_scales_NG": ((blocks_of(width),), "float16"),
        "outlier_ids_NO": ((outliers_of(width),), "uint16"),
        "outlier_values_NO": ((outliers_of(width),), "bfloat16"),
    }
    expected = _EXPECTED[spec.transport, spec.compression]
    return {name: kind for name, kind in types.items() if name in expected}


class Assembly:
    """The answer to `call` by the teacher of `info`, as far as it has come.

    Attributes:
        chunks, rows: that have come.
    """

    def __init__(self, call: ScoreCall, info: TeacherInfo) -> None:
        self.chunks = 0
        self.rows = 0
        self._asked_rows = call.batch.rows
        self._types = row_types(call.spec, info)
        self._whole: dict[str, Tensor] = {}

    @property
    def names(self) -> set[str]:
        """Of the tensors that every chunk holds."""
        return set(self._types)

    def room(self, rows: int) -> dict[str, Tensor]:
        """The next `rows` rows of every tensor, to be written to.

        Raises:
            LabelError: that is more than was asked for.
        """
        stop = self.rows + rows
        if stop > self._asked_rows:
            raise LabelError("more rows than asked for", field="rows", value=stop, limit=self._asked_rows)
        if not self._whole:
            self._whole = {
                name: Tensor(dtype, np.empty((self._asked_rows, *row), DTYPES[dtype][0]))
                for name, (row, dtype) in self._types.items()
            }
        return {name: tensor.rows(self.rows, stop) for name, tensor in self._whole.items()}

    def took(self, rows: int) -> None:
        """Counts a chunk whose rows have all been written."""
        self.chunks += 1
        self.rows += rows

    def whole(self) -> dict[str, Tensor]:
        """All rows by attribute name, once they have come; in memory of their own."""
        assert self.rows == self._asked_rows
        return self._whole
