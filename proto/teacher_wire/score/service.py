"""What answers the requests of Score streams, and what all streams of one server share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.score.kept_replies import KeptReplies
from teacher_wire.transport.accounts import Accounts
from teacher_wire.transport.offload import Offload
from teacher_wire.transport.stream_limits import StreamLimits


class ScoreService(Protocol):
    """What a stream asks: a part of `endpoint.service.TeacherService`."""

    async def info(self, teacher: str, fingerprint: str = "") -> TeacherInfo:
        """See TeacherService."""

    async def score(self, call: ScoreCall) -> TeacherSignals:
        """See TeacherService."""


@dataclass
class SharedState:
    """What all streams of one server share.

    Attributes:
        open_streams, open_requests: now, of all tenants.
    """

    service: ScoreService
    limits: StreamLimits
    accounts: Accounts
    kept: KeptReplies
    offload: Offload
    open_streams: int = 0
    open_requests: int = 0
