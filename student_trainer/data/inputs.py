"""What a run reads: its rows, tokenised, and which of them when.

In: a config and a tokenizer; out: datasets and a RunOrder, the same for every command that gets the same config.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from student_trainer.config.data import DataConfig, SourceConfig
from student_trainer.config.run import TOKENS, TrainConfig
from student_trainer.config.teachers import ContextConfig
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import TokenizedDataset, build_dataset
from student_trainer.data.readers import Readers
from student_trainer.data.routing import Routing
from student_trainer.data.rows.intake import BAD_ROWS_NAME, Intake, SourceFacts, write_bad_rows
from student_trainer.data.rows.sources import DataSource, parse_source
from student_trainer.data.teacher_view import TeacherContext, TeacherView
from student_trainer.data.text.clock import Clock
from student_trainer.data.token_cache import TokenCache
from student_trainer.data.trace_rows import TraceTasks
from student_trainer.errors import ConfigError
from teacher_wire.core.axes import BLOCK_POSITIONS, Axis
from teacher_wire.core.info import TeacherInfo
from teacher_wire.core.signals import SignalSpec

# Of a file of labels beside its rows: id and flag of a token; header, and half a block that the file system cannot use.
_TOKEN_BYTES, _FILE_BYTES = 5, 3_500


def load_data(
    config: DataConfig,
    tokenizer: Any,
    console: Console,
    pinned: datetime.date | None = None,
    cache_dir: Path | None = None,
    context: ContextConfig | None = None,
    readers: Readers | None = None,
    *,
    date_is_printed: bool = True,
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The rows to learn from and those to measure with; says what each source holds, and how many rows there are.

    Args:
        config: what and how.
        tokenizer: the student's.
        console: told what was read.
        pinned: the day on which the run began, for templates that print one; None for a new run.
        cache_dir: of all runs of this machine; tokenised rows are kept in its folder `tokens`. None: they are not kept.
        context: what of each row the only teacher alone is told; None for nothing.
        readers: who reads the rows beside the student; None for nobody who reads them otherwise.
        date_is_printed: refuse `data.date` if nobody prints it; without it that is still to be seen (`check_date`).

    Raises:
        DataError, ConfigError: naming file and line, or the setting.
    """

    clock = Clock(config.date or pinned, explicit=config.date is not None)
    intakes = {"train": Intake(config.bad_rows), "eval": Intake(config.bad_rows)}

    notes: list[str] = []
    tells = readers is not None and readers.tells
    beside: dict[str, Any] = {} if context is None else {"context": TeacherContext(**context.model_dump())}
    beside |= {} if readers in (None, Readers()) else {"readers": readers}
    make = build_dataset if cache_dir is None else TokenCache(cache_dir / TOKENS, notes.append).dataset

    def build(sources: Any, intake: Intake) -> TokenizedDataset:
        return make(
            [source_of(source) for source in sources],
            tokenizer,
            template=config.template,
            system_prompt=config.system_prompt or "",
            max_tokens=config.max_tokens,
            overlong=config.overlong,
            traces=TraceTasks(**config.traces.model_dump()),
            intake=intake,
            turns="each" if tells and config.turns == "auto" else config.turns,
            template_kwargs=config.template_kwargs,
            clock=clock,
            **beside,
        )

    with console.status("reading and tokenising the data"):
        data = build(config.train, intakes["train"])
        held_out = build(config.eval, intakes["eval"]) if config.eval else None
    if readers is not None and readers.tag_field is not None:
        check_field("data.tag_field", readers.tag_field, intakes["train"].sources)
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    for name, intake in intakes.items():
        for number, facts in enumerate(intake.sources):
            console.print(f"{escape(f'data.{name}[{number}]')} {escape(facts.told)}", soft_wrap=True)
        if intake.bad:
            first = intake.bad[0]
            told = f"{len(intake.bad):,} bad rows skipped, the first {first.file}:{first.line}: {first.reason}"
            console.print(f"[yellow]note:[/] data.{name}: {escape(told)}", soft_wrap=True)
    for name, rows in (("train", data), ("eval", held_out)):
        if rows is not None:
            dropped = f", {len(rows.dropped)} dropped as longer than {config.max_tokens}" if rows.dropped else ""
            console.print(
                f"{name}: {_counted(rows)}, {rows.tokens:,} tokens, {rows.target_tokens:,} of them supervised{dropped}"
            )
            _tell_rendering(name, rows, console)
    if date_is_printed:
        check_date(config, data, held_out)
    if clock.asked and config.date is None:
        console.print(
            f"[yellow]note:[/] the chat template prints the date: {clock.day} for the whole of this run; other runs get the same "
            f"prompts, and find its kept labels, with data.date={clock.day}"
        )
    return data, held_out


def load_run_data(
    config: TrainConfig,
    tokenizer: Any,
    console: Console,
    pinned: datetime.date | None = None,
    *,
    tells: bool = False,
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The rows of a run, with what its teachers need of them; as `load_data`.

    Args:
        tells: keep what teachers with another tokenizer must be told.
    """
    return load_data(
        config.data, tokenizer, console, pinned, config.run.cache_dir, config.context, readers_of(config, tells=tells),
        date_is_printed=not config.every_teacher,
    )  # fmt: skip


def check_field(setting: str, field: str, sources: Sequence[SourceFacts]) -> None:
    """
    Raises:
        ConfigError: no row has the field: misspelt, it would give rows to other teachers than are meant.
    """
    fields = sorted({name for source in sources for name in source.fields})
    if field in fields:
        return
    near = difflib.get_close_matches(field, fields, 1)
    meant = f"; did you mean {near[0]}?" if near else f"; the rows have {', '.join(fields[:12])}"
    raise ConfigError(f"{setting}={field}: no row of data.train has this field{meant}")


def check_date(config: DataConfig, data: TokenizedDataset, held_out: TokenizedDataset | None) -> None:
    """
    Raises:
        ConfigError: the config says which day is printed, and nobody prints one: neither the chat template of these rows nor a teacher
            that renders its own prompts.
    """
    days = [rows.rendering.day for rows in (data, held_out) if rows is not None and rows.rendering is not None]
    if config.date is not None and not any(days):
        raise ConfigError(f"data.date={config.date}: the chat template prints no date")


def readers_of(config: TrainConfig, *, tells: bool = False) -> Readers:
    """Who reads the rows of a run beside the student; of the only teacher's context see `TrainConfig.context`."""
    contexts = tuple((name, TeacherContext(**context.model_dump())) for name, context in config.contexts.items())
    return Readers(contexts=contexts, routing=routing_of(config), tag_field=config.data.tag_field, tells=tells)


def routing_of(config: TrainConfig) -> Routing | None:
    """Which of the teachers are asked about a row; None where the only one is asked about all of them."""
    if len(config.teachers) < 2 and not any(teacher.tags for teacher in config.teachers):
        return None
    tags = tuple((teacher.called, teacher.tags) for teacher in config.teachers)
    return Routing(tags, exclusive=config.combine == "route")


def keep_bad_rows(folder: Path, data: TokenizedDataset, held_out: TokenizedDataset | None, console: Console) -> None:
    """Writes the rows that were skipped into the run folder, if any were, and says so."""
    bad = [*data.bad_rows, *(held_out.bad_rows if held_out else ())]
    write_bad_rows(folder, bad)
    if bad:
        console.print(f"the {len(bad):,} bad rows are in {escape(str(folder / BAD_ROWS_NAME))}", soft_wrap=True)


def _counted(rows: TokenizedDataset) -> str:
    made = rows.rendering
    if made is None or made.rows == len(rows):
        return f"{len(rows):,} rows"
    return f"{made.rows:,} rows, {len(rows):,} examples"


def _tell_rendering(name: str, rows: TokenizedDataset, console: Console) -> None:
    """Says what of the rows became something else than one would think."""
    made = rows.rendering
    if made is None:
        return
    told = []
    if made.parted:
        told.append(
            f"{made.parted:,} conversations became one example for each answer: with template {made.template} their earlier turns "
            "read otherwise once another follows (data.turns=last learns the last answers alone)"
        )
    if made.weightless:
        told.append(f"{made.weightless:,} rows have the weight 0 and teach nothing")
    if made.literal:
        told.append(f"{made.literal:,} rows quote control tokens of the tokenizer; they are kept as text")
    for one in told:
        console.print(f"[yellow]note:[/] {name}: {escape(one)}")


def order_of(config: TrainConfig, data: TokenizedDataset) -> RunOrder:
    """Which rows each micro-batch of the run holds; with a curriculum only its length is the run's (`training.curriculum.ranking`)."""
    settings = config.train
    return RunOrder(
        len(data),
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=config.run.seed,
    )


def asked_order(config: TrainConfig, data: TokenizedDataset) -> RunOrder:
    """The micro-batches in which labels are asked for ahead of a run: its own; with a curriculum, whose order follows from them, every row once."""
    if config.curriculum is None:
        return order_of(config, data)
    size = config.train.batch_size
    return RunOrder(len(data), batch_size=size, accumulation=1, epochs=1.0, max_steps=None, seed=config.run.seed)


def bytes_on_disk(info: TeacherInfo, spec: SignalSpec, views: Iterable[TeacherView]) -> int:
    """About what the labels of rows take in the cache, which the teacher reads so."""
    read = list(views)
    tokens = sum(view.token_ids.size for view in read)
    answers = sum(answer_bytes(info, spec, view) for view in read)
    return answers + tokens * _TOKEN_BYTES + len(read) * _FILE_BYTES


def answer_bytes(info: TeacherInfo, spec: SignalSpec, view: TeacherView) -> int:
    """Payload bytes of a teacher's answer about one row, which it reads so, at most."""
    rows = int(view.loss_mask.sum())
    bytes_ = rows * spec.row_bytes(info.hidden_size, info.value_bytes)
    uneven = [part for part in spec.fields_of(info) if part.axis in (Axis.BLOCK, Axis.TOKEN)]
    if not uneven:
        return bytes_
    tokens = view.token_ids.size  # each row sees no more blocks than the last
    most = {Axis.BLOCK: rows * (-(-tokens // BLOCK_POSITIONS)), Axis.TOKEN: tokens}
    return bytes_ + sum(most[part.axis] * part.entry_bytes for part in uneven)


def source_of(config: SourceConfig) -> DataSource:
    """Where the rows of a configured source come from.

    Raises:
        ConfigError: the number of rows is given twice.
        DataError: the path cannot be read as one.
    """
    source = parse_source(config.path, config.format)
    if config.sample is not None and source.sample is not None:
        raise ConfigError(f"data: {config.path} and sample={config.sample}: give the number of rows once")
    sample = source.sample or config.sample
    return replace(
        source, sample=sample, split=config.split, columns=config.columns, subset=config.subset, tags=config.tags
    )
