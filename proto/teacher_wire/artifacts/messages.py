"""An artifact and the call that asks for it, as frozen dataclasses.

An artifact is a set of named tensors and numbers, named itself by kind and sha256. On the wire its payload is the bytes of its
tensors one after another, in the order of the header.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from teacher_wire.core.info import ArtifactInfo
from teacher_wire.core.tensor import DTYPES, Tensor


@dataclass(frozen=True)
class TensorHeader:
    """Name, wire dtype and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def payload_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class ArtifactHeader:
    """All of an artifact but the bytes of its tensors."""

    kind: str
    sha256: str
    tensors: tuple[TensorHeader, ...]
    numbers: Mapping[str, float]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.payload_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Artifact:
    """Named tensors and numbers with their header; made by `ArtifactKind.make`, which computes the digest."""

    header: ArtifactHeader
    tensors: Mapping[str, Tensor]

    @property
    def numbers(self) -> Mapping[str, float]:
        return self.header.numbers

    @property
    def info(self) -> ArtifactInfo:
        """As Describe tells of it."""
        return ArtifactInfo(self.header.kind, self.header.sha256, self.header.payload_bytes)

    def slice(self, offset: int, size: int) -> bytes:
        """`size` bytes of the payload from `offset` on; fewer at its end."""
        parts, start = [], 0
        for tensor in self.tensors.values():
            stop = start + tensor.payload_bytes
            if start < offset + size and offset < stop:
                data = np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8)
                parts.append(data[max(0, offset - start) : offset + size - start].tobytes())
            start = stop
        return b"".join(parts)


@dataclass(frozen=True)
class ArtifactCall:
    """Which artifact of which teacher is asked for.

    Attributes:
        teacher: name of the teacher.
        fingerprint: of the revision that is asked; the servicer fills in the newest one if the student named none.
        kind, sha256: as the teacher's description lists it.
    """

    teacher: str
    fingerprint: str
    kind: str
    sha256: str
