"""Tasks of lm-evaluation-harness: found by name or from local files before any model is loaded, and run with a model of ours.

In: names and paths; out: figures by task. What a task's data set is missing for is one line that names it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import math
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from student_trainer.data.rows.files import READERS, suffix_of
from student_trainer.errors import ConfigError, DataError, StudentError
from student_trainer.evaluation.tasks.choice_file import read_choices
from student_trainer.progress import working
from teacher_wire.core.errors import TeacherWireError

if TYPE_CHECKING:
    from student_trainer.evaluation.tasks.engine import Engine

_YAML = (".yaml", ".yml")
_NAMES = re.compile(r"^(?:task|group|tag): *[\"']?([\w.-]+)", re.MULTILINE)
_SHOTS_SEED = 1234  # lm-eval's own
_FIRST = ("acc", "exact_match", "acc_norm", "f1", "pass@1", "bleu", "word_perplexity")  # which metric stands for a task


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks.

    Attributes:
        asked: names as tables show them, in the order in which they were asked for.
        built: lm-eval's tasks and groups.
        manager: that built them.
    """

    asked: tuple[str, ...]
    built: tuple[Any, ...]
    manager: Any


def load_tasks(names: Sequence[str], console: Console) -> Tasks:
    """Tasks by name of lm-eval's index (tasks, groups, tags), by the path of its YAML, or of a file of questions.

    Raises:
        ConfigError: lm-eval is not installed, or there is no task of that name.
        DataError: a file that is none, or a data set that cannot be had here.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'lyceum-distill[evaluate]'")
    with _quiet():
        from lm_eval.tasks import TaskManager

        specs = [_spec(name, console) for name in names]
        folders = sorted({str(Path(name).expanduser().parent) for name in names if _is_yaml(name)})
        registered = [spec for spec in specs if isinstance(spec, str) and not _is_yaml(spec)]
        manager: Any = None
        asked, built = [], []
        with working(console, "looking for the tasks"):
            index = _TaskTexts()
            for name in registered:
                index.require(name)
            manager = TaskManager(include_path=[*index.families(registered), *folders], include_defaults=False)
            if any(name not in manager.task_index for name in registered):
                manager = TaskManager(include_path=folders or None)
        for name, spec in zip(names, specs, strict=True):
            with working(console, f"loading task {name}"):
                try:
                    found = _load(manager, name, spec)
                except KeyError:  # a group of tasks of other families, or a file that includes one
                    manager = TaskManager(include_path=folders or None)
                    found = _load(manager, name, spec, is_whole=True)
            children = {child for some in found["group_map"].values() for child in some}
            tops = [group for key, group in found["groups"].items() if key not in children]
            built += tops or list(found["tasks"].values())
            asked += [top.name for top in tops] or list(found["tasks"])
    if twice := next((name for name in asked if asked.count(name) > 1), None):
        raise ConfigError(f"--tasks: two tasks are called {twice!r}; rename one of the files, or leave one out")
    return Tasks(tuple(asked), tuple(built), manager)


def run_tasks(
    tasks: Tasks,
    engine: Engine,
    console: Console,
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Every task with one model; the figures of each by its name.

    Args:
        tasks: loaded by `load_tasks`.
        engine: the model.
        console: where progress is shown.
        limit: questions of each task; None for all.
        shots: examples before each question; None as the task says.
        chat: ask by the chat template, examples as turns.

    Returns:
        Of each task `metric` (the name of the figure that stands for it), `value`, `stderr` (None if it has none), `samples`, and all its
        `metrics`; of a group those of its tasks too, under `subtasks`.

    Raises:
        StudentError, TeacherWireError: naming what does not fit.
    """
    with _quiet():
        from lm_eval.evaluator import evaluate

        from student_trainer.evaluation.tasks.lm import EngineLM

        loaded = tasks.manager.load(list(tasks.built))
        for name, task in loaded["tasks"].items():
            _set_shots(name, task, shots)
        try:
            results = evaluate(
                lm=EngineLM(engine, console),
                task_dict=loaded,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except (StudentError, TeacherWireError):
            raise
        except Exception as error:  # tasks are code and templates of many authors, which raise what they like
            raise DataError(f"--tasks {','.join(tasks.asked)}: {_chain(error)}") from error
    assert results is not None
    return {name: _figures(name, results) for name in tasks.asked}


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    """As lm-eval's own command does it; but a number that the task would not take is refused."""
    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise ConfigError(f"--shots {shots}: task {name} says itself that it has no examples (num_fewshot: 0)")
    if shots is not None or own is None:
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=_SHOTS_SEED)


def _spec(name: str, console: Console) -> Any:
    """What lm-eval is asked for: a name, the path of a YAML, or the config of a file of questions."""
    path = Path(name).expanduser()
    if _is_yaml(name):
        if not path.is_file():
            raise DataError("no such file", file=name)
        return str(path)
    if path.is_file() or suffix_of(path) in READERS:
        read = read_choices(path)
        if read.unused:
            unused = ", ".join(read.unused)
            console.print(
                f"[yellow]note:[/] {escape(name)}: fields that are in no prompt: {escape(unused)}", highlight=False
            )
        return read.task()
    return name


def _is_yaml(name: str) -> bool:
    return Path(name).suffix in _YAML


def _load(manager: Any, name: str, spec: Any, *, is_whole: bool = False) -> Mapping[str, Any]:
    if isinstance(spec, str) and not _is_yaml(spec) and spec not in manager.task_index:
        raise ConfigError(_unknown(spec, difflib.get_close_matches(spec, manager.all_tasks, 3)))
    try:
        found: Mapping[str, Any] = manager.load([spec])
    except Exception as error:  # data sets and tasks raise what they like
        if isinstance(error, KeyError) and not is_whole:
            raise
        if not _is_of_data(error):
            raise DataError(f"task {name}: cannot be built: {_chain(error)}") from error
        raise DataError(
            f"task {name}: its data set{_data_set(manager, spec)} cannot be loaded here: {_chain(error)}; bring it into the cache of `datasets` "
            "(HF_HOME) of this machine, or name a local file (docs/after/evaluate.md)"
        ) from error
    return found


class _TaskTexts:
    """The texts of lm-eval's own task files. Parsing all ten thousand takes it most of a minute; reading them takes a second."""

    def __init__(self) -> None:
        import lm_eval.tasks

        self._root = Path(lm_eval.tasks.__file__).parent

    @cached_property
    def _texts(self) -> dict[Path, str]:
        return {path: path.read_text(encoding="utf-8", errors="replace") for path in self._root.rglob("*.y*ml")}

    def require(self, name: str) -> None:
        """
        Raises:
            ConfigError: no file names it; with what may be meant.
        """
        if any(name in text for text in self._texts.values()):
            return
        known = {found for text in self._texts.values() for found in _NAMES.findall(text)}
        close = difflib.get_close_matches(name, sorted(known), 3)
        raise ConfigError(_unknown(name, close))

    def families(self, names: Sequence[str]) -> list[str]:
        """The folders of tasks in whose files one of the names stands."""
        found = {
            self._root / path.relative_to(self._root).parts[0]
            for path, text in (self._texts.items() if names else ())
            if any(name in text for name in names)
        }
        return sorted(str(path) for path in found if path.is_dir())


def _unknown(name: str, close: Sequence[str]) -> str:
    meant = f"; did you mean {' or '.join(close)}?" if close else "; `lm-eval ls tasks` lists them"
    return f"--tasks {name}: no task, group or tag of lm-eval has this name, nor is it a file{meant}"


def _data_set(manager: Any, spec: Any) -> str:
    """The data set that a task names, or the first task of a group, behind a space; "" where none can be told."""
    from lm_eval.tasks._yaml_loader import load_yaml

    with contextlib.suppress(Exception):  # only to say more
        path = spec if _is_yaml(str(spec)) else manager.task_index[spec].yaml_path
        config = load_yaml(path, resolve_func=False)
        while "dataset_path" not in config:
            child = config["task"][0]
            config = load_yaml(manager.task_index[child if isinstance(child, str) else child["task"]].yaml_path, resolve_func=False)  # fmt: skip
        return f" {config['dataset_path']}"
    return ""


def _is_of_data(error: BaseException) -> bool:
    """Whether it was raised while lm-eval loaded the data set of a task."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name == "download" for frame, _ in frames)


def _chain(error: BaseException, limit: int = 300) -> str:
    """An error in a line, by its class."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def _figures(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    found = _of_one(name, results)
    children = results.get("group_subtasks", {}).get(name) or []
    if children:
        found["subtasks"] = {child: _of_one(child, results) for child in children if child in results["results"]}
    return found


def _of_one(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    own = results.get("groups", {}).get(name) or results["results"].get(name) or {}
    metrics = {key: value for key, value in own.items() if isinstance(value, int | float) and "," in key and not math.isnan(value)}  # fmt: skip
    values = {key: value for key, value in metrics.items() if "_stderr" not in key}
    first = min(values, key=lambda key: (_rank(key), list(values).index(key)), default=None)
    samples = results.get("n-samples", {}).get(name, {}).get("effective")
    if samples is None:
        children = results.get("group_subtasks", {}).get(name) or []
        samples = sum(results["n-samples"][child]["effective"] for child in children if child in results["n-samples"])
    if first is None:
        return {"metric": None, "value": None, "stderr": None, "samples": samples, "metrics": metrics}
    metric, _, rule = first.partition(",")
    stderr = metrics.get(f"{metric}_stderr,{rule}")
    return {"metric": metric, "value": values[first], "stderr": stderr, "samples": samples, "metrics": metrics}


def _rank(key: str) -> int:
    metric = key.partition(",")[0]
    return _FIRST.index(metric) if metric in _FIRST else len(_FIRST)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and `datasets` log and draw bars of their own; what matters of it is an error or a note of ours."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
