"""A run from its config to its end: the door of the student's house.

Everything that can be wrong is found before the run folder exists; then the folder holds the resolved config, the log,
the checkpoints and, at the end, the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape

from student_trainer import evaluate
from student_trainer.config import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.feed.arrays import LabelTensors
from student_trainer.feed.packing import pack
from student_trainer.feed.provided import ProvidedRequests
from student_trainer.feed.source import LabelRequest
from student_trainer.inputs import bytes_on_disk, load_data, order_of
from student_trainer.losses.integrity import TeacherHeadMismatch
from student_trainer.meeting import (
    Teacher,
    check_sizes,
    meet_teacher,
    open_any_feed,
    open_training_feed,
    teacher_address,
)
from student_trainer.model import Student, load_student
from student_trainer.objective import Objective, check_loss
from student_trainer.progress import ConsoleProgress
from student_trainer.run_folder import (
    FINAL_NAME,
    AlreadyFinished,
    RunResult,
    check_folder,
    finish,
    open_folder,
    pinned_date,
    result_of,
    settled_labels,
)
from student_trainer.trainer import DistillationTrainer

log = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> RunResult:
    """Trains a student as `config` says.

    Args:
        config: the run.
        resume: go on from the newest complete checkpoint in `run.output_dir`, if there is one.
        console: where progress is shown.

    Raises:
        StudentError, TeacherWireError: something a user can mend; nothing is left half-written.
    """
    console = console or Console(stderr=True)
    torch.set_num_threads(config.model.threads)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over logits for nobody
    check_folder(config, resume)
    if config.labels.transport != "auto":
        check_loss(config.loss, config.labels)
    with teacher_address(config.teacher, console) as address:
        student = load_student(config.model, config.run.seed)
        data, held_out = load_data(config.data, student.tokenizer, console, pinned_date(config) if resume else None)
        teacher = meet_teacher(
            config, address, student.outline, data, held_out, console, settled_labels(config) if resume else None
        )
        try:
            return _run(config, student, data, held_out, teacher, resume, console)
        except AlreadyFinished:
            console.print("the run is finished: nothing to resume")
            return result_of(config.run.output_dir)


def _run(
    config: TrainConfig,
    student: Student,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    teacher: Teacher | None,
    resume: bool,
    console: Console,
) -> RunResult:
    order = order_of(config, data)
    if teacher is not None:
        check_sizes(config, teacher, data, held_out, order)
        _advise_budget(config, teacher, data, console)
    objective = Objective(config.loss, teacher.spec.vocab_rows if teacher else _own_rows(student))
    learned_from = {
        "teacher": teacher.info.fingerprint if teacher else "",
        "data": data.sha256,
        "student": student.sha256,
        "labels": (teacher.labels if teacher else config.labels).model_dump_json(),
        "computed": student.computed_by,
        "date": data.rendering.day if data.rendering else "",
        "rendering": data.rendering.sha256 if data.rendering else "",
    }
    start = open_folder(config, learned_from, resume, console)
    progress = ConsoleProgress(console, config.run.output_dir.name)
    distils = teacher is not None and config.loss.output is not None
    provided = ProvidedRequests() if distils and config.labels.extra_ids else None
    trainer = DistillationTrainer(
        config,
        student,
        data,
        order,
        objective,
        open_feed=partial(open_training_feed, config, teacher, data, order, provided) if teacher and distils else None,
        ask=provided.put if provided else None,
        teacher_head=teacher.head if teacher else None,
        measure=_measure(config, student, held_out, teacher, objective) if held_out else None,
        callbacks=[progress],
        on_trouble=lambda told: console.print(f"[yellow]note:[/] {escape(told)}"),
    )
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        trainer.save_model(str(config.run.output_dir / FINAL_NAME))  # before anything else can go wrong
        metrics = trainer.last_metrics() if held_out else {}
    except BaseException as error:
        _name_bad_labels(error, trainer, teacher)
        raise
    finally:
        progress.close()
        trainer.close()
    result = finish(config.run.output_dir, trainer.state.global_step, metrics)
    return replace(result, usage=teacher.desk.usage) if teacher else result


def _name_bad_labels(error: BaseException, trainer: DistillationTrainer, teacher: Teacher | None) -> None:
    """Deletes labels that are not the teacher's. What else ended the run may have come before the verdict on them was read.

    Raises:
        TeacherHeadMismatch: there were such, and `error` is another.
    """
    trainer.close()  # nothing more is kept
    mismatch = error if isinstance(error, TeacherHeadMismatch) else None
    try:
        trainer.settle()
    except TeacherHeadMismatch as found:
        mismatch = mismatch or found
    except Exception:  # the device itself is gone
        log.debug("no verdict", exc_info=True)
    if mismatch is None:
        return
    if teacher is not None and (told := teacher.desk.forget(teacher.info)):
        mismatch.add_note(told)
    if mismatch is not error:
        raise mismatch from error


def _measure(
    config: TrainConfig, student: Student, held_out: TokenizedDataset, teacher: Teacher | None, objective: Objective
) -> Callable[[], dict[str, float]]:
    """A function that measures the held-out data; the teacher's labels of them are kept if they fit feed.max_mb."""
    size = config.train.eval_batch_size
    groups = evaluate.batches(held_out, size)
    kept: dict[int, LabelTensors] = {}
    measured = partial(
        evaluate.measure, student, held_out, size, objective.vocab_rows, chunk_bytes=config.loss.chunk_mb << 20
    )

    def request(number: int) -> LabelRequest:
        return pack([held_out[index].example for index in groups[number]])

    def run() -> dict[str, float]:
        if teacher is None or teacher.measuring is None:
            return measured()
        if len(kept) == len(groups):
            return measured(labels=kept.__getitem__, teacher_head=teacher.head)
        kept.clear()
        feed = open_any_feed(config, teacher, teacher.measuring, request, 0, len(groups), prepare=LabelTensors.of)

        def take(number: int) -> LabelTensors:
            labels: LabelTensors = feed.take(number).ready
            if sum(other.nbytes for other in kept.values()) + labels.nbytes <= config.feed.max_mb << 20:
                kept[number] = labels
            return labels

        try:
            return measured(labels=take, teacher_head=teacher.head)
        finally:
            feed.close()

    return run


def _advise_budget(config: TrainConfig, teacher: Teacher, data: TokenizedDataset, console: Console) -> None:
    """Says so if the labels of one epoch do not fit into the cache, which then helps no later epoch."""
    if teacher.desk.store is None or config.loss.output is None or config.labels.extra_ids:
        return
    needed_gb = bytes_on_disk(teacher.info, teacher.spec, data, range(len(data))) / 2**30
    if needed_gb > config.cache.max_gb:
        console.print(
            f"[yellow]note:[/] the labels of one epoch take about {needed_gb:,.1f} GB, above cache.max_gb="
            f"{config.cache.max_gb:g}: later epochs and runs will ask the teacher again"
        )


def _own_rows(student: Student) -> int:
    return min(student.vocab_rows, len(student.tokenizer))
