"""`student-trainer label`: the labels of a run on disk before the run begins, so that training waits for no teacher.

In: the config of the run; out: how many there are now, and how many were there before. It asks what the run will ask, in the
same requests, each distinct sequence once; no weight of the student is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from student_trainer.config.run import TrainConfig
from student_trainer.data.batch_plan import by_length
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import bytes_on_disk, load_data, order_of
from student_trainer.errors import ConfigError, RunError
from student_trainer.labels.packing import pack
from student_trainer.labels.source import LabelRequest, LabelUsage
from student_trainer.model.limits import check_data
from student_trainer.model.load import load_outline
from student_trainer.teachers.loss_checks import check_loss
from student_trainer.teachers.session import Teacher, check_sizes, meet_teacher, open_any_feed, teacher_address
from student_trainer.training.run_folder import check_cache, pinned_date, settled_labels
from teacher_wire.core.signals import SignalSpec
from teacher_wire.labels.store import LabelStore, label_keys

_LINES = 10  # progress lines where there is no live display


@dataclass(frozen=True)
class Filled:
    """What `label` leaves.

    Attributes:
        usage: sequences and tokens that were there, and those that the teacher was asked for.
        bytes: of their files.
    """

    usage: LabelUsage
    bytes: int


@dataclass(frozen=True)
class _Job:
    """Requests of one signal over one dataset: the distinct sequences of each micro-batch that none before has had."""

    title: str
    spec: SignalSpec
    data: TokenizedDataset
    groups: list[list[int]]

    def request(self, number: int) -> LabelRequest:
        return pack([self.data[index].example for index in self.groups[number]])

    @property
    def indices(self) -> list[int]:
        return [index for group in self.groups for index in group]


def label(config: TrainConfig, console: Console) -> Filled:
    """Fills the cache with the labels that training and measuring will need.

    Raises:
        ConfigError: labels of this run cannot be known ahead, are not kept, or do not fit into the cache.
        RunError: the disk does not take them.
        TeacherWireError: the teacher cannot give them; those that came are kept.
    """
    settled = settled_labels(config)
    _check(config, settled is not None)
    with teacher_address(config.teacher, console) as address:
        student = load_outline(config.model)
        data, held_out = load_data(config.data, student.tokenizer, console, pinned_date(config))
        check_data(student, config.model.path, data, held_out)
        teacher = meet_teacher(config, address, student, data, held_out, console, settled, only_stores=True)
        if teacher is None:
            raise ConfigError("loss.output is null and there is no data.eval: the run needs no labels")
        check_sizes(config, teacher, data, held_out, order_of(config, data))
        jobs = _jobs(config, teacher, data, held_out)
        needed = sum(bytes_on_disk(teacher.info, job.spec, job.data, job.indices) for job in jobs)
        if needed > config.cache.max_gb * 2**30 * 0.9:
            raise ConfigError(
                f"cache.max_gb={config.cache.max_gb:g}: the labels of this run take about {needed / 2**30:,.2f}; "
                "the first would be deleted while the last are written"
            )
        return _fill(config, teacher, jobs, console)


def _check(config: TrainConfig, settled: bool) -> None:
    """What can be told from the config alone."""
    if config.teacher is None:
        raise ConfigError("label needs a teacher: set the section teacher")
    if not config.cache.labels:
        raise ConfigError("cache.labels=false: there is nothing to fill")
    if config.labels.extra_ids:
        raise ConfigError(
            f"labels.extra_ids={config.labels.extra_ids}: these labels depend on the student as it trains and cannot be "
            "asked for ahead"
        )
    if config.labels.transport == "auto" and not settled:
        raise ConfigError(
            "labels.transport=auto: what it will choose depends on the memory that training leaves free; name a transport"
        )
    if config.labels.transport != "auto":
        check_loss(config.loss, config.labels)
    check_cache(config)


def _jobs(
    config: TrainConfig, teacher: Teacher, data: TokenizedDataset, held_out: TokenizedDataset | None
) -> list[_Job]:
    """Measuring first: its labels are checked in every row, and serve training too where a sequence is in both datasets."""
    seen: set[str] = set()
    order = order_of(config, data)
    jobs = []
    if held_out is not None and teacher.measuring is not None:
        size = config.train.eval_batch_size
        groups = _distinct(teacher, teacher.measuring, held_out, by_length(held_out, size), seen)
        jobs.append(_Job("eval", teacher.measuring, held_out, groups))
    if config.loss.output is not None:
        batches = (order.batch(number) for number in range(order.batches))
        jobs.append(_Job("train", teacher.spec, data, _distinct(teacher, teacher.spec, data, batches, seen)))
    return jobs


def _distinct(
    teacher: Teacher, spec: SignalSpec, data: TokenizedDataset, batches: Iterable[list[int]], seen: set[str]
) -> list[list[int]]:
    """Each batch without the sequences that are in `seen`, where all are put; no empty one."""
    key_of: dict[int, str] = {}
    every_row = replace(spec, check="all")  # whichever rows are checked, the labels are the same
    groups = []
    for group in batches:
        fresh = []
        for index in group:
            if index not in key_of:
                key_of[index] = label_keys(teacher.info.fingerprint, every_row, pack([data[index].example]).batch)[0]
                if key_of[index] not in seen:
                    fresh.append(index)
                    seen.add(key_of[index])
        if fresh:
            groups.append(fresh)
    return groups


def _fill(config: TrainConfig, teacher: Teacher, jobs: list[_Job], console: Console) -> Filled:
    store, usage = teacher.desk.store, LabelUsage()
    assert store is not None
    before = store.stats.read_bytes + store.stats.written_bytes
    shown = _Shown(console, sum(job.data[index].example.token_ids.size for job in jobs for index in job.indices))
    try:
        for job in jobs:
            feed = open_any_feed(config, teacher, job.spec, job.request, 0, len(job.groups), prepare=lambda _: None)
            try:
                for number in range(len(job.groups)):
                    usage.add(feed.take(number).usage)
                    _check_kept(store)
                    shown.update(job.title, usage)
            finally:
                feed.close()
    finally:
        shown.close()
    return Filled(usage, store.stats.read_bytes + store.stats.written_bytes - before)


def _check_kept(store: LabelStore) -> None:
    if not store.writable:
        raise RunError(f"labels are not kept any more in {store.folder}; those that were are there")


class _Shown:
    """A bar over tokens with the rate and the time left; where there is no terminal, a line a tenth."""

    def __init__(self, console: Console, tokens: int) -> None:
        self._console = console
        self._tokens = tokens
        self._began_s = time.monotonic()
        self._lines = 0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("labels", total=tokens, figures="")
        self._progress.start()

    def update(self, title: str, usage: LabelUsage) -> None:
        rate = usage.tokens / max(time.monotonic() - self._began_s, 1e-9)
        figures = f"{title}  {usage.tokens:,} tokens  {rate:,.0f} tok/s  {usage.disk_share:.0%} were there"
        self._progress.update(self._task, completed=usage.tokens, figures=figures)
        reached = usage.tokens * _LINES // self._tokens
        if reached > self._lines and not self._console.is_terminal:
            self._lines = reached
            self._console.print(f"labels {reached / _LINES:.0%}  {figures}", highlight=False)

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.stop()
