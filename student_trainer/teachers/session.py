"""Meeting the teacher: who it is, what it can give, and the feeds that will bring it; all before step 0.

In: a config, the student and its data; out: a `Teacher` to learn from. What cannot work ends here by the name of the setting:
handshake, sizes of every request of the run, and one small request through everything.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.markup import escape

from student_trainer.config.run import LabelConfig, TeacherConfig, TrainConfig, labels_folder
from student_trainer.data.batch_plan import RunOrder, by_length
from student_trainer.data.dataset import TokenizedDataset
from student_trainer.errors import ConfigError
from student_trainer.labels import event_loop
from student_trainer.labels.device_transfer import LabelTensors
from student_trainer.labels.late_requests import ProvidedRequests
from student_trainer.labels.packing import pack
from student_trainer.labels.prefetch import LabelFeed
from student_trainer.labels.rows_on_device import head_on
from student_trainer.labels.service import LabelDesk
from student_trainer.labels.source import LabelRequest, LabelSource
from student_trainer.losses.head import Head
from student_trainer.model.load import Outline
from student_trainer.teachers.choose import Probe, choose
from student_trainer.teachers.connect import check_way, connector
from student_trainer.teachers.embedded import embedded_teacher
from student_trainer.teachers.handshake import StudentFacts, agree, shared_rows
from student_trainer.teachers.head_cache import fetch_head
from student_trainer.teachers.loss_checks import check_loss, is_softened
from teacher_wire.core.errors import TeacherWireError
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec, TeacherSignals
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.labels.store import LabelStore
from teacher_wire.score.signals import spec_of


@dataclass(frozen=True)
class Teacher:
    """The teacher of a run, agreed with.

    Attributes:
        labels: as configured, or as `auto` chose them.
        spec: the signal to train on.
        measuring: the signal to measure KL with, exact where the teacher offers one; None without held-out data.
        head: on the student's device, if one of the signals needs it.
        desk: where its labels are asked for and kept.
    """

    info: TeacherInfo
    labels: LabelConfig
    spec: SignalSpec
    measuring: SignalSpec | None
    head: Head | None
    desk: LabelDesk


@contextlib.contextmanager
def teacher_address(teacher: TeacherConfig | None, console: Console) -> Iterator[str | None]:
    """Where the teacher is while the block runs; starts an embedded one, and stops it at the end."""
    if teacher is None:
        yield None
    elif teacher.address is not None:
        check_way(teacher)
        yield teacher.address
    else:
        assert teacher.embedded is not None
        with contextlib.ExitStack() as stack:
            with console.status(f"starting the embedded teacher of {teacher.embedded}"):
                address = stack.enter_context(embedded_teacher(teacher.embedded))
            yield address


def meet_teacher(
    config: TrainConfig,
    address: str | None,
    student: Outline,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    console: Console,
    settled: LabelConfig | None = None,
    *,
    only_stores: bool = False,
) -> Teacher | None:
    """Agrees with the teacher on the signals of the whole run.

    Args:
        config: the run.
        address: of the server; None if the run has no teacher.
        student: who is to learn.
        data, held_out: what from, and what it is measured with.
        console: told what was agreed.
        settled: what `labels.transport: auto` chose before.
        only_stores: nothing will be computed with the labels, so that no output head is needed.

    Raises:
        ConfigError, TeacherWireError: what cannot work, by the name of the setting.
    """
    if config.teacher is None or address is None:
        return None
    settings = config.teacher
    connect = connector(settings, address, _Trouble(console).tell, config.feed.window_mb << 20)
    disk_trouble = _DiskTrouble(console)
    desk = LabelDesk(connect, _store(config, disk_trouble))
    uses_chat = config.data.template == "chat" or (
        config.data.template == "auto" and bool(student.tokenizer.chat_template)
    )
    facts = StudentFacts.of(student.tokenizer, student.vocab_rows, uses_chat, data, held_out)
    longest = _longest(data, held_out)

    async def meet() -> Teacher | None:
        async with connect() as client:
            info = await client.teacher(settings.name, wait_for_s=settings.wait_s)
            ask = partial(agree, info, facts, longest=longest, allow_template_mismatch=settings.allow_template_mismatch)
            output, labels = config.loss.output, settled or config.labels
            if (
                output is None and not held_out
            ):  # a teacher is set, and neither a loss nor an evaluation asks it anything
                return None
            if labels.transport == "auto":
                labels, why = await _choose(client, desk, info, facts, config, data, student.device)
                console.print(f"labels by {labels.transport}: {why}")
            measuring = spec = None
            if held_out:
                exact = _measured_by(config, info, labels, shared_rows(info, facts), held_out)
                measuring = spec = ask(exact, asked_by="evaluation")
                if exact.transport == "top_k":
                    console.print(
                        f"[yellow]note:[/] kl_to_teacher is not measured: labels.transport={labels.transport} keeps the teacher's head off "
                        "the card, and all logits of a batch of held-out rows are not offered or above the limits (train.eval_batch_size)"
                    )
            if output is not None:
                advice = check_loss(config.loss, labels)
                if advice:
                    console.print(f"[yellow]note:[/] {advice}")
                spec = ask(labels, asked_by=f"loss.output ({output.divergence})")
            head = None
            assert spec is not None
            if not only_stores and "hidden" in (*spec.kinds, *(measuring.kinds if measuring else ())):
                with console.status(f"fetching the output head of {info.name}"):
                    fetched = await fetch_head(
                        client,
                        info,
                        config.run.cache_dir,
                        on_trouble=disk_trouble.tell,
                        max_bytes=round(config.cache.heads_gb * 2**30),
                    )
                head = head_on(fetched, spec.vocab_rows, student.device)
            await _try(partial(desk.source, info, connect=lambda: client), spec, data)
            if facts.tokens and info.tokenizer_sha256 != facts.tokenizer_sha256:
                console.print(f"[yellow]note:[/] teacher {info.name}: {escape(facts.tokens.same_as(info))}")
            console.print(
                f"teacher [bold]{info.name}[/] at {address}: {info.architecture} {info.dtype}, labels by {spec.name}"
            )
            return Teacher(info, labels, spec, measuring, head, desk)

    return event_loop.run(meet())


async def _try(source_of: Callable[[SignalSpec], LabelSource], spec: SignalSpec, data: TokenizedDataset) -> None:
    """One small request through everything, so that what cannot work fails before there is a run folder.

    Every row of it is checked, also where later requests have a sample checked, unless its labels are on disk.
    """
    smallest = min(range(len(data)), key=lambda index: data[index].example.token_ids.size)
    asked = pack([data[smallest].example])
    if spec.extra_ids:
        named = np.tile(np.arange(spec.extra_ids, dtype=np.int32), (asked.batch.rows, 1))
        asked = replace(asked, batch=replace(asked.batch, extra_ids_NM=named))
    source = source_of(spec)
    if spec.check != "all" and not await source.has(asked):
        source = source_of(replace(spec, check="all"))
    await source.labels(asked)


async def _choose(
    client: TeacherClient,
    desk: LabelDesk,
    info: TeacherInfo,
    facts: StudentFacts,
    config: TrainConfig,
    data: TokenizedDataset,
    device: torch.device,
) -> tuple[LabelConfig, str]:
    """Measures the link with one request and the memory that is free, and lets `choose` decide."""
    rows = shared_rows(info, facts)
    probe = None
    asked = _probe(config, info, rows, data) if "hidden" in info.transports else None
    if asked is not None:
        spec = spec_of("hidden", rows)
        began_s = time.perf_counter()
        signals = await client.score(info, spec, asked.batch)
        took_s = time.perf_counter() - began_s
        await desk.source(info, spec).keep(asked, signals)
        timing = signals.timing
        server_s = (timing.queue_us + timing.forward_us + timing.reduce_us) / 1e6
        if timing.forward_us:  # else the server had them, and there is no forward pass to compare the link with
            probe = Probe(transfer_s=max(0.0, took_s - server_s), forward_s=timing.forward_us / 1e6)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return choose(info, rows, free, probe, softened=is_softened(config.loss))


def _probe(config: TrainConfig, info: TeacherInfo, rows: int, data: TokenizedDataset) -> LabelRequest | None:
    """The first rows of a micro-batch's size that one request may hold, the shortest row if they are too long; None if that is too."""
    limits, row_bytes = info.limits, spec_of("hidden", rows).row_bytes(info.hidden_size, info.value_bytes)
    most_bytes = min(limits.max_reply_bytes, config.feed.window_mb << 20)

    def fits(indices: list[int]) -> bool:
        examples = [data[index].example for index in indices]
        return (
            len(examples) <= limits.max_request_sequences
            and max(example.token_ids.size for example in examples) <= limits.max_sequence_tokens
            and sum(example.token_ids.size for example in examples) <= limits.max_request_tokens
            and sum(int(example.loss_mask.sum()) for example in examples) * row_bytes <= most_bytes
        )

    first = list(range(min(len(data), config.train.batch_size)))
    shortest = min(range(len(data)), key=lambda index: data[index].example.token_ids.size)
    for indices in (*(first[:count] for count in range(len(first), 0, -1)), [shortest]):
        if fits(indices):
            return pack([data[index].example for index in indices])
    return None


def check_sizes(
    config: TrainConfig, teacher: Teacher, data: TokenizedDataset, held_out: TokenizedDataset | None, order: RunOrder
) -> None:
    """Refuses requests that the teacher or our own window will refuse at some later step.

    Raises:
        ConfigError: naming the setting that makes them too large.
    """
    if config.loss.output is not None:
        groups = [order.batch(number) for number in range(order.batches)]
        _check_groups(config, teacher, teacher.spec, data, groups, "train.batch_size")
    if held_out is not None and teacher.measuring is not None:
        groups = by_length(held_out, config.train.eval_batch_size)
        _check_groups(config, teacher, teacher.measuring, held_out, groups, "train.eval_batch_size")


def _check_groups(
    config: TrainConfig,
    teacher: Teacher,
    spec: SignalSpec,
    data: TokenizedDataset,
    groups: list[list[int]],
    setting: str,
) -> None:
    tokens = [row.example.token_ids.size for row in data]
    rows = [int(row.example.loss_mask.sum()) for row in data]
    limits, row_bytes = teacher.info.limits, spec.row_bytes(teacher.info.hidden_size, teacher.info.value_bytes)
    reply = max(sum(rows[index] for index in group) for group in groups) * row_bytes
    for what, value, limit, whose in (
        ("sequences", max(map(len, groups)), limits.max_request_sequences, "the teacher's max_request_sequences"),
        (
            "tokens",
            max(sum(tokens[i] for i in group) for group in groups),
            limits.max_request_tokens,
            "the teacher's max_request_tokens",
        ),
        ("reply bytes", reply, limits.max_reply_bytes, "the teacher's max_reply_mb"),
        ("reply bytes", reply, config.feed.window_mb << 20, "feed.window_mb"),
    ):
        if value > limit:
            raise ConfigError(
                f"{setting} makes a request of {value:,} {what} by {spec.name} labels, above {whose}: at most {limit:,}"
            )


def _measured_by(
    config: TrainConfig, info: TeacherInfo, labels: LabelConfig, vocab_rows: int, held_out: TokenizedDataset
) -> LabelConfig:
    """Labels to measure with: exact ones if `labels.transport` and the teacher allow any.

    Only `hidden` may put the teacher's head on the card. Beside it, all logits of a batch are exact, where one request may hold them.
    """
    if labels.transport == "hidden" and "hidden" in info.transports:
        return LabelConfig(transport="hidden", check="all")  # the teacher's own likelihood is measured too
    rows = [int(row.example.loss_mask.sum()) for row in held_out]
    most = max(sum(rows[i] for i in group) for group in by_length(held_out, config.train.eval_batch_size))
    needed = most * spec_of("full", vocab_rows).row_bytes(info.hidden_size, info.value_bytes)
    fits = needed <= min(info.limits.max_reply_bytes, config.feed.window_mb << 20)
    if "full" in info.transports and (fits or labels.transport == "full"):
        return LabelConfig(transport="full")
    if "top_k" in info.transports:
        return LabelConfig(transport="top_k", k=min(labels.k, vocab_rows, info.limits.max_k))
    return labels if not labels.extra_ids else LabelConfig(transport="top_k", k=labels.k)


class _Trouble:
    """Shows each different trouble with the teacher once, not every retry."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def tell(self, error: TeacherWireError) -> None:
        if error.message != self._last:
            self._last = error.message
            self._console.print(f"[yellow]teacher:[/] {escape(str(error))}; trying again", highlight=False)


class _DiskTrouble:
    """Shows the first trouble with the cache: a disk that is full or read-only has many ways to say so."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = False

    def tell(self, message: str) -> None:
        if not self._told:
            self._told = True
            self._console.print(f"[yellow]cache:[/] {escape(message)}", highlight=False)


def _store(config: TrainConfig, trouble: _DiskTrouble) -> LabelStore | None:
    """The labels on this machine's disk, if the run uses them."""
    if not config.cache.labels:
        return None
    return LabelStore(labels_folder(config.run.cache_dir), round(config.cache.max_gb * 2**30), trouble.tell)


def open_any_feed(
    config: TrainConfig,
    teacher: Teacher,
    spec: SignalSpec,
    request: Callable[[int], LabelRequest],
    first: int,
    count: int,
    on_close: Callable[[], None] = lambda: None,
    prepare: Callable[[TeacherSignals], Any] | None = None,
) -> LabelFeed:
    """A feed of requests `first .. count-1` by one signal; what is taken is `LabelTensors` unless `prepare` makes something else."""
    return LabelFeed(
        teacher.desk.source(teacher.info, spec), request,
        first=first, count=count, max_bytes=config.feed.max_mb << 20, max_batches=config.feed.max_batches,
        prepare=prepare or partial(LabelTensors.of, pinned=torch.cuda.is_available()), on_close=on_close,
        burst=config.train.accumulation,
    )  # fmt: skip


def open_training_feed(
    config: TrainConfig,
    teacher: Teacher,
    data: TokenizedDataset,
    order: RunOrder,
    provided: ProvidedRequests | None,
    first: int,
) -> LabelFeed:
    """The feed of the training rows from micro-batch `first` on; `provided` hands over requests that cannot be made ahead."""

    def request(number: int) -> LabelRequest:
        return pack([data[index].example for index in order.batch(number)])

    if provided is not None:
        return open_any_feed(config, teacher, teacher.spec, provided.wait, first, order.batches, provided.close)
    return open_any_feed(config, teacher, teacher.spec, request, first, order.batches)


def _longest(data: TokenizedDataset, held_out: TokenizedDataset | None) -> tuple[str, int]:
    """Name and tokens of the longest sequence."""
    every = [row.example for rows in (data, held_out) if rows is not None for row in rows]
    longest = max(every, key=lambda example: example.token_ids.size)
    return longest.key, int(longest.token_ids.size)
