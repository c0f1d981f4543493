"""Callbacks of ours for trackio and wandb: the run's own config, its folder's name, and a resumed run that goes on where it was.

In: the trainer's events; out: calls of the tracker's library, whose chatter does not reach standard output. Those of transformers would
send its TrainingArguments, in which our settings have other names and values, and start a second run at every resumption.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from student_trainer.config.run import TrainConfig
from student_trainer.files import read_object, write_whole

TRACKERS_NAME = "trackers.json"  # in a run folder: by which name or id each tracker knows the run
_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")  # user:password@


def public_config(config: TrainConfig) -> dict[str, Any]:
    """The resolved config as plain data for others to see. Settings hold no secrets; what looks like one in a free value is masked."""
    return _masked(config.model_dump(mode="json"))


def _masked(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        return {name: _masked(value, str(name)) for name, value in node.items()}
    if isinstance(node, list):
        return [_masked(value, key) for value in node]
    if isinstance(node, str):
        return "***" if _SECRET.search(key) else _IN_URL.sub("***@", node)
    return node


class _OwnCallback(TrainerCallback):
    """What both have in common: when they begin and end, and what they log."""

    package: str

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._folder = config.run.output_dir
        self._library = importlib.import_module(self.package)
        self._open = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = _names(self._folder).get(self.package) if state.global_step else None
        with _quiet():
            called = self._begin(known)
        self._open = True
        if called != known:
            _keep_name(self._folder, self.package, called)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not self._open:
            return
        figures = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        with _quiet():
            self._log(rewrite_logs(figures), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finish(0)

    def close(self) -> None:
        """Ends a run that did not come to its end."""
        self._finish(1)

    def _finish(self, code: int) -> None:
        if not self._open:
            return
        self._open = False
        with _quiet():
            self._end(code)

    def _begin(self, known: str | None) -> str:
        """Opens the run, `known` by the tracker if it is resumed; returns the name or id by which it knows it."""
        raise NotImplementedError

    def _log(self, figures: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _end(self, code: int) -> None:
        raise NotImplementedError


class TrackioCallback(_OwnCallback):
    """trackio: a local database (TRACKIO_DIR), looked at by `trackio show`."""

    package = "trackio"

    def _begin(self, known: str | None) -> str:
        self._run = self._library.init(
            project=self._config.train.project,
            name=known or f"{self._folder.name}-{secrets.token_hex(2)}",
            resume="allow" if known else "never",
            config=public_config(self._config),
            embed=False,
        )
        return str(self._run.name)

    def _log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def _end(self, code: int) -> None:
        self._library.finish()  # else it would be ended once more, aloud, when the process ends


class WandbCallback(_OwnCallback):
    """wandb: an account (`wandb login`), or WANDB_MODE=offline."""

    package = "wandb"

    def _begin(self, known: str | None) -> str:
        self._run = self._library.init(
            project=self._config.train.project,
            name=self._folder.name,
            id=known,
            resume="allow" if known else None,
            config=public_config(self._config),
            dir=str(self._folder),
        )
        return str(self._run.id)

    def _log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def _end(self, code: int) -> None:
        self._run.finish(exit_code=code)


def _names(folder: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):  # damaged: the tracker gets a new run
        return {str(name): str(value) for name, value in read_object(folder / TRACKERS_NAME).items()}
    return {}


def _keep_name(folder: Path, package: str, called: str) -> None:
    write_whole(folder / TRACKERS_NAME, json.dumps(_names(folder) | {package: called}, indent=1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output is a program's: what a library prints about itself goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
