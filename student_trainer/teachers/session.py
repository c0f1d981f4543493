"""The teachers of a run: one `TeacherSession` for each, opened before step 0.

In: a config, connections, the student and its data; out: a list of sessions to learn from. What cannot work ends here by the name of
the setting: the handshake, the choice of signals, the output head, and one small request that takes the whole way of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from rich.console import Console
from rich.markup import escape

from student_trainer.config.features import FeatureConfig
from student_trainer.config.run import TrainConfig
from student_trainer.config.teachers import LabelConfig, OneOfTeachersConfig, TeacherConfig, WhenMissing
from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.data.inputs import routing_of
from student_trainer.data.teacher_view import TeacherView
from student_trainer.findings import Finding, Findings
from student_trainer.labels import event_loop
from student_trainer.labels.rows_on_device import head_on
from student_trainer.labels.service import LabelService, store_of
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.head import Head
from student_trainer.model.load import Outline
from student_trainer.teachers.artifact_cache import fetch_artifact, fetch_head
from student_trainer.teachers.choose import measured_by
from student_trainer.teachers.connect import Connection
from student_trainer.teachers.features import FeaturePlan, plan_features
from student_trainer.teachers.handshake import StudentFacts, agree, is_bridged, shared_rows
from student_trainer.teachers.loss_checks import check_loss
from student_trainer.teachers.meeting.bridges import check_bridged
from student_trainer.teachers.meeting.described import (
    Described,
    DiskTrouble,
    Trouble,
    describe_all,
    facts_of,
    layers_of,
    student_rows,
)
from student_trainer.teachers.offline.checks import check_offline_labels
from student_trainer.teachers.offline.record import keep_record
from student_trainer.teachers.rows.bridging import Bridging, teacher_rows, tell_coverage
from student_trainer.teachers.rows.reading import AskedRows, BridgePlan, Reading
from student_trainer.teachers.trial import choose_labels, try_labels
from teacher_wire.artifacts.kinds.layer_basis import LayerBasis
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import LAYER_BASIS, TeacherInfo
from teacher_wire.core.signals import SignalSpec
from teacher_wire.endpoint.client import TeacherClient


@dataclass(frozen=True)
class TeacherSession:
    """One teacher of a run, its handshake done.

    Attributes:
        connection: how to reach it, and for how long to wait for it.
        info: its description; `info.fingerprint` is its identity.
        vocab_rows: V, ids that it, the student and the tokenizer share.
        labels: as configured, or as `auto` chose them.
        spec: the signal to train on.
        measuring: the signal to measure KL with, exact where the teacher offers one; None without held-out data.
        head: its output head on the student's device, if one of the signals needs it.
        service: where its labels are asked for and kept.
        features: what is learned from its layers, whose signals `spec` asks for too; None if nothing is.
        reading: how it reads the rows, and which of them; by it `name`, `bridge`, `responsible`, `request` and `asked`.
        weight: its share, beside those of the others that are asked about the same row.
        when_missing: what is done while it does not answer.
    """

    connection: Connection
    info: TeacherInfo
    vocab_rows: int
    labels: LabelConfig
    spec: SignalSpec
    measuring: SignalSpec | None
    head: Head | None
    service: LabelService
    features: FeaturePlan | None = None
    reading: Reading = field(default_factory=lambda: Reading(""))
    weight: float = 1.0
    when_missing: WhenMissing = "wait"

    @property
    def name(self) -> str:
        """What the run calls it."""
        return self.reading.name

    @property
    def tags(self) -> tuple[str, ...]:
        """Of the rows that it is asked about; empty for all, or for those that nobody else claims."""
        routing = self.reading.routing
        return dict(routing.tags_of)[self.name] if routing is not None else ()

    @property
    def bridge(self) -> BridgePlan | None:
        """To a teacher with another tokenizer; None for the student's."""
        return self.reading.bridge

    def responsible(self, example: Example) -> bool:
        """Whether it is asked about a row."""
        return self.reading.responsible(example)

    def request(self, examples: Sequence[Example]) -> LabelRequest | None:
        """What it is asked about the examples of a micro-batch; None if about none of them."""
        return self.reading.request(examples)

    def views(self, data: TokenizedDataset) -> Iterator[TeacherView]:
        """The rows that it is asked about, as it reads them."""
        return (self.reading.view(row.example) for row in data if self.responsible(row.example))

    def asked(self, examples: Sequence[Example]) -> AskedRows | None:
        """`request`, with what of the micro-batch the answer is about."""
        return self.reading.asked(examples)


def open_sessions(
    config: TrainConfig,
    connections: Sequence[Connection],
    student: Outline,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    console: Console,
    findings: Findings,
    settled: Sequence[LabelConfig | None] | None = None,
    *,
    only_stores: bool = False,
    keeps: bool = False,
    described: Sequence[Described] | None = None,
) -> list[TeacherSession]:
    """Opens a session with each teacher that the run asks anything.

    Args:
        config: the run.
        connections: one per teacher of the config, in its order.
        student: who is to learn.
        data, held_out: what from, and what it is measured with.
        console: told what was agreed.
        findings: of the checks made here.
        settled: what `labels.transport: auto` chose for each teacher before; None for one of which nothing was.
        only_stores: nothing will be computed with the labels, so that no output head is needed.
        keeps: with `only_stores`: fetch all the same what a run needs beside labels, so that it is on disk; offline teachers are passed over.
        described: what each teacher said of itself, if it was asked already (`describe_all`).

    Returns:
        The sessions in the order of the config. A teacher that neither a loss nor an evaluation asks has none, nor has one whose
        findings are bad.

    Raises:
        ConfigError, TeacherWireError: what cannot work, by the name of the setting, if the findings stop there.
    """
    if not connections:
        return []
    on_disk_trouble = DiskTrouble(console)
    store = store_of(config, on_disk_trouble)
    routing = routing_of(config)
    chosen: list[LabelConfig | None] = [*settled] if settled else [None] * len(connections)
    sessions = []
    every = described or describe_all(config, connections, console)
    facts = facts_of(config, student, data, held_out)
    scaffold = layers_of(config, every, facts)
    own_rows = student_rows(every, facts)
    for settings, connection, labels, found in zip(config.every_teacher, connections, chosen, every, strict=True):
        if keeps and settings.offline:
            continue
        several = settings.called if len(connections) > 1 else ""
        connect = partial(connection.client, Trouble(console, several), config.feed.window_mb << 20)
        name = settings.called or (found.name if isinstance(found, TeacherInfo) else "")
        opening = _Opening(
            config, settings, connection, student, facts, data, held_out, console, findings,
            LabelService(connect, store if config.keeps_labels(settings) else None), on_disk_trouble, only_stores, keeps,
            found, Reading(name, routing), scaffold.get(settings.called, {}), own_rows,
        )  # fmt: skip
        opened = findings.attempt(
            f"teachers.{several}" if several else "teacher",
            partial(_run, opening, labels, several),
            "the teacher is known by its record"
            if connection.offline
            else f"the server at {connection.address} answers",
        )
        sessions += [opened] if opened is not None else []
    return sessions


def _run(opening: _Opening, settled: LabelConfig | None, several: str) -> TeacherSession | None:
    """The session; what the wire says of one of several teachers begins with its name: they may share a server."""
    try:
        return event_loop.run(opening.run(settled))
    except TeacherWireError as error:
        if several and repr(several) not in error.message:
            error.message = f"teacher {several!r}: {error.message}"
        raise


@dataclass(frozen=True)
class _Opening:
    """One session on its way; the fields are those of `open_sessions`, for one teacher."""

    config: TrainConfig
    settings: TeacherConfig
    connection: Connection
    student: Outline
    facts: StudentFacts
    data: TokenizedDataset
    held_out: TokenizedDataset | None
    console: Console
    findings: Findings
    service: LabelService
    on_disk_trouble: Callable[[str], None]
    only_stores: bool
    keeps: bool
    described: Described
    reading: Reading
    layers: Mapping[str, FeatureConfig]
    own_rows: int

    async def run(self, settled: LabelConfig | None) -> TeacherSession | None:
        """The session; None if nothing asks this teacher, or a finding says why it cannot be."""
        if not isinstance(self.described, TeacherInfo):
            raise self.described
        info = self.described
        async with self.service.connect() as client:
            output, labels = self.config.loss.output, settled or self.config.labels_of(self.settings)
            if output is None and not self.held_out:
                return None
            if self.is_bridged:
                opening = await self._bridged(client, info, labels)
                return None if opening is None else await opening._agreed(client, info, labels)
            return await self._agreed(client, info, labels)

    @property
    def _only_looks(self) -> bool:
        """Whether nothing is needed but labels: neither here, nor on disk."""
        return self.only_stores and not self.keeps

    @property
    def is_bridged(self) -> bool:
        """Whether the teacher has another tokenizer than the student, and can be learned from all the same."""
        return is_bridged(self.described, self.facts)

    async def _bridged(self, client: TeacherClient, info: TeacherInfo, labels: LabelConfig) -> _Opening | None:
        """The same opening with a bridge to the teacher; None if a finding says why it cannot be."""
        name = self.reading.name
        if not self.findings.add(check_bridged(self.config, self.settings, name, labels, self.layers)):
            return None
        every = [row.example for rows in (self.data, self.held_out) if rows is not None for row in rows]
        claimed = [example for example in every if self.reading.is_claimed(example)]
        bridging = Bridging(
            self.config, self.settings.cross_tokenizer, self.student, self.own_rows, claimed, self.console,
            self.on_disk_trouble,
        )  # fmt: skip
        plan = await bridging.build(client, info, only_rows=self._only_looks)
        tell_coverage(name, plan, claimed, self.settings.cross_tokenizer.min_coverage, self.console)
        return replace(self, reading=replace(self.reading, bridge=plan))

    async def _agreed(self, client: TeacherClient, info: TeacherInfo, labels: LabelConfig) -> TeacherSession | None:
        output, asked_for = self.config.loss.output, labels.transport
        if not self.findings.add(check_offline_labels(self.settings, info, labels)):
            return None
        if labels.transport == "auto":
            labels, why = await choose_labels(
                client, self.service, info, self._rows(info), self.config, self.data, self.student.device, self.reading, labels
            )  # fmt: skip
            of = f" of {self.reading.name}" if len(self.config.every_teacher) > 1 else ""
            self.console.print(f"labels{of} by {labels.transport}: {why}", markup=False)
        measuring = spec = None
        if self.held_out and self._are_any(self.held_out, "data.eval"):
            measuring = spec = self._measuring(info, labels, self.held_out)
            if measuring is None:
                return None
        if output is not None:
            if asked_for == "auto" and not self.findings.add(check_loss(self.config.loss, labels)):
                return None
            if not self._are_any(self.data, "data.train"):
                return None
            spec = self._agree(info, labels, f"loss.output ({output.divergence})")
        if spec is None:
            return None
        features = None
        if self.layers:
            features = await self._features(client, info, spec.vocab_rows)
            if features is None:
                return None
            spec = replace(spec, signals=(*spec.signals, *features.signals.values()))
        head = None
        if not self._only_looks and "hidden" in (*spec.kinds, *(measuring.kinds if measuring else ())):
            head = await self._head(client, info, spec)
        if self.connection.offline is None:  # else it is tried once its labels have been seen to be there
            tried_on = self.data if output is not None or self.held_out is None else self.held_out
            await try_labels(partial(self.service.source, info, connect=lambda: client), spec, tried_on, self.reading)
            if self.service.store is not None:
                keep_record(self.config.run.cache_dir, info, self.connection.place, self.on_disk_trouble)
        self._tell(info, spec)
        weight = self.settings.weight if isinstance(self.settings, OneOfTeachersConfig) else 1.0
        return TeacherSession(
            self.connection, info, self.own_rows if self.is_bridged else spec.vocab_rows, labels, spec, measuring, head, self.service, features,
            self.reading, weight, self.config.when_away(self.settings),
        )  # fmt: skip

    def _agree(self, info: TeacherInfo, labels: LabelConfig, asked_by: str) -> SignalSpec | None:
        return agree(
            info,
            self.facts,
            labels,
            self.findings,
            asked_by=asked_by,
            longest=_longest(self.reading, self.data, self.held_out),
            allow_template_mismatch=self.settings.allow_template_mismatch,
            bridged_rows=teacher_rows(info) if self.is_bridged else None,
        )

    def _rows(self, info: TeacherInfo) -> int:
        """V of the teacher's labels."""
        return teacher_rows(info) if self.is_bridged else shared_rows(info, self.facts)

    def _are_any(self, rows: TokenizedDataset, setting: str) -> bool:
        """Whether the teacher is asked about any of these rows."""
        count = sum(self.reading.responsible(row.example) for row in rows)
        if self.reading.routing is None and self.reading.bridge is None:
            return True
        told = f"teacher {self.reading.name!r} is asked about {count:,} of {len(rows):,} rows of {setting}"
        if count:
            return self.findings.add([Finding.good(setting, told)])
        if setting == "data.eval":
            self.findings.add([Finding.good(setting, told, f"{told}: nothing is measured with it")])
        else:
            tags = ", ".join(dict(self.reading.routing.tags_of)[self.reading.name]) if self.reading.routing else ""
            fix = f"its tags are {tags}: leave it out, or give rows one of them" if tags else "leave it out"
            self.findings.add([Finding.bad("teachers", told, fix)])
        return False

    def _measuring(self, info: TeacherInfo, labels: LabelConfig, held_out: TokenizedDataset) -> SignalSpec | None:
        exact = measured_by(self.config, info, labels, self._rows(info), held_out, self.reading)
        spec = self._agree(info, exact, "evaluation")
        if exact.transport in ("top_k", "given"):
            advice = (
                f"kl_to_teacher is not measured: labels.transport={labels.transport} keeps the teacher's head off "
                "the card, and all logits of a batch of held-out rows are not offered or above the limits (train.eval_batch_size)"
            )
            self.findings.add([Finding.good("labels.transport", "held-out rows are measured without a KL", advice)])
        return spec

    async def _features(self, client: TeacherClient, info: TeacherInfo, vocab_rows: int) -> FeaturePlan | None:
        """What is asked of the teacher's layers, and the basis that their states travel in; None if a finding says why it cannot be."""
        plan = self.findings.attempt(
            "loss",
            lambda: plan_features(self.layers, info, vocab_rows, self.student.blocks),
            f"teacher {info.name!r} gives what {', '.join(f'loss.{name}' for name in self.layers)} ask for",
        )
        if plan is None or self._only_looks or not plan.needs_basis:
            return plan
        with self.console.status(f"fetching the basis of the layers of {info.name}"):
            fetched = await fetch_artifact(
                client,
                info,
                info.artifact(LAYER_BASIS),
                self.config.run.cache_dir,
                on_trouble=self.on_disk_trouble,
                max_bytes=round(self.config.cache.heads_gb * 2**30),
            )
        return replace(plan, basis=LayerBasis.of(fetched))

    async def _head(self, client: TeacherClient, info: TeacherInfo, spec: SignalSpec) -> Head | None:
        with self.console.status(f"fetching the output head of {info.name}"):
            fetched = await fetch_head(
                client,
                info,
                self.config.run.cache_dir,
                on_trouble=self.on_disk_trouble,
                max_bytes=round(self.config.cache.heads_gb * 2**30),
            )
        return None if self.only_stores else head_on(fetched, spec.vocab_rows, self.student.device)

    def _tell(self, info: TeacherInfo, spec: SignalSpec) -> None:
        if self.facts.tokens and info.tokenizer_sha256 != self.facts.tokenizer_sha256 and not self.is_bridged:
            self.console.print(
                f"[yellow]note:[/] teacher {escape(info.name)}: {escape(self.facts.tokens.same_as(info))}"
            )
        self.console.print(
            f"teacher {self.reading.name} {'offline' if self.connection.offline else f'at {self.connection.address}'}: {info.architecture} {info.dtype}, "
            f"labels by {spec.name}",
            markup=False,
        )


def _longest(reading: Reading, data: TokenizedDataset, held_out: TokenizedDataset | None) -> tuple[str, int]:
    """Name and tokens of the longest sequence that the teacher is asked about, as it is asked it."""
    every = [row.example for rows in (data, held_out) if rows is not None for row in rows]
    sizes = [
        (example.key, int(reading.view(example).token_ids.size)) for example in every if reading.responsible(example)
    ]
    return max(sizes, key=lambda size: size[1])
