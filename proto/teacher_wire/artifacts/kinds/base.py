"""What one kind of artifact is: the rule of its digest, and what of a header makes no sense for a teacher."""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from teacher_wire.artifacts.messages import Artifact, ArtifactHeader, TensorHeader
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.tensor import Tensor


class ArtifactKind(ABC):
    """One kind of artifact; stateless.

    Attributes:
        name: as the wire calls it.
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self, header: ArtifactHeader, info: TeacherInfo) -> None:
        """Refuses a header that cannot be one of this teacher's, before any of its bytes is received.

        Raises:
            LabelError: naming the tensor or number, its value and what it may be.
        """

    def sha256(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> str:
        """Digest of the content, by the general rule of the protocol (proto: artifact)."""
        digest = hashlib.sha256(f"{self.name}\n".encode())
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype}{list(tensor.shape)}\n".encode())
            digest.update(np.ascontiguousarray(tensor.array).data.cast("B"))
        for name in sorted(numbers):
            digest.update(f"{name}\n".encode() + struct.pack("<d", numbers[name]))
        return digest.hexdigest()

    def make(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> Artifact:
        """An artifact of this content, its digest computed (all bytes are hashed)."""
        headers = tuple(TensorHeader(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        digest = self.sha256(tensors, numbers)
        return Artifact(ArtifactHeader(self.name, digest, headers, dict(numbers)), dict(tensors))
