"""A comparison from its plan to its tables: the runs one after another, seed by seed, and what they reached so far after each.

In: a `Comparison`; out: its folder with comparison.json, report.md and plots, and the `Outcome`. A run that is finished is not made again, one
that was broken off goes on; one that fails leaves the others alone. Must never call a comparison done of which a run is missing.
"""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from student_trainer.comparison.arms import Arm
from student_trainer.comparison.ledger import Ledger, Watch
from student_trainer.comparison.pace import steps_of_arms
from student_trainer.comparison.plan import Comparison, open_comparison, settings_of
from student_trainer.comparison.reading import changed, read_run
from student_trainer.comparison.served import Served
from student_trainer.comparison.showing import Showing
from student_trainer.comparison.versions import gpus, versions
from student_trainer.config.run import TrainConfig
from student_trainer.errors import RunError, StudentError, TeacherAwayError
from student_trainer.evaluation.outcome import FILE_NAME, Budget, Cost, Outcome, RunOutcome
from student_trainer.evaluation.plots import write_plots
from student_trainer.evaluation.report import as_markdown
from student_trainer.files import FolderLock, disk_trouble_named, write_whole
from student_trainer.findings import Findings
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.checks import check_settings
from student_trainer.training.run import train
from student_trainer.training.run_folder import IDENTITY_NAME, RunResult, is_finished, read_identity
from teacher_wire.core.errors import TeacherWireError, UnavailableError

log = logging.getLogger(__name__)

MARKDOWN_NAME = "report.md"
_OFF_BUDGET = 0.1  # share of the minutes by which an arm under equal time may miss them before it is told


def compare(comparison: Comparison, console: Console, run_console: Console | None = None) -> Outcome:
    """Makes every run of a comparison that is not made yet, and writes what all of them reached.

    Args:
        comparison: what to make.
        console: told of the runs.
        run_console: told of what each run does; `console` if None.

    Returns:
        What was reached; runs that failed are in it, and it `is_done` only without them.

    Raises:
        ConfigError: an arm cannot be made from the config; before anything is written.
        RunError: the folder holds another comparison, another process is at work in it, or the disk refuses.
        TeacherWireError, TeacherAwayError: no teacher answers, whom the runs to come would need too; what was reached is written.
    """

    def note(told: str) -> None:
        console.print(f"[yellow]note:[/] {escape(told)}")

    configs = comparison.configs()
    for name, config in configs.items():
        try:
            Findings(on_advice=lambda told, name=name: note(f"{name}: {told}")).add(check_settings(config))  # type: ignore[misc]
        except StudentError as error:
            error.add_note(f"arm {name}")
            raise
    with FolderLock(comparison.folder, note) as lock, disk_trouble_named(f"--out {comparison.folder}"):
        lock.acquire()
        open_comparison(comparison, configs)
        with Served(console) as served:
            trains = partial(_train, served, run_console or console)
            steps = steps_of_arms(comparison, trains, note) if comparison.equal == "time" else {}
            return _Runs(comparison, configs, steps, console, trains).make()


def _train(served: Served, console: Console, config: TrainConfig, watch: Watch) -> RunResult:
    """A run, from its last checkpoint if it was begun before."""
    resume = (config.run.output_dir / IDENTITY_NAME).is_file()
    return train(served.config(config), resume=resume, console=console, callbacks=[watch])


class _Runs:
    """The runs of a comparison whose folder is open.

    Args:
        configs: of every arm with the first seed.
        steps: of every arm under equal time.
        trains: makes one run.
    """

    def __init__(
        self,
        comparison: Comparison,
        configs: dict[str, TrainConfig],
        steps: dict[str, int],
        console: Console,
        trains: Callable[[TrainConfig, Watch], RunResult],
    ) -> None:
        self._comparison, self._steps = comparison, steps
        self._console, self._train = console, trains
        self._settings = {name: settings_of(config) for name, config in configs.items()}
        self._config = configs[comparison.base]
        self._all = [(arm, seed) for seed in comparison.seeds for arm in comparison.arms]
        self._began_s = time.monotonic()
        self._outcomes: dict[tuple[str, int], RunOutcome] = {}

    def make(self) -> Outcome:
        missing = [(arm, seed) for arm, seed in self._all if not is_finished(self._folder(arm, seed))]
        for arm, seed in self._all:
            self._outcomes[arm.name, seed] = self._read(arm, seed)
        if there := len(self._all) - len(missing):
            self._console.print(f"{there} of {len(self._all)} runs are finished and not made again", highlight=False)
        for arm, seed in self._all:
            if (arm, seed) not in missing:
                self._check_alike(arm, seed)
        showing = Showing(self._console, [(arm.name, seed) for arm, seed in missing], there, self._known_seconds())
        try:
            for arm, seed in missing:
                self._make(arm, seed, showing)
                self._write()
        finally:
            showing.close()
            outcome = self._write()
        return outcome

    def _folder(self, arm: Arm, seed: int) -> Path:
        return self._comparison.run_folder(arm, seed)

    def _known_seconds(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for (arm, _), outcome in self._outcomes.items():
            if outcome.state == "done" and outcome.cost.wall_s:
                found.setdefault(arm, []).append(outcome.cost.wall_s)
        return found

    def _read(self, arm: Arm, seed: int, error: str = "") -> RunOutcome:
        folder = self._folder(arm, seed)
        ledger = Ledger(folder)
        other = changed(self._settings[self._comparison.base], self._settings[arm.name])
        error = error or ledger.error
        read = read_run(folder, arm.name, seed, settings=other, cost=ledger.cost(), error=error)
        return read.model_copy(update={"folder": folder.relative_to(self._comparison.folder).as_posix()})

    def _make(self, arm: Arm, seed: int, showing: Showing) -> None:
        """One run to its end, or to its error.

        Raises:
            UnavailableError, TeacherAwayError: no teacher answers.
        """
        showing.begin(arm.name, seed)
        config = self._comparison.config(arm, seed, self._steps.get(arm.name))
        folder = config.run.output_dir
        ledger = Ledger(folder)
        ledger.begin(gpus())
        steps = config.train.max_steps
        watch = Watch(lambda step: showing.step(step, steps) if steps else None, ledger.progress)
        error = ""
        try:
            result = self._train(config, watch)
            ledger.end(result, watch.train_s)
            self._check_alike(arm, seed)
            if not self._keeps_checkpoints(arm):
                _drop_checkpoints(folder)
        except (StudentError, TeacherWireError) as failure:
            notes = "; ".join(getattr(failure, "__notes__", []))
            error = f"{failure}{f' ({notes})' if notes else ''}"
            ledger.fail(error)
            if isinstance(failure, UnavailableError | TeacherAwayError):
                raise
        except BaseException as failure:
            ledger.fail(
                "" if isinstance(failure, KeyboardInterrupt | SystemExit) else f"{type(failure).__name__}: {failure}"
            )
            raise
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            outcome = self._read(arm, seed, error)
            if error and outcome.state == "done":  # it came to its end, and cannot be compared
                outcome = outcome.model_copy(update={"state": "failed", "error": error})
            self._outcomes[arm.name, seed] = outcome
        showing.end(outcome)

    def _keeps_checkpoints(self, arm: Arm) -> bool:
        """Whether the config itself asks for checkpoints; else they are there for a run that is broken off."""
        train_section = arm.of(self._comparison.tree).get("train")
        return bool(isinstance(train_section, dict) and train_section.get("save_steps"))

    def _check_alike(self, arm: Arm, seed: int) -> None:
        """Whether a run has learned from, and was measured on, the same rows, weights and teacher as the base arm with this seed.

        Raises:
            RunError: naming what differs.
        """
        base = next(other for other in self._comparison.arms if other.name == self._comparison.base)
        if arm.name == base.name or not (self._folder(base, seed) / IDENTITY_NAME).is_file():
            return
        ours, theirs = (read_identity(self._folder(one, seed) / IDENTITY_NAME) for one in (arm, base))
        other = changed(self._settings[base.name], self._settings[arm.name])
        sections = {name.partition(".")[0] for name in other}
        for entry, told, section in (
            ("held_out", "the held-out rows", ""),
            ("data", "the training rows", "data"),
            ("student", "the student's first weights", "model"),
            ("teacher", "the teacher", "teacher"),
        ):
            if ours.get(entry) != theirs.get(entry) and (
                not section or not any(s.startswith(section) for s in sections)
            ):
                raise RunError(
                    f"{told} of arm {arm.name} (seed {seed}) are not those of arm {base.name}: their figures cannot be compared; what was "
                    "changed between the runs? Start again in another folder with --out"
                )

    def _write(self) -> Outcome:
        """comparison.json, report.md and the plots of what there is."""
        comparison = self._comparison
        runs = [self._outcomes[arm.name, seed] for arm, seed in self._all]
        steps = {run.name: run.steps for run in runs if run.state == "done"}
        outcome = Outcome(
            title=comparison.folder.name,
            base=comparison.base,
            budget=Budget(by=comparison.equal, minutes=comparison.minutes, steps=steps),
            seeds=list(comparison.seeds),
            seconds=sum(run.cost.wall_s or 0.0 for run in runs),
            arms=runs,
            notes=list(self._notes(runs, steps)),
            config=self._config.model_dump(mode="json"),
            versions=versions(),
            cost=total(runs),
        )
        with disk_trouble_named(f"--out {comparison.folder}"):
            write_folder(comparison.folder, outcome)
        return outcome

    def _notes(self, runs: list[RunOutcome], steps: dict[str, int]) -> list[str]:
        notes = []
        if self._comparison.equal == "steps" and len(set(steps.values())) > 1:
            told = ", ".join(f"{name} {count:,}" for name, count in steps.items())
            notes.append(f"The arms did not make the same number of steps ({told}): set train.max_steps.")
        minutes = self._comparison.minutes
        for name in steps if minutes else ():
            spent = [r.cost.train_s / 60 for r in runs if r.name == name and r.state == "done" and r.cost.train_s]
            if minutes and spent and abs(sum(spent) / len(spent) - minutes) > _OFF_BUDGET * minutes:
                notes.append(f"{name} trained for {sum(spent) / len(spent):.1f} min on average, not {minutes:g}.")
        if not any("kl_to_teacher" in run.metrics for run in runs) and any(run.metrics for run in runs):
            notes.append(
                "No run has a KL to the teacher: it is measured where there is a teacher and its labels are exact."
            )
        return notes


def write_folder(folder: Path, outcome: Outcome) -> None:
    """The plots, report.md and, last, comparison.json.

    Raises:
        OSError: the disk does not take them.
    """
    results = outcome.results()
    plots = write_plots(folder, results, outcome.points())
    failed = [
        f"- {run.name} seed {run.seed}: {run.state}{f': {run.error}' if run.error else ''}"
        for run in outcome.arms
        if run.state != "done"
    ]
    said = ["", "## Not all runs are done", "", *failed, ""] if failed else []
    said += [f"- {told}" for told in outcome.notes]
    write_whole(
        folder / MARKDOWN_NAME,
        as_markdown(results, plots) + "\n".join(["", *said] if said else []) + ("\n" if said else ""),
    )
    write_whole(folder / FILE_NAME, outcome.model_dump_json(indent=1) + "\n")


def total(runs: list[RunOutcome]) -> Cost:
    """The sums over runs of what is known."""

    def over(pick: Callable[[Cost], Any]) -> Any:
        known = [value for run in runs if (value := pick(run.cost)) is not None]
        return sum(known) if known else None

    return Cost(
        train_s=over(lambda cost: cost.train_s),
        wall_s=over(lambda cost: cost.wall_s),
        at_least=any(run.cost.at_least for run in runs),
        gpu_hours=over(lambda cost: cost.gpu_hours),
        teacher_tokens=over(lambda cost: cost.teacher_tokens),
        disk_tokens=over(lambda cost: cost.disk_tokens),
        label_bytes=over(lambda cost: cost.label_bytes),
    )


def _drop_checkpoints(folder: Path) -> None:
    """Takes away the checkpoints of a finished run, which were there in case that it is broken off."""
    for path in filter(checkpoint.is_ours, sorted(folder.glob("checkpoint-*"))):
        shutil.rmtree(path, ignore_errors=True)
