"""How surprised the teachers are by each row's own answer, from the labels that the run will learn from anyway.

In: sessions and rows; out: the negative log-likelihood per token. Labels that are on disk are read there, the one number per row of theirs that is
needed and no more; the others are asked for, checked and kept, as the run would a moment later.

Axes: N rows of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console

from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.labels.source import LabelRequest
from student_trainer.progress import ProgressBar
from student_trainer.teachers.feeds import open_any_feed
from student_trainer.teachers.session import TeacherSession
from teacher_wire.core.checked_rows import checked_rows
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.labels.store import LabelStore, label_keys

_ALL, _SAMPLE = (
    "label_logp_N",
    "label_logp_C",
)  # log-probability of the token that a row describes: of every row, or of those that are checked


@dataclass(frozen=True)
class Likelihood:
    """What the teachers think of the data's own answers.

    Attributes:
        nll_N: float64, nats per token, the mean over the teachers that are asked about a row by their weights; NaN where none is.
        read: tokens whose log-probability was read: all of the answers, or of `hidden` labels those that are checked (`labels.check`).
        of: tokens of the answers.
    """

    nll_N: np.ndarray
    read: int
    of: int


def likelihood_of(
    config: TrainConfig, sessions: Sequence[TeacherSession], data: TokenizedDataset, console: Console
) -> Likelihood:
    """Reads the likelihood of every row.

    Raises:
        LabelError, TeacherWireError, OfflineError: labels that are not on disk cannot be had.
    """
    sums_N, weights_N = np.zeros(len(data)), np.zeros(len(data))
    read = of = 0
    for session in sessions:
        with ProgressBar(console, f"difficulty by {session.name}", len(data)) as bar:
            found = _Reader(config, session, data).read(bar)
        for index, logp_C in found.items():
            sums_N[index] -= session.weight * float(logp_C.mean(dtype=np.float64))
            weights_N[index] += session.weight
            read += len(logp_C)
            of += int(session.reading.view(data[index].example).loss_mask.sum())
    with np.errstate(invalid="ignore"):
        return Likelihood(np.where(weights_N > 0, sums_N / weights_N, np.nan), read, of)


class _Reader:
    """Reads one teacher's likelihood of the rows that it is asked about."""

    def __init__(self, config: TrainConfig, session: TeacherSession, data: TokenizedDataset) -> None:
        self._config = config
        self._session = session
        self._data = data

    def read(self, bar: ProgressBar) -> dict[int, np.ndarray]:
        """float32 [rows read] by index."""
        store, found, missing = self._session.service.store, {}, []
        asked = [row.index for row in self._data if self._session.responsible(row.example)]
        for index in asked:
            kept = None if store is None else self._on_disk(store, self._request([index]))
            if kept is None:
                missing.append(index)
            else:
                found[index] = kept
                bar.update(len(found))
        size = self._config.train.batch_size
        groups = [missing[start : start + size] for start in range(0, len(missing), size)]
        feed = open_any_feed(
            self._config, self._session, self._session.spec, lambda number: self._request(groups[number]),
            0, len(groups), prepare=lambda signals: signals,
        )  # fmt: skip
        try:
            for number, group in enumerate(groups):
                signals: TeacherSignals = feed.take(number).ready
                parts = signals.cut(self._request(group).batch)
                for index, part in zip(group, parts, strict=True):
                    name = _ALL if _ALL in part else _SAMPLE
                    found[index] = part[name].array
                bar.update(len(found))
        finally:
            feed.close()
        return found

    def _request(self, group: list[int]) -> LabelRequest:
        asked = self._session.request([self._data[index].example for index in group])
        assert asked is not None, "a teacher is asked about all rows of its groups"
        return asked

    def _on_disk(self, store: LabelStore, asked: LabelRequest) -> np.ndarray | None:
        """The log-probabilities of one row's tokens; of labels that have more of them than are asked for, those that are asked for."""
        info, spec = self._session.info, self._session.spec
        (key,) = label_keys(info.fingerprint, spec, asked.batch)
        (of_all,) = label_keys(info.fingerprint, replace(spec, check="all"), asked.batch)
        for one in dict.fromkeys((key, of_all)):
            kept = store.figures(one, (_ALL, _SAMPLE))
            if not kept:
                continue
            if spec.check != "all" and _ALL in kept:
                return np.asarray(kept[_ALL][checked_rows(asked.batch)])
            return kept.get(_ALL, kept.get(_SAMPLE))
        return None
