"""The output head as an artifact: what turns a state after the final norm into logits.

Axes: V rows of the head, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from teacher_wire.artifacts.kinds.base import ArtifactKind
from teacher_wire.artifacts.messages import Artifact, ArtifactHeader
from teacher_wire.core.errors import LabelError
from teacher_wire.core.identity import head_sha256
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.tensor import FLOATS, Tensor

OUTPUT_HEAD = "output_head"
_NUMBERS = ("logit_scale", "final_softcap")


@dataclass(frozen=True)
class TeacherHead:
    """The output head: logits = softcap(logit_scale * (h W^T + b)).

    Attributes:
        weight_VD: in the model's dtype.
        bias_V: or None.
        logit_scale: multiplier, 1.0 for most models.
        final_softcap: 0.0 for none, else c in c * tanh(z / c).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    final_softcap: float = 0.0

    @classmethod
    def of(cls, artifact: Artifact) -> TeacherHead:
        """The head in an artifact of this kind."""
        tensors = artifact.tensors
        return cls(tensors["weight_VD"], tensors.get("bias_V"), *(artifact.numbers[name] for name in _NUMBERS))

    def artifact(self) -> Artifact:
        """The head as it is given away; hashes all of it."""
        tensors = {"weight_VD": self.weight_VD}
        if self.bias_V is not None:
            tensors["bias_V"] = self.bias_V
        return OutputHeadKind().make(tensors, {name: getattr(self, name) for name in _NUMBERS})


class OutputHeadKind(ArtifactKind):
    """Kind "output_head"; its digest is the one by which heads have been named since protocol version 1."""

    name = OUTPUT_HEAD

    def sha256(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> str:
        return head_sha256(tensors["weight_VD"], tensors.get("bias_V"), *(numbers[name] for name in _NUMBERS))

    def check(self, header: ArtifactHeader, info: TeacherInfo) -> None:
        names = [tensor.name for tensor in header.tensors]
        if names not in (["weight_VD"], ["weight_VD", "bias_V"]):
            raise LabelError(
                "other tensors than a head has", field="output_head", value=names[:4], limit="weight_VD, bias_V"
            )
        for tensor in header.tensors:
            if tensor.dtype not in FLOATS:
                raise LabelError(
                    "unknown dtype of a head",
                    field=f"output_head.{tensor.name}",
                    value=tensor.dtype,
                    limit="|".join(FLOATS),
                )
        weight, bias = header.tensors[0], header.tensors[1] if len(names) > 1 else None
        if len(weight.shape) != 2 or weight.shape[0] > info.vocab_rows or weight.shape[1] != info.hidden_size:
            raise LabelError(
                "not of the described shape", field="output_head.weight_VD",
                value=list(weight.shape), limit=[info.vocab_rows, info.hidden_size],
            )  # fmt: skip
        if bias is not None and bias.shape != weight.shape[:1]:
            raise LabelError(
                "not one entry per row of the weight",
                field="output_head.bias_V",
                value=list(bias.shape),
                limit=[weight.shape[0]],
            )
        numbers = header.numbers
        if sorted(numbers) != sorted(_NUMBERS) or not all(map(math.isfinite, numbers.values())):
            raise LabelError(
                "not the two numbers of a head",
                field="output_head.numbers",
                value=dict(sorted(numbers.items())[:4]),
                limit=", ".join(_NUMBERS),
            )
