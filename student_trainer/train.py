"""A run from its config to its end: the door of the student's house.

Everything that can be wrong is found before the run folder exists; then the folder holds the resolved config, the log,
the checkpoints and, at the end, the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.markup import escape

from student_trainer import checkpoint, evaluate
from student_trainer.config import DataConfig, LabelConfig, SourceConfig, TeacherConfig, TrainConfig, dump_config
from student_trainer.data.dataset import TokenizedDataset, build_dataset
from student_trainer.data.sources import DataSource, parse_source
from student_trainer.embedded import embedded_teacher
from student_trainer.errors import ConfigError, RunError
from student_trainer.feed import background
from student_trainer.feed.choose import Probe, choose
from student_trainer.feed.handshake import StudentFacts, agree, shared_rows
from student_trainer.feed.heads import fetch_head
from student_trainer.feed.order import RunOrder
from student_trainer.feed.packing import pack
from student_trainer.feed.prefetch import LabelFeed, LabelRequest
from student_trainer.feed.provided import ProvidedRequests
from student_trainer.feed.verify import check_signals
from student_trainer.losses.head import Head
from student_trainer.model import Student, load_student
from student_trainer.objective import Objective, check_loss, head_on, is_softened
from student_trainer.progress import ConsoleProgress
from student_trainer.trainer import LOG_NAME, DistillationTrainer
from teacher_wire.channel import Credentials
from teacher_wire.client import TeacherClient
from teacher_wire.errors import TeacherWireError
from teacher_wire.messages import SignalSpec, TeacherInfo, TeacherSignals

CONFIG_NAME = "config.yaml"
IDENTITY_NAME = "run.json"
RESULT_NAME = "result.json"
FINAL_NAME = "final"
# Settings that may change between a run and its resumption: they decide where and how fast, not what.
_FREE = ("run.output_dir", "run.cache_dir", "teacher", "feed", "model.threads", "train.report_to", "train.log_steps",
         "train.save_steps", "train.keep_checkpoints", "train.eval_batch_size")  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        output_dir: its folder; the model is in `final/`.
        steps: optimizer steps made in all.
        metrics: the last held-out figures, empty without held-out data.
        curve: log entries, in order.
    """

    output_dir: Path
    steps: int
    metrics: dict[str, float]
    curve: list[dict[str, float]]


class _Finished(Exception):  # noqa: N818
    """The run that is to be resumed has come to its end already."""


@dataclass(frozen=True)
class _Teacher:
    """The teacher of a run, agreed with.

    Attributes:
        spec: the signal to train on.
        measuring: the signal to measure KL with, exact where the teacher offers one; None without held-out data.
        head: on the student's device, if one of the signals needs it.
    """

    connect: Callable[[], TeacherClient]
    info: TeacherInfo
    spec: SignalSpec
    measuring: SignalSpec | None
    head: Head | None


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
    _check_folder(config, resume)
    if config.labels.transport != "auto":
        check_loss(config.loss, config.labels)
    with _teacher_address(config.teacher, console) as address:
        student = load_student(config.model, config.run.seed)
        data, held_out = _load_data(config.data, student, console)
        teacher = _agree_with_teacher(config, address, student, data, held_out, console)
        try:
            return _run(config, student, data, held_out, teacher, resume, console)
        except _Finished:
            console.print("the run is finished: nothing to resume")
            return _result_of(config.run.output_dir)


def _run(
    config: TrainConfig,
    student: Student,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    teacher: _Teacher | None,
    resume: bool,
    console: Console,
) -> RunResult:
    settings = config.train
    order = RunOrder(
        len(data),
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=config.run.seed,
    )
    if teacher is not None:
        _check_sizes(config, teacher, data, held_out, order)
    objective = Objective(config.loss, teacher.spec.vocab_rows if teacher else _own_rows(student))
    start = _open_folder(config, teacher, data.sha256, student.sha256, resume, console)
    progress = ConsoleProgress(console, config.run.output_dir.name)
    distils = teacher is not None and config.loss.output is not None
    provided = ProvidedRequests() if distils and config.labels.extra_ids else None
    trainer = DistillationTrainer(
        config,
        student,
        data,
        order,
        objective,
        open_feed=partial(_open_feed, config, teacher, data, order, provided) if teacher and distils else None,
        ask=provided.put if provided else None,
        teacher_head=teacher.head if teacher else None,
        measure=_measure(config, student, held_out, teacher, objective) if held_out else None,
        callbacks=[progress],
    )
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        trainer.save_model(str(config.run.output_dir / FINAL_NAME))  # before anything else can go wrong
        metrics = trainer.last_metrics() if held_out else {}
    finally:
        progress.close()
        trainer.close()
    return _finish(config, trainer, metrics)


# ------------------------------------------------------------------- teacher


@contextlib.contextmanager
def _teacher_address(teacher: TeacherConfig | None, console: Console) -> Iterator[str | None]:
    if teacher is None:
        yield None
    elif teacher.address is not None:
        yield teacher.address
    else:
        assert teacher.embedded is not None
        with console.status(f"starting the embedded teacher of {teacher.embedded}"):
            server = embedded_teacher(teacher.embedded)
            address = server.__enter__()
        try:
            yield address
        finally:
            server.__exit__(None, None, None)


def _agree_with_teacher(
    config: TrainConfig,
    address: str | None,
    student: Student,
    data: TokenizedDataset,
    held_out: TokenizedDataset | None,
    console: Console,
) -> _Teacher | None:
    if config.teacher is None or address is None:
        return None
    settings = config.teacher
    credentials = Credentials(
        settings.ca_file, settings.cert_file, settings.key_file, os.environ.get(settings.token_env, "")
    )
    trouble = _Trouble(console)
    connect = partial(
        TeacherClient,
        address,
        credentials=credentials,
        window_bytes=config.feed.window_mb << 20,
        retry_for_s=settings.retry_s,
        on_trouble=trouble.tell,
    )
    uses_chat = config.data.template == "chat" or (
        config.data.template == "auto" and bool(student.tokenizer.chat_template)
    )
    facts = StudentFacts.of(student.tokenizer, student.vocab_rows, uses_chat)
    longest = _longest(data, held_out)

    device = student.head(2).weight_VD.device

    async def meet() -> _Teacher | None:
        async with connect() as client:
            info = await client.teacher(settings.name, wait_for_s=settings.wait_s)
            ask = partial(agree, info, facts, longest=longest, allow_template_mismatch=settings.allow_template_mismatch)
            output = config.loss.output
            measuring = ask(_exact_labels(info, config.labels), asked_by="evaluation") if held_out else None
            spec = measuring
            if output is not None:
                labels = config.labels
                if labels.transport == "auto":
                    labels, why = await _choose(client, info, facts, config, data, device)
                    console.print(f"labels by {labels.transport}: {why}")
                advice = check_loss(config.loss, labels)
                if advice:
                    console.print(f"[yellow]note:[/] {advice}")
                spec = ask(labels, asked_by=f"loss.output ({output.divergence})")
            head = None
            if spec is None:  # a teacher is set, and neither a loss nor an evaluation asks it anything
                return None
            if "hidden" in (spec.transport, measuring.transport if measuring else ""):
                with console.status(f"fetching the output head of {info.name}"):
                    fetched = await fetch_head(client, info, config.run.cache_dir)
                head = head_on(fetched, spec.vocab_rows, device)
            await _try(client, info, spec, data)
            console.print(
                f"teacher [bold]{info.name}[/] at {address}: {info.architecture} {info.dtype}, labels by {spec.transport}"
            )
            return _Teacher(connect, info, spec, measuring, head)

    return background.run(meet())


async def _try(client: TeacherClient, info: TeacherInfo, spec: SignalSpec, data: TokenizedDataset) -> None:
    """One small request through everything, so that what cannot work fails before there is a run folder."""
    smallest = min(range(len(data)), key=lambda index: data[index].example.token_ids.size)
    asked = pack([data[smallest].example])
    batch = asked.batch
    if spec.extra:
        named = np.tile(np.arange(spec.extra, dtype=np.int32), (batch.rows, 1))
        batch = replace(batch, extra_ids_NM=named)
    check_signals(await client.score(info, spec, batch), spec, batch, asked.names)


async def _choose(
    client: TeacherClient,
    info: TeacherInfo,
    facts: StudentFacts,
    config: TrainConfig,
    data: TokenizedDataset,
    device: torch.device,
) -> tuple[LabelConfig, str]:
    """Measures the link with one request and the memory that is free, and lets `choose` decide."""
    rows = shared_rows(info, facts)
    probe = None
    if "hidden" in info.transports:
        count = min(len(data), config.train.batch_size)
        asked = pack([data[index].example for index in range(count)]).batch
        began_s = time.perf_counter()
        signals = await client.score(info, SignalSpec("hidden", rows), asked)
        took_s = time.perf_counter() - began_s
        timing = signals.timing
        server_s = (timing.queue_us + timing.forward_us + timing.reduce_us) / 1e6
        probe = Probe(transfer_s=max(0.0, took_s - server_s), forward_s=timing.forward_us / 1e6)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return choose(info, rows, free, probe, softened=is_softened(config.loss))


def _check_sizes(
    config: TrainConfig, teacher: _Teacher, data: TokenizedDataset, held_out: TokenizedDataset | None, order: RunOrder
) -> None:
    """Refuses requests that the teacher or our own window will refuse at some later step.

    Raises:
        ConfigError: naming the setting that makes them too large.
    """
    if config.loss.output is not None:
        groups = [order.batch(number) for number in range(order.batches)]
        _check_groups(config, teacher, teacher.spec, data, groups, "train.batch_size")
    if held_out is not None and teacher.measuring is not None:
        groups = evaluate.batches(held_out, config.train.eval_batch_size)
        _check_groups(config, teacher, teacher.measuring, held_out, groups, "train.eval_batch_size")


def _check_groups(
    config: TrainConfig,
    teacher: _Teacher,
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
                f"{setting} makes a request of {value:,} {what} by {spec.transport} labels, above {whose}: at most {limit:,}"
            )


def _exact_labels(info: TeacherInfo, labels: LabelConfig) -> LabelConfig:
    """Labels that give the exact KL, if this teacher offers any; those of training else."""
    exact = [transport for transport in ("hidden", "full") if transport in info.transports]
    if exact:
        return LabelConfig(transport=exact[0])
    return LabelConfig(transport="top_k", k=labels.k) if labels.transport == "auto" else labels


class _Trouble:
    """Shows each different trouble with the teacher once, not every retry."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def tell(self, error: TeacherWireError) -> None:
        if error.message != self._last:
            self._last = error.message
            self._console.print(f"[yellow]teacher:[/] {escape(str(error))}; trying again", highlight=False)


def _feed(
    config: TrainConfig,
    teacher: _Teacher,
    spec: SignalSpec,
    request: Callable[[int], LabelRequest],
    first: int,
    count: int,
    on_close: Callable[[], None] = lambda: None,
) -> LabelFeed:
    def check(signals: TeacherSignals, asked: LabelRequest) -> None:
        check_signals(signals, spec, asked.batch, asked.names)

    return LabelFeed(
        teacher.connect, teacher.info, spec, request, check,
        first=first, count=count, max_bytes=config.feed.max_mb << 20, max_batches=config.feed.max_batches,
        on_close=on_close,
    )  # fmt: skip


def _open_feed(
    config: TrainConfig,
    teacher: _Teacher,
    data: TokenizedDataset,
    order: RunOrder,
    provided: ProvidedRequests | None,
    first: int,
) -> LabelFeed:
    def request(number: int) -> LabelRequest:
        return pack([data[index].example for index in order.batch(number)])

    if provided is not None:
        return _feed(config, teacher, teacher.spec, provided.wait, first, order.batches, provided.close)
    return _feed(config, teacher, teacher.spec, request, first, order.batches)


def _measure(
    config: TrainConfig, student: Student, held_out: TokenizedDataset, teacher: _Teacher | None, objective: Objective
) -> Callable[[], dict[str, float]]:
    """A function that measures the held-out data; the teacher's labels of them are kept if they fit feed.max_mb."""
    size = config.train.eval_batch_size
    groups = evaluate.batches(held_out, size)
    kept: dict[int, TeacherSignals] = {}
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
        feed = _feed(config, teacher, teacher.measuring, request, 0, len(groups))

        def take(number: int) -> TeacherSignals:
            signals = feed.take(number)
            if sum(s.payload_bytes for s in kept.values()) + signals.payload_bytes <= config.feed.max_mb << 20:
                kept[number] = signals
            return signals

        try:
            return measured(labels=take, teacher_head=teacher.head)
        finally:
            feed.close()

    return run


# --------------------------------------------------------------- data, folder


def _load_data(
    config: DataConfig, student: Student, console: Console
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    def build(sources: Any) -> TokenizedDataset:
        return build_dataset(
            [_source(source) for source in sources],
            student.tokenizer,
            template=config.template,
            system_prompt=config.system_prompt or "",
            max_tokens=config.max_tokens,
            overlong=config.overlong,
        )

    with console.status("reading and tokenising the data"):
        data = build(config.train)
        held_out = build(config.eval) if config.eval else None
    for name, rows in (("train", data), ("eval", held_out)):
        if rows is not None:
            dropped = f", {len(rows.dropped)} dropped as longer than {config.max_tokens}" if rows.dropped else ""
            console.print(
                f"{name}: {len(rows):,} rows, {rows.tokens:,} tokens, {rows.target_tokens:,} of them supervised{dropped}"
            )
    return data, held_out


def _source(config: SourceConfig) -> DataSource:
    source = parse_source(config.path, config.format)
    if config.sample is not None and source.sample is not None:
        raise ConfigError(f"data: {config.path} and sample={config.sample}: give the number of rows once")
    return replace(source, sample=source.sample or config.sample, split=config.split)


def _longest(data: TokenizedDataset, held_out: TokenizedDataset | None) -> tuple[str, int]:
    """Name and tokens of the longest sequence."""
    every = [row.example for rows in (data, held_out) if rows is not None for row in rows]
    longest = max(every, key=lambda example: example.token_ids.size)
    return longest.key, int(longest.token_ids.size)


def _own_rows(student: Student) -> int:
    return min(student.vocab_rows, len(student.tokenizer))


def _check_folder(config: TrainConfig, resume: bool) -> None:
    folder = config.run.output_dir
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.output_dir {folder}: is a file")
    for name, path in (("run.output_dir", folder), ("run.cache_dir", config.run.cache_dir.expanduser())):
        _check_writable(name, path)
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"run.output_dir {folder}: holds a run already; go on with --resume auto, or choose another folder"
        )


def _check_writable(name: str, folder: Path) -> None:
    """Refuses a folder that cannot be made or written to, without making it."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name} {folder}: cannot be written ({nearest} is {'read-only' if nearest.is_dir() else 'a file'})"
        )


def _open_folder(
    config: TrainConfig, teacher: _Teacher | None, data_sha256: str, student_sha256: str, resume: bool, console: Console
) -> Path | None:
    """Makes the run folder, or takes up the one that is there; the checkpoint to start from."""
    folder = config.run.output_dir
    identity = {
        "settings": _decisive(config),
        "teacher": teacher.info.fingerprint if teacher else "",
        "data": data_sha256,
        "student": student_sha256,
    }
    identity_file = folder / IDENTITY_NAME
    start = None
    if resume and identity_file.is_file():
        _compare(json.loads(identity_file.read_text()), identity)
        if (folder / RESULT_NAME).is_file():
            raise _Finished
        start = checkpoint.newest_complete(folder)
        _cut_log(folder / LOG_NAME, checkpoint.step_of(start) if start else 0)
        console.print(
            f"resuming at step {checkpoint.step_of(start)}" if start else "no complete checkpoint: starting at step 0"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / CONFIG_NAME, dump_config(config))
    _write(identity_file, json.dumps(identity, indent=1))
    return start


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted name."""
    flat: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        if name.startswith(_FREE) and (name in _FREE or name.split(".")[0] in _FREE):
            return
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}" if name else key)
        else:
            flat[name] = node

    walk(config.model_dump(mode="json"), "")
    return flat


def _compare(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with other settings or another teacher."""
    keys = sorted(before["settings"].keys() | now["settings"].keys())
    changed = [key for key in keys if before["settings"].get(key) != now["settings"].get(key)]
    if changed:
        told = ", ".join(
            f"{key}: {before['settings'].get(key)!r} -> {now['settings'].get(key)!r}" for key in changed[:4]
        )
        raise RunError(
            f"the run was started with other settings ({told}); resume with the old ones, or start another run"
        )
    for part, what in (("data", "the training rows"), ("student", "the student's weights")):
        if before.get(part) != now[part]:
            raise RunError(f"{what} have changed since the run was started; start another run")
    if before["teacher"] != now["teacher"]:
        raise RunError(
            f"the run was started with another teacher (fingerprint {before['teacher'][:16]}, now {now['teacher'][:16]}); "
            "labels of two teachers are not mixed"
        )


def _cut_log(path: Path, step: int) -> None:
    """Drops log entries after `step`: they will be made again."""
    if path.is_file():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        _write(path, "".join(line + "\n" for line in lines))


def _finish(config: TrainConfig, trainer: DistillationTrainer, metrics: dict[str, float]) -> RunResult:
    named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    result = {"steps": trainer.state.global_step, "metrics": named}
    _write(config.run.output_dir / RESULT_NAME, json.dumps(result, indent=1))
    return _result_of(config.run.output_dir)


def _result_of(folder: Path) -> RunResult:
    """What a finished run left."""
    result = json.loads((folder / RESULT_NAME).read_text())
    curve = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    return RunResult(folder, result["steps"], result["metrics"], curve)


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text)
    os.replace(partial_path, path)
