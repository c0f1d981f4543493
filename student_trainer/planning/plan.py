"""A run before it is one: its config, some rows, its memory, its traffic, its teachers, and all that is wrong with it.

In: a config; out: a `Plan`. Its teachers are asked for a few labels; no weights are loaded unless asked for, and nothing is written but the
caches. What cannot be known is said to be unknown, by a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console

from student_trainer.config.run import TrainConfig, dump_config
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.data.inputs import order_of
from student_trainer.errors import StudentError
from student_trainer.findings import Finding, Findings
from student_trainer.model.load import Outline
from student_trainer.planning.budget import WayOut, cheapest_under
from student_trainer.planning.coverage import Looking, TeacherCoverage, settings_of
from student_trainer.planning.estimate.parts import Estimate
from student_trainer.planning.memory import Card, Memory
from student_trainer.planning.resumption import check_resumption
from student_trainer.planning.samples import Sample, samples_of
from student_trainer.planning.step_time import StepTime, measure_step
from student_trainer.planning.traffic import Traffic, traffic_of
from student_trainer.progress import working
from student_trainer.teachers.session import TeacherSession
from student_trainer.training.checks import all_findings
from teacher_wire.core.info import TeacherInfo

_NAMED = 5  # rows left out that are named


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for beside the findings.

    Attributes:
        resume: whether the run is to go on from a checkpoint.
        allow_other_teachers: with it, although the teachers have changed.
        samples: rows that are shown.
        card: memory of the card that is planned for, as "24GiB"; None for this machine's.
        budget: that the run is to stay under, in bytes; None for no limit.
        budget_text: as it was written.
        measure: load the student and time some steps.
    """

    resume: bool = False
    allow_other_teachers: bool = False
    samples: int = 5
    card: str | None = None
    budget: int | None = None
    budget_text: str | None = None
    measure: bool = False


@dataclass(frozen=True)
class Rows:
    """The rows of a run.

    Attributes:
        rows, tokens, targets: learned from in an epoch; targets are supervised tokens.
        held_out: rows that are measured with.
        longest: tokens.
        steps, micro_batches: of the run.
        epochs: passes over the data.
        refused: bad rows that are left out (`data.bad_rows: skip`), and the first of them.
        overlong: rows left out as longer than `data.max_tokens`, and the first of them.
    """

    rows: int
    tokens: int
    targets: int
    held_out: int
    longest: int
    steps: int
    micro_batches: int
    epochs: float
    refused: int
    refused_first: tuple[str, ...]
    overlong: int
    overlong_first: tuple[str, ...]


@dataclass
class Plan:
    """See module.

    Attributes:
        config: resolved, as YAML with every default written out.
        findings: good and bad, in the order of the checks.
        coverage: of every teacher with another tokenizer.
        rows: None if they cannot be read.
        samples: some of them, as their readers see them.
        card: that is planned for.
        memory: on it; None if it cannot be estimated.
        way_out: the cheapest settings under the budget, if the run is above it and there are any.
        over_budget: whether the run is above it.
        teachers: what each says of itself, by its name in the run.
        traffic: labels, of each teacher.
        step: of the student, measured; None if it was not.
    """

    config: str
    findings: tuple[Finding, ...] = ()
    coverage: tuple[TeacherCoverage, ...] = ()
    rows: Rows | None = None
    samples: tuple[Sample, ...] = ()
    card: Card | None = None
    memory: Estimate | None = None
    way_out: WayOut | None = None
    over_budget: bool = False
    teachers: dict[str, TeacherInfo] = field(default_factory=dict)
    traffic: tuple[Traffic, ...] = ()
    step: StepTime | None = None

    @property
    def can_start(self) -> bool:
        """Whether no finding is bad."""
        return all(finding.ok for finding in self.findings)

    @property
    def hours(self) -> tuple[float | None, float | None]:
        """Of the run: as long as its teachers take if nothing else does, and as long as its student takes; None where it is unknown.

        Requests of several teachers go side by side, and all of them go ahead of the student: a run takes about the larger of the two.
        """
        asked = [traffic.run_s for traffic in self.traffic]
        teachers = max((s for s in asked if s is not None), default=None)
        student = None
        if self.step is not None and self.rows is not None:
            student = self.step.micro_batch_s * self.rows.micro_batches / 3600
        return None if teachers is None else teachers / 3600, student


def plan(config: TrainConfig, console: Console, asked: Asked = Asked()) -> Plan:
    """Makes every check of a run that it can, and estimates what it takes.

    Args:
        config: the run.
        console: told of the data, the teachers and what is being measured.
        asked: beside that.

    Raises:
        ConfigError: `asked.card` is no size.
    """
    made = Plan(dump_config(config), card=Card.of(asked.card, asked.budget_text))

    def look(
        findings: Findings,
        student: Outline,
        data: TokenizedDataset,
        held_out: TokenizedDataset | None,
        sessions: Sequence[TeacherSession],
    ) -> None:
        made.rows = _rows(config, data, held_out)
        made.teachers = {session.name or session.info.name: session.info for session in sessions}
        if asked.resume:
            findings.add(
                check_resumption(config, data, held_out, sessions, allow_other_teachers=asked.allow_other_teachers)
            )
        coverage = []
        for session in sessions:
            if session.bridge is not None:
                looked = Looking(config, settings_of(config, session), student, data, held_out, session, console)
                found = findings.attempt(
                    "cross_tokenizer", looked.coverage, f"what teacher {session.name!r} can teach is known"
                )
                coverage.extend([] if found is None else [found])
        made.coverage = tuple(coverage)
        tables = {taught.name: taught.table for taught in coverage}
        made.samples = tuple(samples_of(data, asked.samples, student.tokenizer, sessions, tables))
        _look_at_memory(made, Memory(config, student, data, sessions, _card(made)), findings, asked.budget, console)
        traffic = []
        for session in sessions:
            if config.loss.output is None:
                continue
            with working(console, f"measuring teacher {session.name or session.info.name}"):
                setting = "teacher" if len(sessions) == 1 else f"teachers.{session.name}"
                weighed = findings.attempt(
                    setting, partial(traffic_of, config, session, data), "it labels micro-batches of this run"
                )
            traffic += [weighed] if weighed is not None else []
        made.traffic = tuple(traffic)
        if asked.measure:
            with working(console, "loading the student and measuring some steps"):
                made.step = findings.attempt("model", lambda: measure_step(config, data), "some steps were measured")

    made.findings = tuple(all_findings(config, console, resume=asked.resume, look=look))
    return made


def _card(made: Plan) -> Card:
    assert made.card is not None
    return made.card


def _look_at_memory(made: Plan, memory: Memory, findings: Findings, budget: int | None, console: Console) -> None:
    """The estimate, whether it fits the card and the budget, and the way under them."""
    config, card = memory.config, memory.card
    if config.on_policy is not None:
        told = "the engine that writes rollouts is not in the estimate of memory, nor are rollouts in that of time"
        findings.add([Finding.good("on_policy", "rollouts are not estimated", f"rollouts are not estimated: {told}")])
    with working(console, "estimating the memory of a step"):
        try:
            made.memory = memory.of(config)
        except StudentError as error:
            findings.add([Finding.good("model", "memory is unknown", f"memory is unknown: {error}")])
            return
        needed, limit = made.memory.on_card, card.bytes if budget is None else budget
        made.over_budget = budget is not None and needed > budget
        if needed <= limit:
            findings.add([Finding.good("memory", f"{_gib(needed)} of {_gib(limit)} will be needed at the peak")])
            return
        made.way_out = cheapest_under(memory, limit)
    way = made.way_out
    fix = (
        f"{way.overrides} would take {_gib(way.estimate.on_card)}"
        if way is not None
        else "no change of chunks, checkpointing, batch or adapters brings it under that: take a smaller student or data.max_tokens"
    )
    what = f"about {_gib(needed)} will be needed at the peak, above {_gib(limit)} of " + (
        "the budget" if budget is not None else card.name
    )
    findings.add([Finding.good("memory", what, f"{what}: {fix}")])


def _rows(config: TrainConfig, data: TokenizedDataset, held_out: TokenizedDataset | None) -> Rows:
    order = order_of(config, data)
    both = [data, *([held_out] if held_out is not None else [])]
    bad = [f"{row.file}:{row.line}: {row.reason}" for rows in both for row in rows.bad_rows]
    long = [f"{row.key}: {row.tokens:,} tokens" for rows in both for row in rows.dropped]
    return Rows(
        len(data), data.tokens, data.target_tokens, len(held_out) if held_out else 0, data.longest, order.steps, order.batches,
        order.epoch_at(order.steps), len(bad), tuple(bad[:_NAMED]), len(long), tuple(long[:_NAMED]),
    )  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
