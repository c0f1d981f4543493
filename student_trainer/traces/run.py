"""`student-trainer traces`: questions to a teacher, samples back, verified traces on disk.

In: a config; out: a folder of rows to train on. It asks a few calls ahead, writes in the order of the questions, and ends
with an error when the teacher's samples are not worth learning from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from student_trainer.config.traces import TracesConfig
from student_trainer.data.text.tokenizer_file import load_tokenizer
from student_trainer.data.trace_schema import Caps
from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.findings import Finding, Findings
from student_trainer.labels import event_loop
from student_trainer.progress import ProgressBar
from student_trainer.teachers.connect import Connection, check_way, connections
from student_trainer.traces.advice import advice, nothing_accepted
from student_trainer.traces.asking import Asking
from student_trainer.traces.folder import Stats, TracesFolder
from student_trainer.traces.questions import Question, digest, encode_questions, read_questions
from student_trainer.traces.selection import judge, reading_of
from student_trainer.traces.styles.bounds import Bounds
from student_trainer.traces.styles.fitting import caps_as_bounds, fit_bounds, too_long_answers
from student_trainer.traces.styles.json_text import grammar_schema
from teacher_wire.core.errors import CapabilityError, LimitError, MismatchError, TeacherWireError
from teacher_wire.core.identity import template_sha256, tokenizer_sha256
from teacher_wire.core.info import TeacherInfo
from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec, check_generate

_SHOWN_EVERY_S = 10.0  # where there is no terminal


@dataclass(frozen=True)
class TracesResult:
    """What a finished run leaves.

    Attributes:
        poor: fewer samples were accepted than `accept.min_rate` asks for, of too few to stop for it.
    """

    output_dir: Path
    stats: Stats
    poor: bool = False


def make_traces(config: TracesConfig, *, resume: bool = False, console: Console | None = None) -> TracesResult:
    """Asks for traces as `config` says.

    Args:
        config: the run.
        resume: go on with a run that is in `output_dir`.
        console: where progress is shown.

    Raises:
        StudentError, TeacherWireError: something a user can mend; what is done stays done. A run that accepted nothing ends so too.
    """
    console = console or Console(stderr=True)
    check_way(config.teacher)
    tokenizer = _load_tokenizer(config.tokenizer)
    questions = read_questions(config.data)
    prompts = encode_questions(questions, tokenizer, config)
    console.print(f"{len(questions):,} questions, {sum(map(len, prompts)):,} tokens")
    bounds = draft_bounds(config, tokenizer, questions)
    if bounds is not None:
        _tell_bounds(bounds, config, questions, console)
    job = _Job(config, tokenizer, questions, prompts, bounds)
    with connections([config.teacher], console) as (connection,):
        return event_loop.run(_run(job, connection, resume, console))


@dataclass(frozen=True)
class _Job:
    """What is asked, and how; prompts are ids."""

    config: TracesConfig
    tokenizer: Any
    questions: list[Question]
    prompts: list[list[int]]
    bounds: Bounds | None


def draft_bounds(config: TracesConfig, tokenizer: Any, questions: list[Question]) -> Bounds | None:
    """How long a draft may be under the grammar; None without one.

    Raises:
        ConfigError: `sampling.max_new_tokens` holds no draft.
    """
    if config.style == "free" or not config.held_to_schema:
        return None
    caps = Caps(**config.caps.model_dump())
    if not config.sampling.fit_budget:
        return caps_as_bounds(config.style, questions, caps)
    return fit_bounds(config.style, config.sampling.max_new_tokens, tokenizer, questions, caps)


def _tell_bounds(bounds: Bounds, config: TracesConfig, questions: list[Question], console: Console) -> None:
    said = f"the grammar admits {bounds.describe()}"
    if bounds.needed_tokens:
        said += f": {bounds.needed_tokens:,} of sampling.max_new_tokens={config.sampling.max_new_tokens:,}"
    console.print(said, highlight=False)
    if longer := too_long_answers(questions, bounds):
        console.print(
            f"[yellow]{longer:,} known answers are longer than {bounds.answer_chars} characters and cannot be written[/]: raise "
            "sampling.max_new_tokens (and caps.answer_bytes), or choose style=free",
            highlight=False,
        )


async def _run(job: _Job, connection: Connection, resume: bool, console: Console) -> TracesResult:
    config, questions = job.config, job.questions

    def tell(error: TeacherWireError) -> None:
        console.print(f"[yellow]{escape(str(error))}[/]; trying again")

    async with connection.client(tell) as client:
        info = await connection.describe(client)
        spec = _spec(config, job.bounds)
        findings = Findings()
        findings.add(check_teacher(info, job.tokenizer, config))
        findings.add(check_questions(info, spec, questions, job.prompts))
        folder = TracesFolder(config.output_dir, _identity(job, info), resume=resume)
        shown = _Shown(console, config.output_dir.name, len(questions), folder)
        try:
            asking = Asking(client, info, spec, job.prompts, config.prompts_per_call, config.calls)
            await _work(asking, folder, job, shown)
        finally:
            shown.close()
            folder.close()
    stats = folder.stats
    console.print(f"teacher {info.name}: {stats.describe()}", markup=False)
    if said := advice(stats, config):
        console.print(f"[yellow]{escape(said)}[/]", highlight=False)
    if stats.samples and not stats.accepted:
        raise nothing_accepted(info.name, stats, config)
    return TracesResult(config.output_dir, stats, poor=stats.rate < config.accept.min_rate)


async def _work(asking: Asking, folder: TracesFolder, job: _Job, shown: _Shown) -> None:
    config = job.config
    caps = Caps(**config.caps.model_dump())
    reading = reading_of(config, job.tokenizer)
    _check_rate(folder.stats, asking.info, config)
    began_s = time.perf_counter()
    async for number, samples in asking.answers(folder.done):
        now_s = time.perf_counter()
        judgement = judge(
            job.questions[number], samples, job.tokenizer, asking.spec, asking.info, caps, reading, job.bounds
        )
        folder.add(judgement, now_s - began_s)
        began_s = now_s
        shown.update()
        _check_rate(folder.stats, asking.info, config)


def _spec(config: TracesConfig, bounds: Bounds | None) -> SamplingSpec:
    sampling = config.sampling
    return SamplingSpec(
        samples=sampling.samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        json_schema=json.dumps(grammar_schema(bounds)) if bounds else "",
    )


def check_teacher(info: TeacherInfo, tokenizer: Any, config: TracesConfig) -> Iterator[Finding]:
    """Whether the teacher reads our ids as we do, and writes in the form that is asked for."""
    ours = tokenizer_sha256(tokenizer.backend_tokenizer.to_str())
    if info.tokenizer_sha256 != ours:
        yield Finding.of("tokenizer", MismatchError(
            f"teacher {info.name!r} ({info.model}) has another tokenizer than {config.tokenizer}",
            field="tokenizer_sha256", value=info.tokenizer_sha256[:16] or "none", limit=ours[:16],
        ))  # fmt: skip
    uses_chat = config.data.template == "chat" or (config.data.template == "auto" and bool(tokenizer.chat_template))
    template = template_sha256(tokenizer.chat_template)
    if uses_chat and info.chat_template_sha256 != template and not config.teacher.allow_template_mismatch:
        yield Finding.of("teacher.allow_template_mismatch", MismatchError(
            f"teacher {info.name!r} has another chat template; set teacher.allow_template_mismatch=true if you want ours",
            field="chat_template_sha256", value=info.chat_template_sha256[:16] or "none", limit=template[:16],
        ))  # fmt: skip
    if config.held_to_schema and "json_schema" not in info.generates:
        yield Finding.of("sampling.json_schema", CapabilityError(
            f"teacher {info.name!r} holds to no JSON schema; set sampling.json_schema=false if it knows the form by itself, or "
            "style=free",
            field="generates", value="json_schema", limit="|".join(info.generates) or "nothing",
        ))  # fmt: skip


def check_questions(
    info: TeacherInfo, spec: SamplingSpec, questions: list[Question], prompts: list[list[int]]
) -> Iterator[Finding]:
    """Whether every question alone is within the teacher's limits; the longest is looked at."""
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    try:
        check_generate(GenerateCall(info.name, "", spec, PromptBatch.pack([prompts[longest]])), info)
    except LimitError as error:
        error.add_note(f"the longest question is {questions[longest].key}, {len(prompts[longest])} tokens")
        yield Finding.of("data", error)


def _check_rate(stats: Stats, info: TeacherInfo, config: TracesConfig) -> None:
    accept = config.accept
    if stats.samples >= accept.after and stats.rate < accept.min_rate:
        raise RunError(
            f"teacher {info.name!r}: only {stats.accepted} of {stats.samples} samples were accepted "
            f"({stats.rate:.1%}, accept.min_rate is {accept.min_rate:.0%}); most likely the prompt or the schema does not suit "
            f"it: {stats.describe()}; {advice(stats, config)}; see {config.output_dir}/quarantine.jsonl"
        )


def _identity(job: _Job, info: TeacherInfo) -> dict[str, Any]:
    config = job.config
    settings = config.model_dump(mode="json", include={"style", "tags", "sampling", "caps"})
    settings |= {
        "instruction": config.instruction,
        "examples": [example.model_dump() for example in config.examples],
        "template": config.data.template,
        "bounds": asdict(job.bounds) if job.bounds else None,
    }
    return {
        "teacher": info.fingerprint,
        "tokenizer": info.tokenizer_sha256,
        "questions": digest(job.questions),
        **settings,
    }


def _load_tokenizer(name: str) -> Any:
    try:
        tokenizer = load_tokenizer(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"tokenizer {name!r} cannot be loaded: {str(error)[:300]}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"tokenizer {name!r} is no fast tokenizer (tokenizer.json), which the handshake needs")
    return tokenizer


class _Shown:
    """A bar over the questions, or a line now and then where there is no terminal."""

    def __init__(self, console: Console, title: str, total: int, folder: TracesFolder) -> None:
        self._console, self._folder = console, folder
        self._bar = ProgressBar(console, title, total, done=folder.done)
        self._said_s = time.monotonic()

    def update(self) -> None:
        """After each question."""
        stats = self._folder.stats
        figures = f"accepted {stats.rate:.0%}  {stats.tokens / max(stats.seconds, 1e-9):,.0f} tok/s"
        self._bar.update(stats.questions, figures=figures)
        if not self._console.is_terminal and time.monotonic() - self._said_s >= _SHOWN_EVERY_S:
            self._said_s = time.monotonic()
            self._console.print(f"{stats.questions:,} questions: {figures}", highlight=False)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
