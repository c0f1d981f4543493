"""A teacher's client that asks nobody: it describes the teacher from its record, and refuses whatever only the teacher could answer.

In: a teacher section and a cache folder; out: answers from disk, or an `OfflineError` that says what is missing and which command fills it.
Labels and artifacts that are on disk are found before a client is asked (`labels/source.py`, `teachers/artifact_cache.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import NoReturn

from student_trainer.config.teachers import TeacherConfig
from student_trainer.errors import OfflineError
from student_trainer.teachers.offline.record import find_record
from teacher_wire.artifacts.messages import Artifact
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import Cache, Latency
from teacher_wire.core.info import ArtifactInfo, TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.core.status import ServerStatus
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate.messages import PromptBatch, Sample, SamplingSpec
from teacher_wire.publish.messages import Publication
from teacher_wire.tokenizing.messages import TextRow, TokenizedRow

FIX = "with the teacher up, student-trainer label CONFIG and offline=false fills it in"


class OfflineTeacher(TeacherClient):
    """See module; it opens no connection.

    Args:
        settings: of the teacher.
        cache_dir: where its record is.
    """

    def __init__(self, settings: TeacherConfig, cache_dir: Path) -> None:
        self.address = "offline"
        self._settings = settings
        self._cache_dir = cache_dir

    async def close(self) -> None:
        """There is nothing to close."""

    async def describe(self, timeout_s: float = 10.0, wait_for_s: float = 0.0) -> list[TeacherInfo]:
        """The teacher as it was last met.

        Raises:
            OfflineError: it is not known, or not the only one.
        """
        record = await asyncio.to_thread(find_record, self._cache_dir, self._settings)
        return [record.info]

    async def score(
        self,
        info: TeacherInfo,
        spec: SignalSpec,
        batch: TokenBatch,
        *,
        timeout_s: float = 0.0,
        cache: Cache = "shared",
        latency: Latency = "bulk",
    ) -> TeacherSignals:
        self._refuse(info, f"{spec.name} labels of {batch.sequences:,} sequences ({batch.tokens:,} tokens) are")

    async def artifact(
        self,
        info: TeacherInfo,
        wanted: ArtifactInfo,
        progress: Callable[[int, int], None] | None = None,
        *,
        timeout_s: float = 0.0,
    ) -> Artifact:
        what = wanted.kind.replace("_", " ")
        self._refuse(info, f"its {what} ({wanted.sha256[:16]}, {wanted.bytes / 2**20:,.1f} MiB), whole, is")

    async def tokenize(
        self,
        info: TeacherInfo,
        rows: Sequence[TextRow],
        progress: Callable[[int, int], None] | None = None,
        *,
        timeout_s: float = 0.0,
    ) -> list[TokenizedRow]:
        self._refuse(info, f"{len(rows):,} texts in its own tokens are")

    async def server_status(self, timeout_s: float = 10.0) -> ServerStatus:
        self._refuse_call("has no status")

    async def publish(
        self, publication: Publication, sources: Sequence[Path], progress: Callable[[str, int, int], None] | None = None
    ) -> str:
        self._refuse_call("takes no revision")

    def generate(
        self, info: TeacherInfo, spec: SamplingSpec, prompts: PromptBatch, *, timeout_s: float = 0.0
    ) -> AsyncGenerator[Sample, None]:
        self._refuse_call("writes no text")

    def _refuse(self, info: TeacherInfo, what: str) -> NoReturn:
        raise OfflineError(
            f"teacher {info.name!r} is offline, and {what} not in {self._cache_dir}: missing, or damaged; {FIX}"
        )

    def _refuse_call(self, what: str) -> NoReturn:
        raise OfflineError(
            f"teacher {self._settings.called or 'of this run'!r} {what} while it is offline; set offline=false"
        )
