"""What all sources of labels of a run share: the way to the teacher, the folder of labels, and the count of what they used.

In: a client and a store; out: a `LabelSource` for each signal, whose answers are checked before they are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from student_trainer.config.run import TrainConfig, labels_folder
from student_trainer.labels.lineage import FollowingSource, Lineage
from student_trainer.labels.source import LabelRequest, LabelSource, LabelUsage
from student_trainer.labels.verify import check_signals
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore


@dataclass(frozen=True)
class LabelService:
    """What every source of labels of a run shares.

    Attributes:
        connect: makes a client of the teacher's server.
        store: labels on disk; None if the run keeps none.
        usage: what all sources together have used.
        opened_s: when, in seconds since 1970.
        lineage: revisions of the teacher, if the run publishes them itself: then its sources ask whichever is live.
    """

    connect: Callable[[], TeacherClient]
    store: LabelStore | None
    usage: LabelUsage = field(default_factory=LabelUsage)
    opened_s: float = field(default_factory=time.time)
    lineage: Lineage | None = None

    def source(
        self, info: TeacherInfo, spec: SignalSpec, connect: Callable[[], TeacherClient] | None = None
    ) -> LabelSource:
        """Labels by one signal, every answer checked; `connect` for one that does not make its own client.

        Labels by ids that the student names are not kept: no other student, and no later step of this one, names the same.
        """

        def check(signals: TeacherSignals, asked: LabelRequest) -> None:
            check_signals(signals, spec, asked.batch, asked.names)

        store = None if spec.extra_ids else self.store
        if self.lineage is not None:
            return FollowingSource(self.lineage, connect or self.connect, spec, check, store, self.usage)
        return LabelSource(connect or self.connect, info, spec, check, store, self.usage)

    def forget(self, info: TeacherInfo) -> str:
        """Deletes the labels of a teacher that were used since the run began: some are wrong, and all came the same way.

        Returns:
            A sentence about it, empty without a store.
        """
        if self.store is None:
            return ""
        gone = 0
        for fingerprint in self.lineage.fingerprints if self.lineage is not None else (info.fingerprint,):
            # clocks of disks are coarse
            gone += self.store.prune(teacher=fingerprint, used_since_s=self.opened_s - 1).sequences
        return f"the labels of {gone:,} sequences that this run has used were deleted from {self.store.folder}"


def store_of(config: TrainConfig, on_trouble: Callable[[str], None]) -> LabelStore | None:
    """The labels on this machine's disk, if any teacher's are kept."""
    if not any(map(config.keeps_labels, config.every_teacher)):
        return None
    return LabelStore(labels_folder(config.run.cache_dir), round(config.cache.max_gb * 2**30), on_trouble)
