"""The residual stream at the output of chosen blocks, as a student of another width can align to it (docs/concepts/method.md 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from teacher_wire.core.axes import Axis
from teacher_wire.core.errors import CapabilityError, LimitError, MismatchError, RequestError
from teacher_wire.core.info import LAYER_BASIS, TeacherInfo
from teacher_wire.core.signals import AnswerShape, Field
from teacher_wire.score.signals.chosen_layers import LayerSignal
from teacher_wire.score.signals.hidden import blocks_of, outliers_of

_DIGEST_CHARS = 64


@dataclass(frozen=True)
class LayerStates(LayerSignal):
    """States before any norm: that of the last block is not the state after the final norm.

    Attributes:
        reduction: "pca" is the first principal components of the normed and centred state, "int8" the state in blocks of 128 channels
            with a scale each beside the 16 largest channels as they are, "none" the state.
        rank: components; of pca alone.
        basis: sha256 of the teacher's artifact `layer_basis`; of pca alone.
    """

    kind: ClassVar[str] = "layers"
    first_layer: ClassVar[int] = 0
    reductions: ClassVar[tuple[str, ...]] = ("pca", "int8", "none")

    reduction: str = "pca"
    rank: int = 0
    basis: str = ""

    def fields(self, shape: AnswerShape) -> tuple[Field, ...]:
        return tuple(part for layer in self.layers for part in self._of(layer, shape))

    def _of(self, layer: int, shape: AnswerShape) -> tuple[Field, ...]:
        width = shape.hidden_size
        if self.reduction == "pca":
            return (
                Field(f"layer{layer}_int8_NR", Axis.ROW, "int8", (self.rank,)),
                Field(f"layer{layer}_scale_N", Axis.ROW, "float16"),
            )
        if self.reduction == "int8":
            return (
                Field(f"layer{layer}_int8_ND", Axis.ROW, "int8", (width,)),  # 0 at the outliers
                Field(f"layer{layer}_scales_NG", Axis.ROW, "float16", (blocks_of(width),)),
                Field(f"layer{layer}_outlier_ids_NO", Axis.ROW, "uint16", (outliers_of(width),)),  # rising
                Field(f"layer{layer}_outlier_values_NO", Axis.ROW, "bfloat16", (outliers_of(width),)),
            )
        return (Field(f"layer{layer}_state_ND", Axis.ROW, shape.dtype, (width,)),)

    def check(self, vocab_rows: int) -> None:
        super().check(vocab_rows)
        if self.reduction == "pca":
            if self.rank < 1:
                raise RequestError(
                    "pca keeps at least one component of a layer", field="rank", value=self.rank, limit=">= 1"
                )
            if len(self.basis) != _DIGEST_CHARS or not set(self.basis) <= set("0123456789abcdef"):
                raise RequestError(
                    f"pca needs the sha256 of the teacher's artifact {LAYER_BASIS}",
                    field="basis",
                    value=ascii(self.basis[:_DIGEST_CHARS]),
                    limit="64 hexadecimal digits",
                )
            return
        for name, value in (("rank", self.rank), ("basis", self.basis)):
            if value:
                raise RequestError(
                    f"only pca takes a {name}", field=name, value=value, limit=f"none by {self.reduction}"
                )

    def check_teacher(self, info: TeacherInfo) -> None:
        super().check_teacher(info)
        if self.reduction != "pca":
            return
        there = next((artifact.sha256 for artifact in info.artifacts if artifact.kind == LAYER_BASIS), "")
        if not there:
            raise CapabilityError(
                f"teacher {info.name!r} has no {LAYER_BASIS}: its server sets no `features`",
                field="reduction",
                value=self.reduction,
                limit="int8|none",
            )
        if self.basis != there:
            raise MismatchError(
                f"teacher {info.name!r} projects on another {LAYER_BASIS}", field="basis", value=self.basis, limit=there
            )
        if self.rank > info.basis_rank:
            raise LimitError(
                f"above the rank of the {LAYER_BASIS} of teacher {info.name!r}",
                field="rank",
                value=self.rank,
                limit=info.basis_rank,
            )
        absent = next((layer for layer in self.layers if layer not in info.basis_layers), None)
        if absent is not None:
            raise CapabilityError(
                f"the {LAYER_BASIS} of teacher {info.name!r} has no such layer",
                field="layers",
                value=absent,
                limit="|".join(map(str, info.basis_layers)),
            )

    def captured_numbers(self, shape: AnswerShape) -> int:
        return len(self.layers) * shape.hidden_size
