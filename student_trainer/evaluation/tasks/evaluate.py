"""`student-trainer evaluate`: one table for a student before and after, and its teacher.

In: a `Request`; out: an `Evaluation`. Models are loaded one behind the other, so that the card holds one at a time; whatever can be known to be
wrong is found before the first. A served teacher is asked by its server.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from student_trainer.config.data import SourceConfig
from student_trainer.config.model import ModelConfig
from student_trainer.config.run import TrainConfig
from student_trainer.config.teachers import TeacherConfig
from student_trainer.data.inputs import source_of
from student_trainer.errors import ConfigError
from student_trainer.evaluation.tasks.answers import Answers, question_of, write_answers
from student_trainer.evaluation.tasks.engine import Engine, ServedEngine, StudentEngine
from student_trainer.evaluation.tasks.harness import Tasks, load_tasks, run_tasks
from student_trainer.evaluation.tasks.result import Evaluation, Measured
from student_trainer.evaluation.tasks.rows import RowFigures, measure_rows, measured_as
from student_trainer.evaluation.tasks.speed import measure_speed
from student_trainer.inference.load import Located, load
from student_trainer.inference.prompt_file import FilePrompt, prompts_of
from student_trainer.inference.prompts import Prompter
from student_trainer.inference.served import served_teacher
from student_trainer.inference.speakers import tokenizer_of
from student_trainer.progress import working
from student_trainer.teachers.connect import Connection, connections

TEACHER = "teacher"
SHOWN_SAMPLES = 6
_SPEED_TEXT = "The quick brown fox jumps over the lazy dog. "
_PACKAGES = ("lyceum-distill", "torch", "transformers", "peft", "lm_eval")


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        models: name and place of each student, in the order of the table.
        base: a run's config, whose data, template and system prompt are used; None for defaults.
        rows: held-out rows in place of `data.eval` of the config.
        teacher: whom to ask; None for nobody.
        teacher_tokenizer: folder of the teacher's tokenizer, if no student has it.
        tasks: of lm-eval, by name or path.
        limit, shots, chat: as `harness.run_tasks` takes them.
        answers: questions of the rows that are answered; 0 for none.
        max_new_tokens: of an answer.
        with_speed: measure tokens per second and memory.
        batch_size: sequences of a pass.
        device, dtype: as `inference.load.load` takes them.
        cache_dir: of labels and heads; None for that of the config.
    """

    models: Sequence[tuple[str, Located]]
    base: TrainConfig | None = None
    rows: Sequence[SourceConfig] = ()
    teacher: TeacherConfig | None = None
    teacher_tokenizer: str | None = None
    tasks: Sequence[str] = ()
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    answers: int = 32
    max_new_tokens: int = 256
    with_speed: bool = True
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    cache_dir: Path | None = None

    @property
    def has_rows(self) -> bool:
        """Whether there are held-out rows."""
        return bool(self.rows or (self.base is not None and self.base.data.eval))


@dataclass
class _Found:
    """What was found so far."""

    measured: list[Measured] = field(default_factory=list)
    answers: dict[str, Answers] = field(default_factory=dict)
    tokenizers: list[tuple[str, Any]] = field(default_factory=list)
    of_teacher: dict[str, float] = field(default_factory=dict)


def evaluate(request: Request, console: Console) -> Evaluation:
    """Measures all models.

    Raises:
        StudentError, TeacherWireError: something a user can mend.
    """
    names = [name for name, _ in request.models]
    if twice := next((name for name in [*names, TEACHER] if [*names, TEACHER].count(name) > 1), None):
        raise ConfigError(f"two models are called {twice!r}: name them apart, as NAME=PATH")
    if not (request.has_rows or request.tasks or request.with_speed):
        raise ConfigError("nothing to measure: give --rows, --tasks, or leave out --no-speed")
    if not request.has_rows:
        console.print("[yellow]note:[/] no held-out rows (--rows, or data.eval of a config): acc1, acc3, NLL, KL and answers are left out")  # fmt: skip
    questions = _questions(request)
    tasks = load_tasks(request.tasks, console) if request.tasks else None
    found = _Found()
    if request.teacher_tokenizer is not None:
        found.tokenizers.append((request.teacher_tokenizer, tokenizer_of(request.teacher_tokenizer)))
    with _connected(request.teacher, console) as connection:
        for name, located in request.models:
            with _loaded(request, name, located, console) as engine:
                found.tokenizers.append((located.named, engine.prompter.tokenizer))
                rows = _rows(request, engine, located, connection, console)
                if rows is not None and rows.teacher:
                    found.of_teacher = rows.teacher
                metrics = rows.student if rows is not None else {}
                found.measured.append(_measured(request, engine, located.named, metrics, questions, tasks, found, console))  # fmt: skip
        if connection is not None:
            template, kwargs, _ = _template(request)
            with served_teacher(connection, found.tokenizers, console, template=template, kwargs=kwargs) as teacher:
                served = ServedEngine(TEACHER, teacher)
                what = f"{teacher.info.name} ({teacher.info.model}) at {connection.address}"
                found.measured.append(_measured(request, served, what, found.of_teacher, questions, tasks, found, console))  # fmt: skip
    return Evaluation(tuple(found.measured), _samples(questions, found.answers), _settings(request), _versions())


def _measured(
    request: Request,
    engine: Engine,
    what: str,
    metrics: Mapping[str, float],
    questions: Sequence[FilePrompt],
    tasks: Tasks | None,
    found: _Found,
    console: Console,
) -> Measured:
    """Everything but the figures of rows, of one model."""
    writes = not isinstance(engine, ServedEngine) or "tokens" in engine.teacher.info.generates
    if not writes and (questions or request.with_speed):
        console.print("[yellow]note:[/] the teacher does not write (Generate): its answers and its speed are left out")
    figures = dict(metrics)
    if questions and writes:
        found.answers[engine.name] = write_answers(engine, questions, request.max_new_tokens, console)
        figures |= found.answers[engine.name].figures()
    scores = {} if tasks is None else run_tasks(
        tasks, engine, console, limit=request.limit, shots=request.shots, chat=request.chat
    )  # fmt: skip
    speed: Mapping[str, Any] = {}
    if request.with_speed and writes:
        with working(console, f"measuring the speed of {engine.name}"):
            text = engine.prompter.tokenizer(_SPEED_TEXT, add_special_tokens=False)["input_ids"]
            speed = measure_speed(engine, text).figures()
    made = Measured(engine.name, what, figures, scores, speed)
    made.check()
    return made


@contextlib.contextmanager
def _connected(teacher: TeacherConfig | None, console: Console) -> Iterator[Connection | None]:
    if teacher is None:
        yield None
        return
    with connections([teacher], console) as (connection,):
        yield connection


@contextlib.contextmanager
def _loaded(request: Request, name: str, located: Located, console: Console) -> Iterator[StudentEngine]:
    """A student while the block runs; its memory is free behind it."""
    with working(console, f"loading {located.named}"):
        student = load(located, request.device, request.dtype)
        student.check(ModelConfig(path=located.path))  # whose states and head are read below
    template, kwargs, _ = _template(request)
    engine = StudentEngine(name, student, Prompter(student.tokenizer, template, kwargs), request.batch_size)
    del student
    try:
        yield engine
    finally:
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _rows(
    request: Request, engine: StudentEngine, located: Located, connection: Connection | None, console: Console
) -> RowFigures | None:
    if not request.has_rows:
        return None
    config = measured_as(
        request.base, located.path, request.rows, request.teacher, request.cache_dir, request.batch_size
    )
    found = measure_rows(engine.student, config, connection, console)
    console.print(f"{escape(engine.name)}: measured with {found.rows:,} rows", highlight=False)
    return found


def _questions(request: Request) -> list[FilePrompt]:
    """What is answered: the first rows of the sources."""
    if not request.answers or not request.has_rows:
        return []
    sources = request.rows or (request.base.data.eval if request.base is not None else ())
    _, _, system = _template(request)
    found: list[FilePrompt] = []
    for source in sources:
        if len(found) < request.answers:
            found += prompts_of(source_of(source), system)[: request.answers - len(found)]
    return found


def _template(request: Request) -> tuple[str, dict[str, Any], str]:
    """Template, its variables, and the system prompt."""
    if request.base is None:
        return "auto", {}, ""
    data = request.base.data
    return data.template, dict(data.template_kwargs), data.system_prompt or ""


def _samples(questions: Sequence[FilePrompt], answers: Mapping[str, Answers]) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {
            "prompt": question_of(question.conversation),
            "source": question.key,
            "answers": {name: one.written[place].text for name, one in answers.items()},
        }
        for place, question in enumerate(questions[:SHOWN_SAMPLES])
        if answers
    )


def _settings(request: Request) -> dict[str, Any]:
    rows = request.rows or (request.base.data.eval if request.base is not None else ())
    return {
        "rows": [source.path for source in rows],
        "tasks": list(request.tasks),
        "limit": request.limit,
        "shots": request.shots,
        "chat_template": request.chat,
        "answers": request.answers if request.has_rows else 0,
        "max_new_tokens": request.max_new_tokens,
        "dtype": request.dtype,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
