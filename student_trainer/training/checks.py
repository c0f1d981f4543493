"""Everything that can be wrong with a run before step 0, a `Finding` per check, in the order in which `train` makes them.

In: a config, then what has been loaded for it; out: findings. `train` and `label` stop at the first bad one; `all_findings` makes every
check that it can, loads no weights and makes no run folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from student_trainer.config.run import TrainConfig
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import asked_order, bytes_on_disk, load_run_data, order_of
from student_trainer.data.routing import unclaimed
from student_trainer.errors import RunError
from student_trainer.files import LOCK_NAME, free_bytes
from student_trainer.findings import Finding, Findings, checked
from student_trainer.model.limits import check_data
from student_trainer.model.load import Outline, load_outline
from student_trainer.model.precision import check_trained_in
from student_trainer.model.quantized.weights import check_quantizable
from student_trainer.teachers.connect import connections
from student_trainer.teachers.limits import check_sizes
from student_trainer.teachers.loss_checks import check_anneal, check_context, check_loss, check_policy_gradient
from student_trainer.teachers.meeting.described import meet
from student_trainer.teachers.session import TeacherSession, open_sessions
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.offline.held import check_offline
from student_trainer.training.on_policy.checks import check_on_policy, check_rollouts
from student_trainer.training.run_folder import (
    CONFIG_NAME,
    FINAL_NAME,
    IDENTITY_NAME,
    LOG_NAME,
    RESULT_NAME,
    pinned_date,
    read_identity,
    settled_labels,
)
from student_trainer.training.tracking.hub import check_hub
from student_trainer.training.tracking.trackers import make_trackers
from student_trainer.training.trainer import check_single_process

_SHOWN_TAGS = 8  # of those that no teacher has

Look = Callable[[Findings, Outline, TokenizedDataset, TokenizedDataset | None, Sequence[TeacherSession]], None]


def all_findings(
    config: TrainConfig, console: Console, *, resume: bool = False, look: Look | None = None
) -> list[Finding]:
    """Every finding about a run, good and bad, in the order of the checks. The teachers are asked; embedded ones are started.

    What needs a thing that is missing is not checked: the sizes of requests without a teacher that answers, for one. The disk's room is
    not looked at, which needs the student's weights.

    Args:
        config: the run.
        console: told of the data and the teachers.
        resume: whether it is to go on from a checkpoint.
        look: called with the student, the rows and the teachers while these can be asked more; adds findings of its own.
    """
    findings = Findings(stops=False)
    findings.add(check_settings(config))
    findings.attempt("train.report_to", lambda: make_trackers(config, console.print), "trackers work")
    findings.add(check_folder(config, resume))
    outline = findings.attempt("model.path", lambda: load_outline(config.model), f"{config.model.path} can be read")
    if outline is None:
        return findings.all
    loaded = findings.attempt(
        "data",
        lambda: load_run_data(config, outline.tokenizer, console, pinned_date(config) if resume else None),
        "the rows can be learned from",
    )
    if loaded is None:
        return findings.all
    data, held_out = loaded
    findings.add(check_rows(config, outline, data, held_out))
    with contextlib.ExitStack() as stack:
        reached = findings.attempt(
            "teacher",
            lambda: stack.enter_context(connections(config.every_teacher, console, config.run.cache_dir)),
            "what connecting to the teachers needs is there",
        )
        if reached:
            settled = findings.attempt("run.output_dir", lambda: (settled_labels(config),), "nothing hinders a start")
            load = partial(load_run_data, config, outline.tokenizer, console, pinned_date(config) if resume else None)
            met = findings.attempt(
                "data",
                lambda: meet(config, reached, outline, loaded, partial(load, tells=True), console),
                "the teachers can be asked about the rows",
            )
            if met is None:
                return findings.all
            (data, held_out), described = met
            if data is not loaded[0]:
                findings.add(check_rows(config, outline, data, held_out))
            sessions = open_sessions(
                config, reached, outline, data, held_out, console, findings, settled[0] if settled and resume else None,
                only_stores=True, described=described,
            )  # fmt: skip
            findings.add(check_offline(config, sessions, data, held_out))
            findings.add(check_requests(config, sessions, data, held_out))
            findings.add(check_rollouts(config, outline.positions, data, order_of(config, data), sessions))
            if look is not None:
                look(findings, outline, data, held_out, sessions)
    return findings.all


def check_settings(config: TrainConfig) -> Iterator[Finding]:
    """What can be told from the config and the environment alone."""
    yield checked("model.dtype", lambda: check_trained_in(config.model), f"{config.model.dtype} can be trained in")
    if config.model.quantize is not None:
        yield checked("model.quantize", lambda: check_quantizable(config.model), "bitsandbytes is installed")
    every = [config.labels_of(teacher) for teacher in config.every_teacher] or [config.labels]
    for labels in dict.fromkeys(every):
        if labels.transport != "auto":
            yield from check_loss(config.loss, labels)
    yield from check_on_policy(config)
    yield from check_policy_gradient(config.loss, every[0], config.on_policy)
    for teacher in config.every_teacher:
        yield from check_context(config.loss, teacher.context)
    if config.train.push_to_hub:
        yield checked(
            "train.push_to_hub", lambda: check_hub(config), f"the hub knows us, and takes {config.train.hub_id}"
        )
    yield checked("run", check_single_process, "the environment speaks of one process")


def check_rows(
    config: TrainConfig, student: Outline, data: TokenizedDataset, held_out: TokenizedDataset | None
) -> Iterator[Finding]:
    """Whether the student can read the rows."""
    yield checked(
        "data",
        lambda: check_data(student, config.model.path, data, held_out),
        "the model knows all ids and positions of the rows",
    )
    yield from check_anneal(config.loss, order_of(config, data).steps)


def check_requests(
    config: TrainConfig,
    sessions: Sequence[TeacherSession],
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    order: RunOrder | None = None,
) -> Iterator[Finding]:
    """Whether the teachers take every request of the run, with advice if the labels of one epoch do not fit into the label store.

    Args:
        order: of the run; None where it is not known yet, for the one in which labels are asked for ahead.
    """
    yield from check_sizes(config, sessions, data, held_out, order or asked_order(config, data))
    yield from check_taught(config, sessions, data)
    kept = [session for session in sessions if session.service.store is not None]
    if not kept or config.loss.output is None or config.labels.extra_ids:
        return
    needed_gb = sum(bytes_on_disk(session.info, session.spec, session.views(data)) for session in kept) / 2**30
    advice = (
        f"the labels of one epoch take about {needed_gb:,.1f} GB, above cache.max_gb={config.cache.max_gb:g}: "
        "later epochs and runs will ask the teacher again"
    )
    yield Finding.good(
        "cache.max_gb",
        f"the labels of one epoch take about {needed_gb:,.1f} GB of {config.cache.max_gb:g}",
        advice if needed_gb > config.cache.max_gb else "",
    )


def check_taught(config: TrainConfig, sessions: Sequence[TeacherSession], data: TokenizedDataset) -> Iterator[Finding]:
    """Whether every row has a teacher, where teachers are asked about some rows alone; not told while one of them has no session."""
    if config.loss.output is None or len(sessions) < max(1, len(config.every_teacher)):
        return
    if all(session.reading.routing is None and session.bridge is None for session in sessions):
        return
    yield from _check_tags(sessions, data)
    alone = [row.example.key for row in data if not any(session.responsible(row.example) for session in sessions)]
    if not alone:
        yield Finding.good("teachers", f"each of the {len(data):,} rows has a teacher")
        return
    told = f"{len(alone):,} of {len(data):,} rows have no teacher, the first {alone[0]}"
    if config.loss.sft_weight == 0:
        fix = "give loss.sft_weight a value above 0, by which they are learned alone, or take them out"
        yield Finding.bad("loss.sft_weight", f"{told}, and loss.sft_weight=0 leaves them nothing to learn", fix)
    else:
        yield Finding.good("teachers", told, f"{told}: they learn from the data's own tokens alone (loss.sft_weight)")


def _check_tags(sessions: Sequence[TeacherSession], data: TokenizedDataset) -> Iterator[Finding]:
    """Says which tags of the rows no teacher has: a misspelt one would give its rows to others without a word."""
    routing = sessions[0].reading.routing
    if routing is None:
        return
    found = unclaimed(routing, [row.example.tags for row in data])
    if found:
        named = ", ".join(f"{tag!r} ({count:,} rows)" for tag, count in list(found.items())[:_SHOWN_TAGS])
        told = f"no teacher has the tags {named}{', ...' if len(found) > _SHOWN_TAGS else ''} of data.train"
        yield Finding.good("teachers", told, f"{told}; if one of them is meant, add it to teachers[].tags")


def check_folder(config: TrainConfig, resume: bool) -> Iterator[Finding]:
    """Whether `run.output_dir` can hold this run, and whether there can be a cache folder; makes neither."""
    folder = config.run.output_dir
    setting = "run.output_dir"
    if folder.exists() and not folder.is_dir():
        yield Finding.bad(setting, f"{setting} {folder}: is a file")
        return
    yield _check_writable(setting, folder)
    yield from check_cache(config)
    held = _held(folder)
    if resume and IDENTITY_NAME in held:
        yield checked(setting, lambda: read_identity(folder / IDENTITY_NAME), f"{folder} holds a run to go on with")
    elif not resume and IDENTITY_NAME in held:
        fix = "go on with --resume, or choose another folder"
        yield Finding.bad(setting, f"{setting} {folder}: holds a run already", fix)
    elif not resume and held:
        what = f"{setting} {folder}: is not empty (it holds {sorted(held)[0]})"
        yield Finding.bad(setting, what, "choose another folder")
    elif resume and (lost := held & {LOG_NAME, RESULT_NAME, FINAL_NAME, CONFIG_NAME}):
        what = f"{folder}: holds {sorted(lost)[0]} and no {IDENTITY_NAME}, so which run this was cannot be told"
        yield Finding.bad(setting, what, "choose another folder", kind=RunError)
    else:
        yield Finding.good(setting, f"{folder} is free for this run")


def _held(folder: Path) -> set[str]:
    """Names in a folder, without those of no importance."""
    return {path.name for path in folder.iterdir()} - {LOCK_NAME} if folder.is_dir() else set()


def check_room(
    folder: Path, checkpoint_bytes: int, final_bytes: int, keep: int, *, keeps_best: bool = False
) -> Iterator[Finding]:
    """Whether the disk has room for the checkpoints that are there at one time, and the model.

    Args:
        folder: of the run.
        checkpoint_bytes: of one checkpoint; 0 if there will be none.
        final_bytes: of the model alone.
        keep: checkpoints kept; while one is written there is one more.
        keeps_best: whether the one that was measured best is kept beside these.
    """
    there = len(list(folder.glob(f"checkpoint-*/{checkpoint.MARKER}"))) if folder.is_dir() else 0
    at_a_time = keep + 1 + keeps_best if checkpoint_bytes else 0
    needed = max(0, at_a_time - there) * checkpoint_bytes + final_bytes
    try:
        free = free_bytes(folder)
    except OSError:  # a disk that does not say how full it is
        return
    if needed > free:
        what = (
            f"run.output_dir {folder}: {_amount(free)} are free, and {at_a_time} checkpoints at a "
            f"time with the model take about {_amount(needed)}"
        )
        fix = f"make room, lower train.keep_checkpoints={keep}, or choose another disk"
        yield Finding.bad("run.output_dir", what, fix)
    else:
        yield Finding.good("run.output_dir", f"about {_amount(needed)} of {_amount(free)} free will be taken")


def _amount(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def check_cache(config: TrainConfig) -> Iterator[Finding]:
    """Whether there can be a cache folder; one that is there and read-only is read."""
    folder = config.run.cache_dir
    if folder.is_dir():
        yield Finding.good("run.cache_dir", f"{folder} is there")
    else:
        yield _check_writable("run.cache_dir", folder)


def _check_writable(setting: str, folder: Path) -> Finding:
    """Whether a folder can be made or written to; it is not made."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "read-only" if nearest.is_dir() else "a file"
        return Finding.bad(setting, f"{setting} {folder}: cannot be written ({nearest} is {what})")
    return Finding.good(setting, f"{folder} can be written")
