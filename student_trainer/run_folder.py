"""The folder of a run: resolved config, identity, log, result; made late, taken up again only by the same run.

In: a config and what it is to learn from; out: the checkpoint to start at. Everything is written whole or not at all.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from student_trainer import checkpoint
from student_trainer.config import LabelConfig, TrainConfig, dump_config
from student_trainer.errors import ConfigError, RunError
from student_trainer.feed.source import LabelUsage

LOG_NAME = "train_log.jsonl"
CONFIG_NAME = "config.yaml"
IDENTITY_NAME = "run.json"
RESULT_NAME = "result.json"
FINAL_NAME = "final"
# Settings that may change between a run and its resumption: they decide where and how fast, not what.
_FREE = ("run.output_dir", "run.cache_dir", "teacher", "feed", "cache", "model.threads", "model.compiled", "model.graphs", "train.report_to",
         "train.log_steps", "train.save_steps", "train.keep_checkpoints", "train.eval_batch_size")  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        output_dir: its folder; the model is in `final/`.
        steps: optimizer steps made in all.
        metrics: the last held-out figures, empty without held-out data.
        curve: log entries, in order.
        usage: where the labels came from; None without a teacher.
    """

    output_dir: Path
    steps: int
    metrics: dict[str, float]
    curve: list[dict[str, float]]
    usage: LabelUsage | None = None


class AlreadyFinished(Exception):  # noqa: N818
    """The run that is to be resumed has come to its end already."""


def check_folder(config: TrainConfig, resume: bool) -> None:
    """Refuses a folder that cannot hold this run, without making it.

    Raises:
        ConfigError: it is a file, cannot be written, or holds another run; or there can be no cache folder.
    """
    folder = config.run.output_dir
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.output_dir {folder}: is a file")
    _check_writable("run.output_dir", folder)
    check_cache(config)
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"run.output_dir {folder}: holds a run already; go on with --resume auto, or choose another folder"
        )


def check_cache(config: TrainConfig) -> None:
    """Refuses a cache folder that cannot be made; one that is there and read-only is read.

    Raises:
        ConfigError: naming it.
    """
    folder = config.run.cache_dir.expanduser()
    if not folder.is_dir():
        _check_writable("run.cache_dir", folder)


def _check_writable(name: str, folder: Path) -> None:
    """Refuses a folder that cannot be made or written to, without making it."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name} {folder}: cannot be written ({nearest} is {'read-only' if nearest.is_dir() else 'a file'})"
        )


def settled_labels(config: TrainConfig) -> LabelConfig | None:
    """What `labels.transport: auto` chose when this run was started: a link that is slower today must not change it."""
    file = config.run.output_dir / IDENTITY_NAME
    if config.labels.transport != "auto" or not file.is_file():
        return None
    return LabelConfig.model_validate_json(json.loads(file.read_text())["labels"])


def pinned_date(config: TrainConfig) -> datetime.date | None:
    """The day that this run's chat template printed when it was started; a resumed run goes on with it."""
    file = config.run.output_dir / IDENTITY_NAME
    day = json.loads(file.read_text()).get("date", "") if file.is_file() else ""
    return datetime.date.fromisoformat(day) if day else None


def open_folder(config: TrainConfig, learned_from: dict[str, str], resume: bool, console: Console) -> Path | None:
    """Makes the run folder, or takes up the one that is there; the checkpoint to start from.

    Args:
        config: the run.
        learned_from: digests under `teacher`, `data` and `student`, which must not change over a run; the `labels` it was started with;
            and how it is `computed`, which may change and is told of, since other kernels round otherwise.
        resume: whether a run that is there may be taken up.
        console: told what was found.

    Raises:
        RunError: it was started with other settings, rows, weights or another teacher.
        AlreadyFinished: there is nothing left to do.
    """
    folder = config.run.output_dir
    identity = {"settings": _decisive(config), **learned_from}
    identity_file = folder / IDENTITY_NAME
    start = None
    if resume and identity_file.is_file():
        before = json.loads(identity_file.read_text())
        _compare(before, identity)
        if (folder / RESULT_NAME).is_file():
            raise AlreadyFinished
        start = checkpoint.newest_complete(folder)
        _cut_log(folder / LOG_NAME, checkpoint.step_of(start) if start else 0)
        console.print(
            f"resuming at step {checkpoint.step_of(start)}" if start else "no complete checkpoint: starting at step 0"
        )
        computed = learned_from["computed"]
        if before.get("computed", computed) != computed:
            console.print(
                f"[yellow]note:[/] computed until here by {escape(before['computed'])}, from here by "
                f"{escape(computed)}: the same but for rounding"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / CONFIG_NAME, dump_config(config))
    _write(identity_file, json.dumps(identity, indent=1))
    return start


def _decisive(config: TrainConfig) -> dict[str, Any]:
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

    walk(config.model_dump(mode="json"), "")
    return flat


def _is_free(name: str) -> bool:
    return name in _FREE or name.split(".")[0] in _FREE


def _compare(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with other settings or another teacher."""
    keys = [
        key for key in sorted(before["settings"].keys() | now["settings"].keys()) if not _is_free(key)
    ]  # some became so
    changed = [key for key in keys if before["settings"].get(key) != now["settings"].get(key)]
    if changed:
        told = ", ".join(
            f"{key}: {before['settings'].get(key)!r} -> {now['settings'].get(key)!r}" for key in changed[:4]
        )
        raise RunError(
            f"the run was started with other settings ({told}); resume with the old ones, or start another run"
        )
    for part, what in (("data", "the training rows"), ("student", "the student's weights")):
        if before.get(part) != now[part]:
            raise RunError(f"{what} have changed since the run was started; start another run")
    if before["teacher"] != now["teacher"]:
        raise RunError(
            f"the run was started with another teacher (fingerprint {before['teacher'][:16]}, now {now['teacher'][:16]}); "
            "labels of two teachers are not mixed"
        )


def _cut_log(path: Path, step: int) -> None:
    """Drops log entries after `step`: they will be made again."""
    if path.is_file():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        _write(path, "".join(line + "\n" for line in lines))


def finish(folder: Path, steps: int, metrics: dict[str, float]) -> RunResult:
    """Writes the result, which marks the run as finished."""
    named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    _write(folder / RESULT_NAME, json.dumps({"steps": steps, "metrics": named}, indent=1))
    return result_of(folder)


def result_of(folder: Path) -> RunResult:
    """What a finished run left."""
    result = json.loads((folder / RESULT_NAME).read_text())
    curve = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    return RunResult(folder, result["steps"], result["metrics"], curve)


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text)
    os.replace(partial_path, path)
