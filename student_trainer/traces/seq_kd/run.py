"""`student-trainer label --generate`: the rows of a run with the teacher's own answers in place of theirs (sequence-level distillation).

In: the config of a run; out: a folder whose rows.jsonl can be `data.train` of another. Each row is asked by the prompt that inference makes of
it, or by the teacher's own where `teacher.context` tells it more; the last answer is replaced, and earlier ones become context of weight 0.
What a student could not learn from is refused by name, never written.

Axes: n tokens of a sample.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from student_trainer.config.run import TrainConfig
from student_trainer.config.traces import GenerateConfig
from student_trainer.data.rows.intake import Intake, write_bad_rows
from student_trainer.data.text.tokenizer_file import load_tokenizer
from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.findings import Finding, Findings
from student_trainer.labels import event_loop
from student_trainer.progress import ProgressBar
from student_trainer.teachers.connect import Connection, check_way, connections
from student_trainer.traces.asking import Asking
from student_trainer.traces.progress_folder import ProgressFolder
from student_trainer.traces.seq_kd.rows import REASONS, AskedRow, RowReader, Verdict, row_of
from teacher_wire.core.errors import MismatchError, TeacherWireError
from teacher_wire.core.identity import tokenizer_sha256
from teacher_wire.core.info import TeacherInfo
from teacher_wire.generate.messages import Sample, SamplingSpec

ROWS, REFUSED = "rows.jsonl", "refused.jsonl"
_SHOWN_EVERY_S = 10.0  # where there is no terminal
_REFUSED_CHARS = 16_384


@dataclass
class Stats:
    """Counts since the work began, resumptions included.

    Attributes:
        asked: rows that have been answered; written: answers that became rows.
        retokenized: of these, whose text is cut into other tokens than the teacher wrote.
        refused: answers by reason.
        tokens, seconds: written by the teacher, and spent waiting.
    """

    asked: int = 0
    written: int = 0
    retokenized: int = 0
    tokens: int = 0
    seconds: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """One line."""
        refused = ", ".join(f"{reason} {count}" for reason, count in self.refused.items()) or "none"
        return (
            f"{self.asked:,} rows answered, {self.written:,} answers written ({self.retokenized:,} of them in other tokens than the "
            f"teacher's); refused: {refused}"
        )


@dataclass(frozen=True)
class Generated:
    """What the command leaves."""

    output_dir: Path
    stats: Stats


def generate_rows(config: TrainConfig, console: Console) -> Generated:
    """Answers the rows of `data.train` as the section `generate` says; what is there already is not asked again.

    Raises:
        StudentError, TeacherWireError: something a user can mend; what is done stays done.
    """
    settings = config.generate
    if settings is None:
        raise ConfigError("label --generate: set the section generate, whose output_dir takes the rows")
    if not config.every_teacher:
        raise ConfigError("teacher: label --generate needs a teacher that writes: set the section teacher")
    if len(config.every_teacher) > 1:
        raise ConfigError(
            "teachers: label --generate lets one teacher write, and there are several: set the section teacher"
        )
    check_way(config.every_teacher[0])
    tokenizer = _tokenizer(config.model.path)
    reader = RowReader(config, tokenizer, settings)
    asked, intake = reader.read()
    console.print(f"{len(asked):,} rows to answer, {sum(len(one.prompt_ids) for one in asked):,} tokens of prompts")
    with connections(config.every_teacher[:1], console) as (connection,):
        return event_loop.run(_run(config, settings, connection, reader, asked, intake, console))


async def _run(
    config: TrainConfig,
    settings: GenerateConfig,
    connection: Connection,
    reader: RowReader,
    asked: list[AskedRow],
    intake: Intake,
    console: Console,
) -> Generated:
    def tell(error: TeacherWireError) -> None:
        console.print(f"[yellow]teacher:[/] {escape(str(error))}; trying again", highlight=False)

    spec = SamplingSpec(
        samples=settings.samples, temperature=settings.temperature, top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens, seed=settings.seed, stop_ids=reader.stop_ids,
    )  # fmt: skip
    stats = Stats()

    def read(found: dict[str, Any]) -> int:
        for name, value in asdict(Stats(**found)).items():
            setattr(stats, name, value)
        return stats.asked

    async with connection.client(tell) as client:
        info = await connection.describe(client)
        findings = Findings()
        findings.add(check_teacher(info, reader, config))
        asked = reader.within(asked, info, spec, intake)
        folder = ProgressFolder(
            settings.output_dir, _identity(settings, info, config, asked), (ROWS, REFUSED), resume=True, units="rows", read=read,
            setting="generate.output_dir", go_on="the same command",
        )  # fmt: skip
        write_bad_rows(settings.output_dir, intake.bad)
        shown = _Shown(console, settings.output_dir.name, len(asked), stats)
        try:
            asking = Asking(
                client, info, spec, [one.prompt_ids for one in asked], settings.prompts_per_call, settings.calls
            )
            began_s = time.perf_counter()
            async for number, samples in asking.answers(stats.asked):
                _add(
                    folder, stats, asked[number], [reader.verdict(asked[number], sample) for sample in samples], samples
                )
                stats.seconds += time.perf_counter() - began_s
                began_s = time.perf_counter()
                folder.done(asked[number].row.key, asdict(stats), stats.asked)
                shown.update()
        finally:
            shown.close()
            folder.close(asdict(stats) | {"tokens_per_s": stats.tokens / max(stats.seconds, 1e-9)})
    console.print(f"teacher {info.name}: {stats.describe()}", markup=False)
    if intake.bad:
        first = intake.bad[0]
        console.print(f"[yellow]note:[/] {len(intake.bad):,} bad rows skipped, the first {escape(first.file)}:{first.line}: {escape(first.reason)}")  # fmt: skip
    if asked and not stats.written:
        raise RunError(
            f"teacher {info.name!r}: none of its {sum(stats.refused.values()):,} answers can be learned from: {stats.describe()}; see "
            f"{settings.output_dir / REFUSED}"
        )
    return Generated(settings.output_dir, stats)


def _add(folder: ProgressFolder, stats: Stats, one: AskedRow, verdicts: list[Verdict], samples: list[Sample]) -> None:
    """Writes the answers of one row, and counts them."""
    refused = Counter(stats.refused)
    for verdict, sample in zip(verdicts, samples, strict=True):
        stats.tokens += len(sample.token_ids_n)
        if verdict.conversation is not None:
            folder.append(ROWS, row_of(verdict.conversation, one.row))
            stats.written += 1
            stats.retokenized += verdict.retokenized
            continue
        refused[verdict.reason] += 1
        folder.append(REFUSED, {
            "source": one.row.key, "sample": sample.index, "reason": verdict.reason, "detail": verdict.detail,
            "text": verdict.text[:_REFUSED_CHARS],
        })  # fmt: skip
    stats.refused = {reason: refused[reason] for reason in REASONS if refused[reason]}
    stats.asked += 1


def check_teacher(info: TeacherInfo, reader: RowReader, config: TrainConfig) -> Iterator[Finding]:
    """Whether the teacher reads our ids and our template as we do."""
    ours = tokenizer_sha256(reader.tokenizer.backend_tokenizer.to_str())
    if info.tokenizer_sha256 != ours:
        yield Finding.of("teacher", MismatchError(
            f"teacher {info.name!r} ({info.model}) has another tokenizer than {config.model.path}",
            field="tokenizer_sha256", value=info.tokenizer_sha256[:16] or "none", limit=ours[:16],
        ))  # fmt: skip
    template = reader.template.source_sha256
    allowed = config.every_teacher[0].allow_template_mismatch
    if template and info.chat_template_sha256 != template and not allowed:
        yield Finding.of("teacher.allow_template_mismatch", MismatchError(
            f"teacher {info.name!r} has another chat template; set teacher.allow_template_mismatch=true if you want ours",
            field="chat_template_sha256", value=info.chat_template_sha256[:16] or "none", limit=template[:16],
        ))  # fmt: skip


def _identity(
    settings: GenerateConfig, info: TeacherInfo, config: TrainConfig, asked: Sequence[AskedRow]
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for one in asked:
        digest.update(np.asarray(one.prompt_ids, np.int64).tobytes() + repr((one.row.key, one.conversation)).encode())
    kept = settings.model_dump(mode="json", exclude={"output_dir", "prompts_per_call", "calls"})
    return {"teacher": info.fingerprint, "rows": digest.hexdigest(), "max_tokens": config.data.max_tokens, **kept}


def _tokenizer(name: str) -> Any:
    try:
        return load_tokenizer(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model.path: the tokenizer of {name!r} cannot be loaded: {str(error)[:300]}") from error


class _Shown:
    """A bar over the rows, or a line now and then where there is no terminal."""

    def __init__(self, console: Console, title: str, total: int, stats: Stats) -> None:
        self._console, self._stats = console, stats
        self._bar = ProgressBar(console, title, total, done=stats.asked)
        self._said_s = time.monotonic()

    def update(self) -> None:
        """After each row."""
        stats = self._stats
        refused = sum(stats.refused.values())
        figures = (
            f"{stats.written:,} written  {refused:,} refused  {stats.tokens / max(stats.seconds, 1e-9):,.0f} tok/s"
        )
        self._bar.update(stats.asked, figures=figures)
        if not self._console.is_terminal and time.monotonic() - self._said_s >= _SHOWN_EVERY_S:
            self._said_s = time.monotonic()
            self._console.print(f"{stats.asked:,} rows: {figures}", highlight=False)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
