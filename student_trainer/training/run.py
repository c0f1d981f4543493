"""A run from its config to its end: the door of the student's house.

Everything that can be wrong is found before the run folder exists, or before the first step, and then the folder goes again; after it
the folder, which one process has at a time, holds the resolved config, the log, the checkpoints and, at the end, the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from student_trainer.config.run import TrainConfig
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import keep_bad_rows, load_run_data
from student_trainer.errors import RunError
from student_trainer.evaluation.measuring import measuring
from student_trainer.files import FolderLock, disk_trouble_named
from student_trainer.findings import Findings
from student_trainer.interruption import told_first
from student_trainer.labels import event_loop
from student_trainer.labels.late_requests import ProvidedRequests
from student_trainer.labels.prefetch import AheadFeed
from student_trainer.labels.source import LabelUsage
from student_trainer.losses.term import FfnTap, LossTerm
from student_trainer.losses.total import check_needs, signals_of, taps_of
from student_trainer.model.forward import blocks_of
from student_trainer.model.load import Student, load_student
from student_trainer.model.packing_probe import check_packing
from student_trainer.model.saving import saved_bytes, state_bytes
from student_trainer.model.speed import compiled
from student_trainer.rollout.publication.publishing import PublishAfterSteps, open_publishing
from student_trainer.teachers.connect import Connection, connections
from student_trainer.teachers.feeds import open_training_feed
from student_trainer.teachers.meeting.described import meet
from student_trainer.teachers.session import TeacherSession, open_sessions
from student_trainer.teachers.trial import try_labels
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.checkpoints.broken_off import leave_in_order
from student_trainer.training.checks import check_folder, check_requests, check_room, check_rows, check_settings
from student_trainer.training.curriculum.ranking import IDENTITY as RANKING
from student_trainer.training.curriculum.ranking import read_ranking, run_order, run_ranking
from student_trainer.training.identity import learned_from
from student_trainer.training.joined.teachers import JoinedTeachers, shared_vocabulary
from student_trainer.training.layer_terms import told_weight
from student_trainer.training.objective import Objective
from student_trainer.training.offline.held import check_offline
from student_trainer.training.on_policy.checks import check_rollouts, plan_of
from student_trainer.training.on_policy.named import NamedAhead
from student_trainer.training.on_policy.rollouts import Rollouts
from student_trainer.training.reporting.console import ConsoleProgress
from student_trainer.training.reporting.layers import LayerReport
from student_trainer.training.reporting.out_of_memory import is_out_of_memory, what_to_lower
from student_trainer.training.run_folder import (
    FINAL_NAME,
    IDENTITY_NAME,
    AlreadyFinished,
    RunResult,
    finish,
    leave_no_trace,
    open_folder,
    pinned_date,
    result_of,
    settled_labels,
)
from student_trainer.training.tracking.card import write_card
from student_trainer.training.tracking.hub import push
from student_trainer.training.tracking.trackers import Tracker, make_trackers
from student_trainer.training.trainer import DistillationTrainer, training_arguments
from student_trainer.training.windows import SOURCES


def train(
    config: TrainConfig,
    *,
    resume: bool | Path = False,
    console: Console | None = None,
    allow_other_teachers: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Trains a student as `config` says.

    Args:
        config: the run.
        resume: go on from the newest complete checkpoint in `run.output_dir`, if there is one; or from this checkpoint of it: newer ones
            are set aside.
        console: where progress is shown.
        allow_other_teachers: go on although the teachers, or what they are, have changed since the run was started.
        callbacks: transformers callbacks that watch the run, beside the trackers of `train.report_to`.

    Raises:
        StudentError, TeacherWireError: something a user can mend; nothing is left half-written.
    """
    console = console or Console(stderr=True)
    torch.set_num_threads(config.model.threads)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over logits for nobody
    note = partial(_note, console)
    findings = Findings(on_advice=note)
    findings.add(check_settings(config))
    trackers = make_trackers(config, note)
    folder = config.run.output_dir
    with FolderLock(folder, note) as lock:
        findings.add(check_folder(config, bool(resume)))
        if isinstance(resume, Path):
            checkpoint.check_chosen(folder, resume)
        if folder.is_dir():
            lock.acquire()
        with connections(config.every_teacher, console, config.run.cache_dir) as reached:
            student = load_student(config.model, config.run.seed)
            for told in student.notes:
                note(told)
            if config.train.packing:
                check_packing(student)
                student.shares_rows, student.is_graphed = True, False  # a recorded pass reads token ids alone
            outline, pinned = student.outline, pinned_date(config) if resume else None
            load = partial(load_run_data, config, student.tokenizer, console, pinned)
            read = load()
            findings.add(check_rows(config, outline, *read))
            (data, held_out), described = meet(config, reached, outline, read, partial(load, tells=True), console)
            if data is not read[0]:
                findings.add(check_rows(config, outline, data, held_out))
            settled = settled_labels(config) if resume else None
            sessions = open_sessions(
                config, reached, outline, data, held_out, console, findings, settled, described=described
            )
            findings.add(check_offline(config, sessions, data, held_out))
            try:
                result = _run(
                    config, student, data, held_out, sessions, reached, resume, console, lock, trackers, findings,
                    allow_other_teachers, callbacks,
                )  # fmt: skip
            except AlreadyFinished:
                console.print("the run is finished: nothing to resume")
                result = result_of(folder, lambda said: console.print(f"[yellow]note:[/] {escape(said)}"))
    if config.train.push_to_hub:
        console.print(f"on the hub: {push(config, folder / FINAL_NAME)}", markup=False)
    return result


def _note(console: Console, told: str) -> None:
    console.print(f"[yellow]note:[/] {escape(told)}")


def _run(
    config: TrainConfig,
    student: Student,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    sessions: list[TeacherSession],
    reached: list[Connection],
    resume: bool | Path,
    console: Console,
    lock: FolderLock,
    trackers: list[Tracker],
    findings: Findings,
    allow_other_teachers: bool,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    kept = read_ranking(config.run.output_dir) if resume else None
    ranking = run_ranking(config, sessions, data, console, kept)
    order = run_order(config, data, ranking, console)
    vocab_rows = shared_vocabulary(sessions, _own_rows(student))
    joined = JoinedTeachers.of(config, sessions, config.run.output_dir, partial(_note, console))
    # A run with one teacher learns from the feed of its session, one with several from a feed of all sessions.
    learned = sessions[0] if sessions and config.loss.output is not None else None
    features = learned.features if learned and not joined else None
    of_layers = features.signals.values() if features else ()
    output_signals = (
        tuple(signal for signal in learned.spec.signals if signal not in of_layers) if learned and not joined else ()
    )
    objective = Objective(config.loss, vocab_rows, output_signals, features, order.steps)
    terms = joined.terms(objective, student) if joined else objective.terms(student)
    if told := joined.told_weight(objective, student) if joined else told_weight(objective, student):
        _note(console, told)
    if any(isinstance(tap, FfnTap) for tap in taps_of(terms)) and compiled.is_installed(student.model):
        _note(console, "the blocks whose FFN loss.ffn reads run as they are, not compiled")
    if not joined:
        blocks = len(blocks_of(student.body)) if taps_of(terms) else 0
        check_needs(terms, learned.info.name if learned else None, learned.info.transports if learned else (), blocks)
    if learned and not joined:
        learned = _asking(learned, terms, data)
        sessions = [learned, *sessions[1:]]
    findings.add(check_requests(config, sessions, data, held_out, order))
    publishing = open_publishing(config, student, learned, reached, partial(_note, console))
    findings.add(check_rollouts(config, student.outline.positions, data, order, sessions))
    arguments = training_arguments(config, order.steps, evaluates=held_out is not None)
    folder, settings = config.run.output_dir, config.train
    checkpoint_bytes = state_bytes(student.model) if settings.save_steps else 0
    keeps_best = held_out is not None and settings.eval_steps > 0
    findings.add(
        check_room(
            folder, checkpoint_bytes, saved_bytes(student.model), settings.keep_checkpoints, keeps_best=keeps_best
        )
    )
    moved = partial(publishing.origin, config.run.output_dir) if publishing else _fingerprint
    identity = learned_from(config, student, data, held_out, sessions, moved)
    identity |= {RANKING: ranking.identity} if ranking else {}
    rollouts, plan = None, plan_of(config, order)
    if learned and plan and plan.has_any:
        rollouts = Rollouts(config, student, data, order, plan, sessions, vocab_rows, partial(_note, console))
        terms = [*terms, rollouts.term]
    windows = rollouts.windows if rollouts else SOURCES["data"](data, order)
    try:
        with disk_trouble_named(f"run.output_dir {folder}"):
            lock.acquire()
        findings.add(check_folder(config, bool(resume)))  # another run may have been here since
    except BaseException:
        if rollouts:
            rollouts.close()  # its engine may be a process
        raise
    is_new = not (folder / IDENTITY_NAME).is_file()
    trainer = publisher = None
    progress = ConsoleProgress(console, folder.name)
    try:
        start = open_folder(config, identity, resume, console, order.steps, allow_other_teachers=allow_other_teachers)
        keep_bad_rows(folder, data, held_out, console)
        if ranking and ranking is not kept:
            with disk_trouble_named(f"run.output_dir {folder}"):
                ranking.keep(folder)
        if publishing:
            begun = checkpoint.step_of(start) * order.accumulation if start else 0
            publisher, learned = publishing.begin(folder, learned, begun, partial(_note, console))
            sessions = [learned, *sessions[1:]] if learned else sessions
        if rollouts:
            rollouts.begin(start)
        if joined:
            joined.ledger.cut(checkpoint.step_of(start) if start else 0)
        named = NamedAhead(rollouts.windows) if rollouts and config.labels.extra_ids else None
        provided = ProvidedRequests() if learned and config.labels.extra_ids and not named else None
        feed: Callable[[int], AheadFeed[Any]] | None = None
        if joined:
            feed = partial(joined.open_feed, windows)
        elif learned:
            feed = partial(open_training_feed, config, learned, named or windows, provided)
        handed_to = named or provided
        trainer = DistillationTrainer(
            config,
            student,
            windows,
            terms,
            arguments=arguments,
            open_feed=feed,
            ask=handed_to.put if handed_to else None,
            teacher_head=learned.head if learned else None,
            joiner=joined.joiner() if joined else None,
            measure=measuring(config, student, held_out, sessions, vocab_rows, partial(_note, console))
            if held_out
            else None,
            callbacks=[*([rollouts] if rollouts else []), progress, *trackers, *callbacks],
            on_trouble=partial(_note, console),
        )
        trainer.keep_beside = rollouts.save if rollouts else None
        trainer.try_saving()
        if publisher and config.on_policy and config.on_policy.publish:
            trainer.add_callback(PublishAfterSteps(publisher, config.on_policy.publish.every, trainer.settle))
            trainer.add_callback(trainer.pop_callback(trainer.stopping))  # the last one, as before
        layers = None
        if joined:
            learned = joined.of_features
            features = learned.features if learned else None
        if learned and features:
            of_features = [term for term in terms if term.name in features.pairs]
            layers = LayerReport(student, learned, of_features, held_out or data, folder)
            layers.begin(resumed=start is not None)
        with told_first(trainer.stopping.asked):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        trainer.save_final(folder / FINAL_NAME)  # before anything else can go wrong
        if publisher:
            publisher.close(wait=True)
            publisher.check()
        metrics = trainer.last_metrics() if held_out else {}
        if keeps_best:
            trainer.point_links()  # the last step may be the best, and is measured now
        if layers:
            layers.end()
        if joined:
            joined.end()
    except BaseException as error:
        if trainer is not None:
            leave_in_order(error, trainer, sessions, joined, partial(_note, console))
        if is_out_of_memory(error):
            raise RunError(_told_of_memory(config, error, trainer)) from error
        raise
    finally:
        progress.close()
        for tracker in trackers:
            tracker.close()
        if publisher is not None:
            publisher.close(wait=False)
        if trainer is not None:
            trainer.close()
        if rollouts:
            rollouts.close()
        if is_new and (trainer is None or not trainer.state.global_step):
            leave_no_trace(folder)  # of a run that has learned nothing
    with disk_trouble_named(f"the model card in {folder / FINAL_NAME}"):
        curve = trainer.state.log_history
        write_card(folder / FINAL_NAME, config, student, data, held_out, sessions, curve, metrics)
    result = finish(folder, trainer.state.global_step, metrics)
    return replace(result, usage=_usage_of(sessions), label_bytes=_label_bytes(sessions)) if sessions else result


def _asking(session: TeacherSession, terms: list[LossTerm], data: TokenizedDataset) -> TeacherSession:
    """The session whose requests hold every signal that the terms need, tried with a small one if these are more than were agreed on."""
    signals = signals_of(terms)
    if set(signals) <= set(session.spec.signals):
        return session
    spec = replace(session.spec, signals=signals, check="all")

    async def tried() -> None:
        async with session.service.connect() as client:
            await try_labels(
                partial(session.service.source, session.info, connect=lambda: client), spec, data, session.reading
            )

    event_loop.run(tried())
    return replace(session, spec=spec)


def _usage_of(sessions: list[TeacherSession]) -> LabelUsage:
    """Where the labels of all sessions came from."""
    usage = LabelUsage()
    for session in sessions:
        usage.add(session.service.usage)
    return usage


def _label_bytes(sessions: list[TeacherSession]) -> int | None:
    """Bytes of the labels that this process has read from its label store or written to it; None where labels are not kept."""
    stores = {id(store): store for session in sessions if (store := session.service.store) is not None}
    return sum(store.stats.read_bytes + store.stats.written_bytes for store in stores.values()) if stores else None


def _told_of_memory(config: TrainConfig, error: BaseException, trainer: DistillationTrainer | None) -> str:
    step = trainer.state.global_step + 1 if trainer else 1
    shape = f" ({trainer.batch_shape})" if trainer and trainer.batch_shape else ""
    return f"out of memory in step {step}{shape}: {' '.join(str(error).split())[:200]}; {what_to_lower(config, 'training')}"


def _fingerprint(session: TeacherSession) -> str:
    return session.info.fingerprint


def _own_rows(student: Student) -> int:
    return min(student.vocab_rows, len(student.tokenizer))
