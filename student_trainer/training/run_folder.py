"""The folder of a run: resolved config, identity, log, result; made late, taken up again only by the same run.

In: a config and what it is to learn from; out: the checkpoint to start at. Everything is written whole or not at all, by one process
at a time (`files.FolderLock`). Digests decide what may be taken up, not paths. What we have not written we neither read nor delete.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from student_trainer.config.losses import as_used
from student_trainer.config.run import TrainConfig, dump_config
from student_trainer.config.teachers import LabelConfig, OneOfTeachersConfig
from student_trainer.errors import RunError
from student_trainer.evaluation import layer_similarity
from student_trainer.files import LOCK_NAME, disk_trouble_named, read_object, write_whole
from student_trainer.findings import Finding, Findings
from student_trainer.labels.joined.ledger import TEACHERS_NAME
from student_trainer.labels.lineage import REVISIONS_NAME
from student_trainer.labels.source import LabelUsage
from student_trainer.rollout.ledger import LEDGER_NAME
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.curriculum.ranking import FILE_NAME as CURRICULUM_NAME
from student_trainer.training.identity import (
    TEACHERS_FIX,
    fingerprints_of,
    is_of_teachers,
    other_teachers,
    with_teachers_of,
)
from student_trainer.training.tracking.own import TRACKERS_NAME

LOG_NAME = "train_log.jsonl"
CONFIG_NAME = "config.yaml"
IDENTITY_NAME = "run.json"
RESULT_NAME = "result.json"
FINAL_NAME = "final"
LAYERS_NAME = layer_similarity.FILE_NAME
# Settings that may change between a run and its resumption: they decide where and how fast, not what; or, as the rows and the weights
# that a run begins with, what they decide is in the identity as a digest.
_FREE = ("run.output_dir", "run.cache_dir", "teacher", "feed", "cache", "generate", "data", "model.path", "model.revision", "model.threads",
         "model.compiled", "model.graphs", "train.report_to", "train.log_steps", "train.save_steps", "train.keep_checkpoints",
         "train.eval_batch_size", "train.nonfinite", "train.max_skipped", "train.best_metric", "train.packing", "train.project",
         "train.push_to_hub", "train.hub_id", "train.hub_private",
         "labels.check", "on_policy.batch", "on_policy.device", "on_policy.publish.on_failure", "when_missing")  # fmt: skip
# Digests of an identity, what they are of, and the section of the settings that decides them.
_DIGESTS = (
    ("data", "the training rows", "data"),
    ("held_out", "the held-out rows", "data"),
    ("student", "the student's weights", "model"),
    (
        "curriculum",
        "the order of the rows, or the pace at which harder ones are let in,",
        "curriculum",
    ),  # only in runs that have one
    ("basis", "the principal components of the teacher's layers", "loss"),  # only in runs that learn from it
)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        output_dir: its folder; the model is in `final/`.
        steps: optimizer steps made in all.
        metrics: the last held-out figures, empty without held-out data; NaN where one was no number.
        curve: log entries, in order; NaN where the file has null.
        usage: where the labels came from; None without a teacher.
        label_bytes: of these labels in the label store; None without one.
    """

    output_dir: Path
    steps: int
    metrics: dict[str, float]
    curve: list[dict[str, float]]
    usage: LabelUsage | None = None
    label_bytes: int | None = None


class AlreadyFinished(Exception):  # noqa: N818
    """The run that is to be resumed has come to its end already."""


def settled_labels(config: TrainConfig) -> list[LabelConfig | None] | None:
    """What `labels.transport: auto` chose for each teacher of `config` when this run was started: a link that is slower today must not change
    it. None for a teacher whose section says it itself, or that the run did not have then; None for all if nothing was chosen.

    Raises:
        RunError: run.json cannot be read.
    """
    file = config.run.output_dir / IDENTITY_NAME
    every = config.every_teacher
    automatic = [config.labels_of(teacher).transport == "auto" for teacher in every]
    if not any(automatic or [config.labels.transport == "auto"]) or not file.is_file():
        return None
    before = read_identity(file)
    chosen = [LabelConfig.model_validate_json(line) for line in before["labels"].splitlines()]
    if "teachers" not in before and len(every) < 2:
        return [*chosen]
    by_name = dict(zip(fingerprints_of(before), chosen, strict=False))
    return [by_name.get(teacher.called) if is_auto else None for teacher, is_auto in zip(every, automatic, strict=True)]


def read_identity(file: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        RunError: it cannot be read.
    """
    try:
        found = read_object(file)
        if not isinstance(found["settings"], dict) or not all(isinstance(found[n], str) for n in ("teacher", "labels")):
            raise ValueError("its entries are not those of a run")
    except (OSError, ValueError, KeyError) as error:
        missing = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(
            f"{file} is damaged: {missing}; without it the run cannot be taken up: put it back, or start another run in "
            "another folder"
        ) from error
    return found


def pinned_date(config: TrainConfig) -> datetime.date | None:
    """The day that this run's chat template printed when it was started; a resumed run goes on with it.

    Raises:
        RunError: run.json cannot be read.
    """
    file = config.run.output_dir / IDENTITY_NAME
    if not file.is_file():
        return None
    day = read_identity(file).get("date", "")
    try:
        return datetime.date.fromisoformat(day) if day else None
    except (TypeError, ValueError) as error:
        raise RunError(f"{file} is damaged: its date {day!r} is none") from error


def open_folder(
    config: TrainConfig,
    learned_from: dict[str, str],
    resume: bool | Path,
    console: Console,
    steps: int,
    *,
    allow_other_teachers: bool = False,
) -> Path | None:
    """Makes the run folder, or takes up the one that is there, which must be locked; the checkpoint to start from.

    Args:
        config: the run.
        learned_from: digests under `teacher`, `data`, `held_out` and `student`, which must not change over a run; the `labels` it was
            started with; and how it is `computed`, which may change and is told of, since other kernels round otherwise.
        resume: whether a run that is there may be taken up; or by which of its checkpoints.
        console: told what was found.
        steps: of the whole run.
        allow_other_teachers: whether it may be taken up with other teachers than it was started with; it is told of, and recorded under
            `history` in run.json.

    Raises:
        RunError: it was started with other settings, rows, weights or another teacher; its files are damaged; or somebody else's
            folder has the name of a checkpoint to come.
        AlreadyFinished: there is nothing left to do.
    """
    folder = config.run.output_dir
    identity = identity_of(config, learned_from)
    identity_file = folder / IDENTITY_NAME
    start = None

    def note(said: str) -> None:
        console.print(f"[yellow]note:[/] {escape(said)}")

    if resume and identity_file.is_file():
        before = read_identity(identity_file)
        others = other_teachers(before, identity)
        if others and allow_other_teachers:
            Findings().add(check_identity(with_teachers_of(before, identity), identity, config))
        else:
            Findings().add(check_identity(before, identity, config))
        if is_finished(folder, note):
            raise AlreadyFinished
        checkpoint.discard_unfinished(folder)
        start = (
            checkpoint.chosen(folder, resume, note)
            if isinstance(resume, Path)
            else checkpoint.newest_whole(folder, note)
        )
        identity |= {"history": before["history"]} if "history" in before else {}
        if others:
            begun_at = checkpoint.step_of(start) if start else 0
            note(f"from step {begun_at} on with other teachers: {'; '.join(others)}")
            identity["history"] = [*before.get("history", []), {"step": begun_at, "changed": others}]
        _cut_log(folder / LOG_NAME, checkpoint.step_of(start) if start else 0, note)
        console.print(
            f"resuming at step {checkpoint.step_of(start)}" if start else "no complete checkpoint: starting at step 0"
        )
        computed = learned_from["computed"]
        if before.get("computed", computed) != computed:
            console.print(
                f"[yellow]note:[/] computed until here by {escape(before['computed'])}, from here by "
                f"{escape(computed)}: the same but for rounding"
            )
    every, begun = config.train.save_steps, checkpoint.step_of(start) if start else 0
    foreign = checkpoint.in_the_way(
        folder, lambda step: bool(every) and begun < step <= steps and (step % every == 0 or step == steps)
    )
    if foreign is not None:
        raise RunError(
            f"{foreign}: has the name of a checkpoint to come and was not written by this run; move it or rename it"
        )
    with disk_trouble_named(f"run.output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(identity_file, json.dumps(identity, indent=1))  # first: without it a folder is nobody's
        write_whole(folder / CONFIG_NAME, dump_config(config))
    return start


def leave_no_trace(folder: Path) -> None:
    """Takes away what `open_folder` has made, for a run that has come to nothing: the same folder may be tried again."""
    kept = (CONFIG_NAME, IDENTITY_NAME, LOCK_NAME, LAYERS_NAME, LEDGER_NAME, REVISIONS_NAME, TEACHERS_NAME)
    for name in (*kept, CURRICULUM_NAME, TRACKERS_NAME):
        (folder / name).unlink(missing_ok=True)
    checkpoint.discard_unfinished(folder)
    with contextlib.suppress(OSError):  # others' files stay, and with them the folder
        folder.rmdir()


def is_finished(folder: Path, note: Callable[[str], None] = lambda _: None) -> bool:
    """Whether a run in a folder has come to its end; a result that cannot be read is told of, and made again."""
    file = folder / RESULT_NAME
    if not file.is_file():
        return False
    try:
        found = read_object(file)
        return isinstance(found["steps"], int) and isinstance(found["metrics"], dict)
    except (OSError, ValueError, KeyError) as error:
        note(f"{RESULT_NAME} is damaged ({error}): the end of the run is made again")
        return False


def identity_of(config: TrainConfig, learned_from: dict[str, str]) -> dict[str, Any]:
    """What run.json says of a run that is begun now."""
    return {"settings": decisive(config), **learned_from}


def decisive(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted name."""
    flat: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        if _is_free(name):
            return
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}" if name else key)
        else:
            flat[name] = node

    tree = config.model_dump(mode="json")
    if config.teachers:
        tree["teachers"] = {teacher.called: _of_teacher(config, teacher) for teacher in config.teachers}
    else:  # as runs had it that knew of one teacher
        del tree["teachers"], tree["combine"]
    walk(tree, "")
    return as_used(flat)


def _of_teacher(config: TrainConfig, teacher: OneOfTeachersConfig) -> dict[str, Any]:
    """What of a teacher's section decides what a run computes."""
    kept = teacher.model_dump(mode="json", include={"weight", "tags", "context"})
    return kept | {"labels": config.labels_of(teacher).model_dump(mode="json", exclude={"check"})}


def _is_free(name: str) -> bool:
    return name in _FREE or name.split(".")[0] in _FREE


def check_identity(before: dict[str, Any], now: dict[str, Any], config: TrainConfig) -> Iterator[Finding]:
    """Whether a run goes on with the settings, rows, weights and teacher that it was started with.

    Args:
        before: the identity in the folder.
        now: the identity of the run that wants to go on.
        config: the run, to say which of its settings decide what has changed.
    """
    setting = "run.output_dir"
    before = before | {"settings": as_used(before["settings"])}
    keys = [
        key for key in sorted(before["settings"].keys() | now["settings"].keys()) if not _is_free(key)
    ]  # some became so
    changed = [key for key in keys if before["settings"].get(key) != now["settings"].get(key)]
    if changed:
        told = ", ".join(
            f"{key}: {before['settings'].get(key)!r} -> {now['settings'].get(key)!r}" for key in changed[:4]
        )
        what = f"the run was started with other settings ({told})"
        fix = TEACHERS_FIX if all(map(is_of_teachers, changed)) else "resume with the old ones, or start another run"
        yield Finding.bad(setting, what, fix, kind=RunError)
    for part, what, section in _DIGESTS:
        if part in before and before[part] != now.get(part):  # not in one of an earlier version
            changes = _told_changes(section, config)
            said = f"{what} have changed since the run was started{changes}"
            yield Finding.bad(section, said, "start another run", kind=RunError)
    if before["teacher"] != now["teacher"] and "teachers" in before and "teachers" in now:
        what = f"the run was started with other teachers ({'; '.join(other_teachers(before, now)[:4])})"
        yield Finding.bad("teachers", what, TEACHERS_FIX, kind=RunError)
    elif before["teacher"] != now["teacher"]:
        fingerprints = f"fingerprint {before['teacher'][:16]}, now {now['teacher'][:16]}"
        what = f"the run was started with another teacher ({fingerprints})"
        yield Finding.bad("teacher", what, f"labels of two teachers are not mixed; {TEACHERS_FIX}", kind=RunError)
    elif before.get("bridges") != now.get("bridges"):
        what = (
            "cross_tokenizer: the run was started with other settings of it, or tokens of another tokenizer are joined by other "
            f"byte tables or prompts than then ({before.get('bridges')} -> {now.get('bridges')})"
        )
        yield Finding.bad("cross_tokenizer", what, TEACHERS_FIX, kind=RunError)


def _told_changes(section: str, config: TrainConfig) -> str:
    """Settings of a section that are others than in the folder's config.yaml, in brackets; empty if none can be told."""
    try:
        before = yaml.safe_load((config.run.output_dir / CONFIG_NAME).read_text())[section]
        now = config.model_dump(mode="json")[section]
        changed = [
            f"{section}.{key}: {before.get(key)!r} -> {now[key]!r}"[:200] for key in now if before.get(key) != now[key]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return ""
    return f" ({', '.join(changed[:4])})" if changed else ""


def _cut_log(path: Path, step: int, note: Callable[[str], None]) -> None:
    """Drops log entries after `step`: they will be made again."""
    if not path.is_file():
        return
    kept, damaged = [], 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError):
            damaged += bool(line.strip(b"\0 ")) and number < len(lines) - 1  # the last may have been cut by a kill
    if damaged:
        note(f"{path.name}: {damaged} entries cannot be read and are left out")
    with disk_trouble_named(str(path)):
        write_whole(path, "".join(line + "\n" for line in kept))


def log_line(entry: dict[str, Any]) -> str:
    """A log entry as one line of JSON, which knows no NaN and no infinity: they become null."""
    return json.dumps(finite_or_none(entry), allow_nan=False) + "\n"


def finite_or_none(entry: dict[str, Any]) -> dict[str, Any]:
    """The same entry with null for what is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in entry.items()}


def finish(folder: Path, steps: int, metrics: dict[str, float]) -> RunResult:
    """Writes the result, which marks the run as finished; everything else must be on disk.

    Raises:
        RunError: the disk does not take it.
    """
    named = finite_or_none({name.removeprefix("eval_"): value for name, value in metrics.items()})
    with disk_trouble_named(str(folder / RESULT_NAME), lambda: "make room on the disk, then --resume"):
        write_whole(folder / RESULT_NAME, json.dumps({"steps": steps, "metrics": named}, indent=1, allow_nan=False))
    return result_of(folder)


def result_of(folder: Path, note: Callable[[str], None] = lambda _: None) -> RunResult:
    """What a finished run left; `note` is told how many entries of the log cannot be read, where the curve has gaps."""
    result = read_object(folder / RESULT_NAME)
    curve, damaged = [], 0
    if (folder / LOG_NAME).is_file():
        for line in (folder / LOG_NAME).read_bytes().split(b"\n"):
            try:
                curve.append(_numbers(json.loads(line)))
            except (ValueError, AttributeError):
                damaged += bool(line.strip(b"\0 "))
    if damaged:
        note(f"{LOG_NAME}: {damaged} entries cannot be read and are left out")
    return RunResult(folder, result["steps"], _numbers(result["metrics"]), curve)
