"""What answers behind the contract, as the server half sees it: a seam between the wire and the teachers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from teacher_wire.artifacts.servicer import ArtifactService
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.generate.messages import GenerateCall, Sample
from teacher_wire.tokenizing.servicer import TokenizeService


class TeacherService(ArtifactService, TokenizeService, Protocol):
    """What stands behind the contract: Serve handles in production, a fake in tests."""

    async def describe(self) -> list[TeacherInfo]:
        """Every teacher of this deployment."""

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        """One teacher; the empty name means the only one. Raises NotFoundError.

        While its weights are being changed there are two descriptions: the one with `fingerprint` is given if it is
        (still) there, else the newest.
        """

    async def score(self, call: ScoreCall) -> TeacherSignals:
        """The labels. Must stop the work it can stop when cancelled."""

    def generate(self, call: GenerateCall) -> AsyncIterator[Sample]:
        """Samples as they finish; closing the iterator stops the work."""
