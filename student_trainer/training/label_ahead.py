"""`student-trainer label`: the labels of a run on disk before the run begins, so that training waits for no teacher.

In: the config of the run; out: how many there are now, and how many were there before. It asks what the run will ask, in the
same requests, each distinct sequence once; no weight of the student is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.markup import escape

from student_trainer.config.run import TrainConfig
from student_trainer.data.inputs import asked_order, bytes_on_disk, load_run_data
from student_trainer.errors import ConfigError, RunError
from student_trainer.findings import Finding, Findings
from student_trainer.labels.source import LabelUsage
from student_trainer.model.load import load_outline
from student_trainer.progress import ProgressBar
from student_trainer.teachers.connect import connections
from student_trainer.teachers.feeds import open_any_feed
from student_trainer.teachers.limits import check_sizes
from student_trainer.teachers.loss_checks import check_loss
from student_trainer.teachers.meeting.described import meet
from student_trainer.teachers.session import open_sessions
from student_trainer.training.checks import check_cache, check_rows
from student_trainer.training.offline.held import check_artifacts
from student_trainer.training.offline.needs import Job, jobs_of
from student_trainer.training.run_folder import pinned_date, settled_labels
from teacher_wire.labels.store import LabelStore

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


def label(config: TrainConfig, console: Console) -> Filled:
    """Fills the cache with the labels that training and measuring will need.

    Raises:
        ConfigError: labels of this run cannot be known ahead, are not kept, or do not fit into the cache.
        RunError: the disk does not take them.
        TeacherWireError: the teacher cannot give them; those that came are kept.
    """
    settled = settled_labels(config)
    findings = Findings(on_advice=lambda told: console.print(f"[yellow]note:[/] {escape(told)}"))
    chosen = [labels for labels in settled or () if labels is not None]
    automatic = [teacher for teacher in config.every_teacher if config.labels_of(teacher).transport == "auto"]
    findings.add(check_labelling(config, len(chosen) >= len(automatic)))
    with connections(config.every_teacher, console, config.run.cache_dir) as reached:
        student = load_outline(config.model)
        load = partial(load_run_data, config, student.tokenizer, console, pinned_date(config))
        read = load()
        findings.add(check_rows(config, student, *read))
        (data, held_out), described = meet(config, reached, student, read, partial(load, tells=True), console)
        if data is not read[0]:
            findings.add(check_rows(config, student, data, held_out))
        sessions = open_sessions(
            config, reached, student, data, held_out, console, findings, settled, only_stores=True, keeps=True,
            described=described,
        )  # fmt: skip
        if not sessions:
            raise ConfigError("loss.output is null and there is no data.eval: the run needs no labels")
        sessions = [session for session in sessions if session.service.store is not None]  # others keep nothing
        findings.add(check_sizes(config, sessions, data, held_out, asked_order(config, data)))
        jobs = jobs_of(config, sessions, data, held_out)
        findings.add([_check_budget(config, jobs)])
        findings.add(check_artifacts(config, sessions))
        return _fill(config, jobs, console)


def check_labelling(config: TrainConfig, settled: bool) -> Iterator[Finding]:
    """What can be told from the config alone.

    Args:
        config: the run.
        settled: whether `labels.transport: auto` was decided by a run before.
    """
    if not config.every_teacher:
        yield Finding.bad("teacher", "label needs a teacher", "set the section teacher", joint=": ")
    if not any(map(config.keeps_labels, config.every_teacher)) and not (config.cache.labels and not config.teachers):
        yield Finding.bad("cache.labels", "cache.labels=false: there is nothing to fill")
    offline = [teacher.called for teacher in config.every_teacher if teacher.offline]
    if config.every_teacher and len(offline) == len(config.every_teacher):
        told = "teacher.offline=true: label asks the teacher"
        yield Finding.bad("teacher.offline", told, "start it, and say teacher.offline=false", joint=": ")
    elif offline:
        told = f"{', '.join(offline)}: offline, and not asked for labels here"
        yield Finding.good("teachers", told, told)
    every = [config.labels_of(teacher) for teacher in config.every_teacher] or [config.labels]
    extra_ids = max(labels.extra_ids for labels in every)
    if extra_ids:
        yield Finding.bad(
            "labels.extra_ids",
            f"labels.extra_ids={extra_ids}: these labels depend on the student as it trains and cannot be "
            "asked for ahead",
        )
    if config.on_policy is not None:
        told = "on_policy: rollouts do not exist yet; the labels of the data's rows alone are filled in"
        yield Finding.good("on_policy", told, told)
    if any(labels.transport == "auto" for labels in every) and not settled:
        yield Finding.bad(
            "labels.transport",
            "labels.transport=auto: what it will choose depends on the memory that training leaves free",
            "name a transport",
        )
    for labels in dict.fromkeys(every):
        if labels.transport != "auto":
            yield from check_loss(config.loss, labels)
    yield from check_cache(config)


def _check_budget(config: TrainConfig, jobs: list[Job]) -> Finding:
    """Whether the labels of the run fit into the label store all together."""
    needed = sum(bytes_on_disk(job.session.info, job.spec, job.views) for job in jobs)
    what = f"cache.max_gb={config.cache.max_gb:g}: the labels of this run take about {needed / 2**30:,.2f}"
    if needed > config.cache.max_gb * 2**30 * 0.9:
        return Finding.bad("cache.max_gb", f"{what}; the first would be deleted while the last are written")
    return Finding.good("cache.max_gb", what)


def _fill(config: TrainConfig, jobs: list[Job], console: Console) -> Filled:
    store, usage = jobs[0].session.service.store, LabelUsage()  # one store of all sessions
    assert store is not None
    before = store.stats.read_bytes + store.stats.written_bytes
    tried = LabelUsage()  # asked about to see that it works, and kept: they are there, but not from before
    for service in {id(job.session.service): job.session.service for job in jobs}.values():
        tried.add(service.usage)
    shown = _Shown(console, sum(view.token_ids.size for job in jobs for view in job.views))
    try:
        for job in jobs:
            feed = open_any_feed(config, job.session, job.spec, job.request, 0, len(job.groups), prepare=lambda _: None)
            try:
                for number in range(len(job.groups)):
                    usage.add(feed.take(number).usage)
                    _check_kept(store)
                    shown.update(job.title, usage)
            finally:
                feed.close()
    finally:
        shown.close()
    usage.add(
        LabelUsage(-tried.teacher_sequences, -tried.teacher_tokens, tried.teacher_sequences, tried.teacher_tokens)
    )
    return Filled(usage, store.stats.read_bytes + store.stats.written_bytes - before)


def _check_kept(store: LabelStore) -> None:
    if not store.writable:
        raise RunError(f"labels are not kept any more in {store.folder}; those that were are there")


class _Shown:
    """A bar over tokens with the rate and the time left; where there is no terminal, a line per tenth."""

    def __init__(self, console: Console, tokens: int) -> None:
        self._console = console
        self._tokens = tokens
        self._began_s = time.monotonic()
        self._lines = 0
        self._bar = ProgressBar(console, "labels", tokens, in_units=False)

    def update(self, title: str, usage: LabelUsage) -> None:
        rate = usage.tokens / max(time.monotonic() - self._began_s, 1e-9)
        figures = f"{title}  {usage.tokens:,} tokens  {rate:,.0f} tok/s  {usage.disk_share:.0%} were there"
        self._bar.update(usage.tokens, figures=figures)
        reached = usage.tokens * _LINES // self._tokens
        if reached > self._lines and not self._console.is_terminal:
            self._lines = reached
            self._console.print(f"labels {reached / _LINES:.0%}  {figures}", highlight=False)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
