"""The artifacts of one replica: read from the backend once, then given away in slices.

In: an ArtifactCall; out: a header or a slice of bytes. Reading and hashing run beside the forward passes, never between them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from teacher_server.backends.base import Backend
from teacher_wire.artifacts.messages import Artifact, ArtifactCall, ArtifactHeader
from teacher_wire.core.errors import CapabilityError
from teacher_wire.core.info import TeacherInfo


class ReplicaArtifacts:
    """What a replica gives away beside labels.

    Args:
        backend: makes them.
        info: of the teacher; lists them.
        made: those that the backend does not make.
    """

    def __init__(self, backend: Backend, info: TeacherInfo, made: Sequence[Artifact] = ()) -> None:
        self._backend = backend
        self._info = info
        self._loaded = {artifact.info: artifact for artifact in made}
        self._once = asyncio.Lock()

    async def header(self, call: ArtifactCall) -> ArtifactHeader:
        """All of an artifact but its bytes.

        Raises:
            CapabilityError: this replica holds another revision (`field` is "fingerprint"), or the teacher gives no such
                artifact away.
        """
        return (await self._artifact(call)).header

    async def slice(self, call: ArtifactCall, offset: int, size: int) -> bytes:
        """Bytes of its payload; raises as `header`."""
        return (await self._artifact(call)).slice(offset, size)

    async def _artifact(self, call: ArtifactCall) -> Artifact:
        info = self._info
        if call.fingerprint and call.fingerprint != info.fingerprint:
            raise CapabilityError(
                "no artifacts of that teacher here", field="fingerprint", value=info.fingerprint, limit=call.fingerprint
            )
        for wanted in info.artifacts:
            if (wanted.kind, wanted.sha256) == (call.kind, call.sha256):
                async with self._once:
                    if wanted not in self._loaded:
                        self._loaded[wanted] = await asyncio.to_thread(self._backend.artifact, wanted)
                return self._loaded[wanted]
        raise CapabilityError(
            f"teacher {info.name!r} gives no such artifact away", field="artifact",
            value=f"{call.kind} {call.sha256}", limit="|".join(f"{a.kind} {a.sha256}" for a in info.artifacts) or "nothing",
        )  # fmt: skip
