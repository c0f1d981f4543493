"""Figures of held-out rows: acc1, acc3, NLL per byte and token, KL to a served teacher, and the teacher's own of the same rows.

In: a student, rows, a connection; out: figures. It is the measuring of a training run (`evaluation/measuring.py`), with a config made for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from student_trainer.config.data import DataConfig, SourceConfig
from student_trainer.config.losses import LossConfig
from student_trainer.config.model import ModelConfig
from student_trainer.config.run import RunConfig, TrainConfig
from student_trainer.config.teachers import LabelConfig, TeacherConfig
from student_trainer.config.training import OptimizationConfig
from student_trainer.data.inputs import load_run_data
from student_trainer.evaluation.measuring import measuring
from student_trainer.findings import Findings
from student_trainer.model.load import Student
from student_trainer.teachers.connect import Connection
from student_trainer.teachers.meeting.described import meet
from student_trainer.teachers.session import open_sessions

_TEACHERS = {"teacher_nll_per_byte": "nll_per_byte", "teacher_acc1": "acc1", "teacher_acc3": "acc3"}


@dataclass(frozen=True)
class RowFigures:
    """What held-out rows say.

    Attributes:
        student: figures of the student.
        teacher: the same of the teacher, where its tokens are the student's; empty without a teacher.
        rows: that were measured.
    """

    student: dict[str, float]
    teacher: dict[str, float]
    rows: int


def measured_as(
    base: TrainConfig | None,
    path: str,
    rows: Sequence[SourceConfig],
    teacher: TeacherConfig | None,
    cache_dir: Path | None,
    batch_size: int,
) -> TrainConfig:
    """The config by which a model is measured with rows.

    Args:
        base: a run's, whose data and label settings are kept; None for defaults.
        path: of the model.
        rows: to measure with; empty for `data.eval` of `base`.
        teacher: whom to hold it against; None for nobody.
        cache_dir: of labels, heads and tokenised rows; None for that of `base`, or of all runs.
        batch_size: rows of a pass.
    """
    if base is None:
        data = DataConfig(train=tuple(rows), eval=tuple(rows))
        run = RunConfig(output_dir=Path("evaluation"))
    else:
        chosen = tuple(rows) or base.data.eval
        data, run = base.data.model_copy(update={"train": chosen, "eval": chosen}), base.run
    if cache_dir is not None:
        run = run.model_copy(update={"cache_dir": cache_dir.expanduser().absolute()})
    made = TrainConfig(
        run=run,
        model=ModelConfig(path=path),
        data=data,
        loss=LossConfig(output=None, sft_weight=1.0),
        train=OptimizationConfig(eval_batch_size=batch_size),
    )
    if base is not None:
        made = made.model_copy(update={"feed": base.feed, "cache": base.cache})
    labels = LabelConfig(
        transport="hidden"
    )  # exact, and of the teacher's own likelihood too; where it is not offered, others are taken
    return made if teacher is None else made.model_copy(update={"teacher": teacher, "labels": labels})


def measure_rows(student: Student, config: TrainConfig, connection: Connection | None, console: Console) -> RowFigures:
    """Measures a student with the rows of `data.eval`.

    Args:
        student: loaded.
        config: made by `measured_as`.
        connection: to the teacher of the config; None for none.
        console: told of rows and teacher.

    Raises:
        StudentError, TeacherWireError: rows that cannot be read, or a teacher that cannot be held against the student, by name.
    """
    load = partial(load_run_data, config, student.tokenizer, _silent())
    read = load()
    connections = [] if connection is None else [connection]
    (data, held_out), described = meet(config, connections, student.outline, read, partial(load, tells=True), _silent())
    assert held_out is not None
    findings = Findings(on_advice=lambda told: console.print(f"[yellow]note:[/] {escape(told)}"))
    sessions = open_sessions(
        config, connections, student.outline, data, held_out, console, findings, described=described
    )  # fmt: skip
    own_rows = min(student.vocab_rows, len(student.tokenizer))
    vocab_rows = min([own_rows, *(one.vocab_rows for one in sessions if one.bridge is None)])
    figures = measuring(
        config, student, held_out, sessions, vocab_rows, lambda told: console.print(f"[yellow]note:[/] {escape(told)}")
    )()
    theirs = {ours: figures.pop(name) for name, ours in _TEACHERS.items() if name in figures}
    if "nll_per_byte" in theirs:
        theirs["nll_per_token"] = theirs["nll_per_byte"] * held_out.target_bytes / held_out.target_tokens
    if theirs:
        theirs["kl_to_teacher"] = 0.0
    return RowFigures(figures, theirs, len(held_out))


def _silent() -> Console:
    """The rows are the same for every model: they are told of once, by whoever asks."""
    return Console(quiet=True, stderr=True)
