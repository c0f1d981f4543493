"""The byte table of a teacher's tokenizer as an artifact: what a student with another tokenizer aligns its tokens by.

Axes: V ids, B bytes of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from teacher_wire.artifacts.kinds.base import ArtifactKind
from teacher_wire.artifacts.messages import Artifact, ArtifactHeader
from teacher_wire.core.errors import LabelError
from teacher_wire.core.info import BYTE_TABLE, TeacherInfo
from teacher_wire.core.tensor import Tensor
from teacher_wire.vocabulary.byte_table import ROLES, TEXT, ByteTable

_DTYPES = {"bytes_B": "uint8", "ends_V1": "int32", "role_V": "uint8"}


def to_artifact(table: ByteTable) -> Artifact:
    """The table as it is given away; hashes all of it."""
    arrays = {"bytes_B": table.bytes_B, "ends_V1": table.ends_V1.astype(np.int32), "role_V": table.role_V}
    return ByteTableKind().make({name: Tensor(_DTYPES[name], array) for name, array in arrays.items()}, {})


def of_artifact(artifact: Artifact) -> ByteTable:
    """The table in an artifact of this kind."""
    found = artifact.tensors
    return ByteTable(found["bytes_B"].array, found["ends_V1"].array.astype(np.int64), found["role_V"].array)


class ByteTableKind(ArtifactKind):
    """Kind "byte_table"; its digest is by the general rule."""

    name = BYTE_TABLE

    def check(self, header: ArtifactHeader, info: TeacherInfo) -> None:
        told = {tensor.name: tensor for tensor in header.tensors}
        if list(told) != list(_DTYPES) or header.numbers:
            raise LabelError(
                "other entries than a byte table has", field=BYTE_TABLE,
                value=[*told, *sorted(header.numbers)][:4], limit=", ".join(_DTYPES),
            )  # fmt: skip
        for name, tensor in told.items():
            if tensor.dtype != _DTYPES[name] or len(tensor.shape) != 1:
                raise LabelError(
                    "not of the described dtype and shape", field=f"{BYTE_TABLE}.{name}",
                    value=f"{tensor.dtype}{list(tensor.shape)[:4]}", limit=f"{_DTYPES[name]}[n]",
                )  # fmt: skip
        ids, ends = told["role_V"].shape[0], told["ends_V1"].shape[0]
        if ends != ids + 1 or ids < info.vocab_rows:
            raise LabelError(
                "not one entry per id", field=f"{BYTE_TABLE}.role_V", value=f"{ids} and {ends} ends",
                limit=f"{info.vocab_rows} at least, and one end more",
            )  # fmt: skip

    def sha256(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> str:
        ends_V1 = tensors["ends_V1"].array.astype(np.int64)  # of int32 ends a difference may wrap and seem to rise
        role_V = tensors["role_V"].array
        lengths_V = np.diff(ends_V1)
        whole = ends_V1[0] == 0 and ends_V1[-1] == tensors["bytes_B"].shape[0] and bool((lengths_V >= 0).all())
        if not whole:
            raise LabelError("ends that are not those of its bytes", field=f"{BYTE_TABLE}.ends_V1")
        if not bool(((role_V < ROLES) & ((role_V == TEXT) == (lengths_V > 0))).all()):
            raise LabelError("ids with bytes and a role, or with neither", field=f"{BYTE_TABLE}.role_V")
        return super().sha256(tensors, numbers)
