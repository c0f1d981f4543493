"""What states of chosen blocks are projected on before they travel: principal components, calibrated once a revision (docs/concepts/method.md 4.2).

Axes: D width, R rank of the basis, M massive channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from teacher_wire.artifacts.kinds.base import ArtifactKind
from teacher_wire.artifacts.messages import Artifact, ArtifactHeader
from teacher_wire.core.errors import LabelError
from teacher_wire.core.info import LAYER_BASIS, TeacherInfo
from teacher_wire.core.tensor import Tensor

MASSIVE_CHANNELS = 8
_SHOWN = 4


@dataclass(frozen=True)
class OneLayer:
    """The basis of one block: t = basis^T (v / sqrt(mean(v^2) + 1e-6) - mean), v the state with its massive channels set to 0.

    Attributes:
        mean_D: float32.
        basis_DR: float16, orthonormal columns by falling variance.
        massive_M: int32, rising.
    """

    mean_D: Tensor
    basis_DR: Tensor
    massive_M: Tensor


@dataclass(frozen=True)
class LayerBasis:
    """The bases of a teacher's blocks, by number, rising; 0 is the embedding."""

    layers: Mapping[int, OneLayer]

    @property
    def rank(self) -> int:
        """R, the same for all."""
        return next(iter(self.layers.values())).basis_DR.shape[1]

    @classmethod
    def of(cls, artifact: Artifact) -> LayerBasis:
        """The bases in an artifact of this kind."""
        found = artifact.tensors
        numbers = [int(name[4:-2]) for name in found if name.startswith("mean")]
        return cls({n: OneLayer(found[f"mean{n}_D"], found[f"basis{n}_DR"], found[f"massive{n}_M"]) for n in numbers})

    def artifact(self) -> Artifact:
        """The bases as they are given away; hashes all of them."""
        tensors: dict[str, Tensor] = {}
        for number, layer in self.layers.items():
            tensors |= {f"mean{number}_D": layer.mean_D, f"basis{number}_DR": layer.basis_DR}
            tensors[f"massive{number}_M"] = layer.massive_M
        return LayerBasisKind().make(tensors, {})


class LayerBasisKind(ArtifactKind):
    """Kind "layer_basis"; its digest is by the general rule."""

    name = LAYER_BASIS

    def check(self, header: ArtifactHeader, info: TeacherInfo) -> None:
        wanted = [name for n in info.basis_layers for name in (f"mean{n}_D", f"basis{n}_DR", f"massive{n}_M")]
        names = [tensor.name for tensor in header.tensors]
        if not names or names != wanted:
            raise LabelError(
                "other tensors than the described layers have",
                field=LAYER_BASIS, value=names[:_SHOWN], limit=wanted[:_SHOWN],
            )  # fmt: skip
        for tensor in header.tensors:
            letters = tensor.name.rpartition("_")[2]
            dtype = {"D": "float32", "DR": "float16", "M": "int32"}[letters]
            limit = {"D": [info.hidden_size], "DR": [info.hidden_size, info.basis_rank], "M": [MASSIVE_CHANNELS]}[
                letters
            ]
            shape = list(tensor.shape)
            if tensor.dtype != dtype or not (
                shape == limit if letters != "M" else len(shape) == 1 and shape[0] <= limit[0]
            ):
                raise LabelError(
                    "not of the described dtype and shape", field=f"{LAYER_BASIS}.{tensor.name}",
                    value=f"{tensor.dtype}{shape[:_SHOWN]}", limit=f"{dtype}{limit}",
                )  # fmt: skip
        if header.numbers:
            raise LabelError(
                "a basis has no numbers", field=f"{LAYER_BASIS}.numbers", value=sorted(header.numbers)[:_SHOWN]
            )

    def sha256(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> str:
        for name, tensor in tensors.items():
            if name.startswith("massive") and tensor.shape[0] and not _are_channels(tensor, tensors):
                raise LabelError(
                    "channels outside the state", field=f"{LAYER_BASIS}.{name}", value=tensor.array.tolist()
                )
        return super().sha256(tensors, numbers)


def _are_channels(massive_M: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    width = next(tensor.shape[0] for name, tensor in tensors.items() if name.startswith("mean"))
    channels = massive_M.array.tolist()
    return channels == sorted(set(channels)) and channels[0] >= 0 and channels[-1] < width
