"""Trackers (trackio, tensorboard, wandb, ...): made before a run has a folder, and never the reason that one which learns ends.

In: a config; out: callbacks for the trainer. `auto` is a wish and not a condition: what keeps it from working is a note.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from student_trainer.config.run import TrainConfig
from student_trainer.errors import ConfigError, RunError
from student_trainer.training.tracking.own import TrackioCallback, WandbCallback

# Made here; every other name is one of transformers' (tensorboard, mlflow, ...), as `report_to` of its Trainer.
OWN: dict[str, Callable[[TrainConfig], TrainerCallback]] = {"trackio": TrackioCallback, "wandb": WandbCallback}
_AUTO = "auto"


def make_trackers(config: TrainConfig, tell: Callable[[str], None]) -> list[Tracker]:
    """A callback for each name of `train.report_to`; for `auto` that of trackio, where it is installed.

    Args:
        tell: called with a sentence when `auto` finds no trackio, and when a tracker fails in the middle of a run.

    Raises:
        ConfigError: there is no such tracker, or its package is not installed.
    """
    names = config.train.report_to
    if _AUTO in names:
        is_there = importlib.util.find_spec("trackio") is not None
        if not is_there and len(names) == 1:
            tell(
                "no tracker follows this run, since trackio is not installed (pip install trackio; local, no account); train.report_to=none "
                "says that none is wanted"
            )
        others = [name for name in names if name not in (_AUTO, "trackio")]
        named = ["trackio"] if "trackio" in names else []
        wished = [Tracker("trackio", TrackioCallback(config), tell, wished=True)] if is_there and not named else []
        return [*wished, *(_made(name, config, tell) for name in (*named, *others))]
    return [_made(name, config, tell) for name in names]


def _made(name: str, config: TrainConfig, tell: Callable[[str], None]) -> Tracker:
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # half-made trackers complain when they go
    try:
        if name in OWN:
            if importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"train.report_to: {name!r} cannot be used: it is not installed: pip install {name}, or leave it out"
                )
            return Tracker(name, OWN[name](config), tell)
        (kind,) = get_reporting_integration_callbacks([name])
        return Tracker(name, kind(), tell)
    except ConfigError:
        raise
    except Exception as error:  # each tracker has its own way of saying that its package is missing
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"train.report_to: {name!r} cannot be used: {said}") from error
    finally:
        sys.unraisablehook = hook


class Tracker(TrainerCallback):
    """A tracker whose later trouble is told once and ends only itself.

    One that was named decides by its beginning whether the run begins; one that is only `wished` for does not.
    """

    def __init__(self, name: str, inner: TrainerCallback, tell: Callable[[str], None], *, wished: bool = False) -> None:
        self._name = name
        self._inner = inner
        self._tell = tell
        self._wished = wished
        self._works = True
        for event in (event for event in dir(TrainerCallback) if event.startswith("on_")):
            setattr(self, event, partial(self._pass_on, event))

    def close(self) -> None:
        """Ends what a run that broke off has left open; nothing after `on_train_end`."""
        if hasattr(self._inner, "close"):
            self._guarded("close", self._inner.close)

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        self._guarded(event, partial(getattr(self._inner, event), *args, **kwargs))

    def _guarded(self, event: str, call: Callable[[], Any]) -> None:
        if not self._works:
            return
        try:
            call()
        except Exception as error:  # a tracker's server may say anything
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if event in ("on_init_end", "on_train_begin") and not self._wished:
                raise RunError(f"train.report_to: {self._name!r} does not begin: {said}") from error
            self._works = False
            self._tell(f"train.report_to: {self._name!r} has failed and is told nothing more: {said}")
