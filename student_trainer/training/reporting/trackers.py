"""Trackers of transformers (tensorboard, wandb, ...): made before a run has a folder, and never the reason that it ends.

In: the names of `train.report_to`; out: callbacks for the trainer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from student_trainer.errors import ConfigError, RunError


def make_trackers(names: tuple[str, ...], tell: Callable[[str], None]) -> list[TrainerCallback]:
    """A callback for each name.

    Args:
        names: as in `train.report_to`.
        tell: called with a sentence when one of them fails in the middle of a run.

    Raises:
        ConfigError: transformers knows no such tracker, or its package is not installed.
    """
    trackers: list[TrainerCallback] = []
    for name in names:
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # half-made trackers complain when they go
        said = ""
        try:
            (kind,) = get_reporting_integration_callbacks([name])
            trackers.append(Tracker(name, kind(), tell))
        except Exception as error:  # each tracker has its own way of saying that its package is missing
            said = " ".join(str(error).split())[:300] or type(error).__name__
        finally:
            sys.unraisablehook = hook
        if said:
            raise ConfigError(f"train.report_to: {name!r} cannot be used: {said}")
    return trackers


class Tracker(TrainerCallback):
    """A tracker whose beginning decides whether the run begins, and whose later trouble is told once and ends only itself."""

    def __init__(self, name: str, inner: TrainerCallback, tell: Callable[[str], None]) -> None:
        self._name = name
        self._inner = inner
        self._tell = tell
        self._works = True
        for event in (event for event in dir(TrainerCallback) if event.startswith("on_")):
            setattr(self, event, partial(self._pass_on, event))

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        if not self._works:
            return
        try:
            getattr(self._inner, event)(*args, **kwargs)
        except Exception as error:  # a tracker's server may say anything
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if event in ("on_init_end", "on_train_begin"):
                raise RunError(f"train.report_to: {self._name!r} does not begin: {said}") from error
            self._works = False
            self._tell(f"train.report_to: {self._name!r} has failed and is told nothing more: {said}")
