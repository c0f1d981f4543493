"""Which of the labels and artifacts that a run needs are on disk, seen before step 0; what an offline run lacks is one error.

In: the jobs of a run; out: counts and bytes for every job (`plan`, `train`), and findings. Files are looked at, not read: a torn one is found by
its length, a damaged one when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from student_trainer.config.run import TrainConfig, cache_folder
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import bytes_on_disk
from student_trainer.errors import OfflineError
from student_trainer.findings import Finding, checked
from student_trainer.labels import event_loop
from student_trainer.teachers.artifact_files import artifact_folders
from student_trainer.teachers.session import TeacherSession
from student_trainer.teachers.trial import try_labels
from student_trainer.training.offline.needs import Job, artifacts_of, jobs_of
from teacher_wire.labels.store import LabelStore, label_keys

_SHOWN = 3  # names of samples in an error


@dataclass(frozen=True)
class Held:
    """What of one job is on disk.

    Attributes:
        teacher: what the run calls it.
        title: what the labels are for: `eval`, `train` or `layers`.
        spec: the signals in one word.
        needed, present: distinct sequences.
        present_bytes: of their files.
        missing_bytes: that the files of the others will take, about.
        missing: names of the samples whose labels are not there, in the order of the run.
    """

    teacher: str
    title: str
    spec: str
    needed: int
    present: int
    present_bytes: int
    missing_bytes: int
    missing: tuple[str, ...]


def held_labels(
    config: TrainConfig, sessions: Sequence[TeacherSession], data: TokenizedDataset, held_out: TokenizedDataset | None
) -> list[Held]:
    """What the whole run needs, and what of it is on disk, for every teacher whose labels are kept."""
    kept = [session for session in sessions if session.service.store is not None]
    return [held(job) for job in jobs_of(config, kept, data, held_out)]


def held(job: Job) -> Held:
    """What of one job is on disk."""
    store, info, spec = job.session.service.store, job.session.info, job.spec
    assert store is not None, "labels of a teacher are looked for where they are kept"
    sizes: list[int] = []
    missing: list[str] = []
    lacking = []
    for number, group in enumerate(job.groups):
        asked = job.request(number)
        keys = label_keys(info.fingerprint, spec, asked.batch)
        of_all = label_keys(info.fingerprint, replace(spec, check="all"), asked.batch)
        for key, instead, name, index in zip(keys, of_all, asked.names, group, strict=True):
            size = store.held(key, instead)
            if size:
                sizes.append(size)
            else:
                missing.append(name)
                lacking.append(job.session.reading.view(job.data[index].example))
    return Held(
        job.session.name, job.title, spec.name, len(sizes) + len(missing), len(sizes), sum(sizes),
        bytes_on_disk(info, spec, lacking) if lacking else 0, tuple(missing),
    )  # fmt: skip


def check_offline(
    config: TrainConfig, sessions: Sequence[TeacherSession], data: TokenizedDataset, held_out: TokenizedDataset | None
) -> Iterator[Finding]:
    """Whether everything that the run will need of its offline teachers is on disk; the shortest row is then tried, as an online run does."""
    for session in sessions:
        if session.connection.offline is None or session.service.store is None:
            continue
        found = [held(job) for job in jobs_of(config, [session], data, held_out)]
        lacking = [one for one in found if one.missing]
        if lacking:
            yield Finding.of("teacher.offline", OfflineError(_told(config, session, session.service.store, found)))
            continue
        needed, size = sum(one.needed for one in found), sum(one.present_bytes for one in found)
        yield Finding.good(
            "teacher.offline",
            f"the labels of all {needed:,} sequences of teacher {session.name!r} are on disk ({size / 2**20:,.1f} MB)",
        )
        tried_on = held_out if config.loss.output is None and held_out is not None else data
        trial = partial(_try, session, tried_on)
        yield checked("teacher.offline", trial, f"the labels of the shortest row of teacher {session.name!r} are whole")


def check_artifacts(config: TrainConfig, sessions: Sequence[TeacherSession]) -> Iterator[Finding]:
    """Whether what a run without its teacher needs beside labels is on disk; advice where it is not."""
    folders = artifact_folders(cache_folder(config.run.cache_dir))
    for session in sessions:
        for wanted in artifacts_of(session):
            what = f"the {wanted.kind.replace('_', ' ')} of teacher {session.name!r} ({wanted.bytes / 2**20:,.1f} MiB)"
            there = (folders[wanted.kind] / f"{wanted.sha256}.safetensors").is_file()
            advice = f"{what} is not kept (cache.heads_gb={config.cache.heads_gb:g}): a run with teacher.offline=true will lack it"
            yield Finding.good(
                "cache.heads_gb", f"{what} is {'on disk' if there else 'not kept'}", "" if there else advice
            )


def _try(session: TeacherSession, rows: TokenizedDataset) -> None:
    event_loop.run(try_labels(partial(session.service.source, session.info), session.spec, rows, session.reading))


def _told(config: TrainConfig, session: TeacherSession, store: LabelStore, found: Sequence[Held]) -> str:
    needed, missing = sum(one.needed for one in found), [name for one in found for name in one.missing]
    parts = ", ".join(
        f"{len(one.missing):,} of {one.needed:,} {one.spec} for {one.title}" for one in found if one.missing
    )
    names = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    others = ""
    if len(missing) == needed:
        shelves = [shelf for shelf in store.scan()[0] if shelf.fingerprint == session.info.fingerprint]
        listed = ", ".join(f"{shelf.transport} {shelf.sequences:,}" for shelf in shelves) or "none"
        others = f"; of this teacher there are: {listed}"
    setting = _setting(config, session)
    return (
        f"teacher {session.name!r} is offline, and the labels of {len(missing):,} of {needed:,} sequences of this run are not in "
        f"{store.folder} ({parts}): {names}{others}; with the teacher up, fill them in: student-trainer label CONFIG {setting}=false"
    )


def _setting(config: TrainConfig, session: TeacherSession) -> str:
    """The override that asks a session's teacher again."""
    called = [teacher.called for teacher in config.teachers]
    return f"teachers.{called.index(session.name)}.offline" if session.name in called else "teacher.offline"
