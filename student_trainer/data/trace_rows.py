"""Rows of format `trace` as two tasks: reason and then answer, or answer at once, each after its own prefix.

In: a row that `student-trainer traces` wrote; out: conversations whose last turn carries a weight for every character.
Must never teach a rationale that was not verified: a row without a trace teaches its answer alone. Source: docs/concepts/method.md 7.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from student_trainer.data.rows.formats import Conversation, Row, Turn, read_rows
from student_trainer.data.rows.intake import Intake
from student_trainer.data.trace_schema import Step, Trace, TraceError, from_fields, prompt_sha256
from student_trainer.data.trace_spans import find_span
from student_trainer.errors import DataError

TASKS = ("reason", "answer")


@dataclass(frozen=True)
class TraceTasks:
    """How a trace becomes text and weights; the defaults are those of docs/concepts/method.md 7.3.

    Attributes:
        tasks: which of `reason` and `answer` are made.
        reason_prefix, answer_prefix: put before the user's last turn; at inference the prefix chooses the task.
        open_tag, close_tag: around the steps; the student's own where it has some.
        reason_share: weight of the reason task against the answer task.
        gamma: weights grow with confidence to this power.
        answer_weight, step_weight, evidence_weight, markup_weight: of the characters of each part.
        evidence_bonus: what a step with verified evidence weighs more, as a share.
    """

    tasks: tuple[str, ...] = TASKS
    reason_prefix: str = "[reason] "
    answer_prefix: str = "[answer] "
    open_tag: str = "<think>"
    close_tag: str = "</think>"
    reason_share: float = 1.0
    gamma: float = 1.0
    answer_weight: float = 1.0
    step_weight: float = 0.5
    evidence_weight: float = 0.25
    markup_weight: float = 0.1
    evidence_bonus: float = 0.2


@dataclass(frozen=True)
class TaskRow:
    """A conversation, the row it is from, the task it is ("" for rows of other formats), and how many steps the row's trace has."""

    row: Row
    task: str
    conversation: Conversation
    steps: int = 0

    @property
    def key(self) -> str:
        """ "file:line", with the task where a row has several."""
        return f"{self.row.key}[{self.task}]" if self.task else self.row.key


def task_rows(
    rows: Sequence[Row], format_name: str, system_prompt: str, tasks: TraceTasks, intake: Intake, path: str = ""
) -> list[TaskRow]:
    """What the rows of one source teach, in order.

    Args:
        intake, path: as `formats.read_rows`; a trace that is none, or of another prompt, makes a bad row.
    Raises:
        DataError: as `formats.read_rows`; or no row has anything for the tasks.
    """
    name, pairs = read_rows(rows, format_name, system_prompt, intake, path)
    if name != "trace":
        return [TaskRow(row, "", conversation) for row, conversation in pairs]
    found: list[TaskRow] = []
    for row, conversation in pairs:
        try:
            found += list(_tasks_of(row, conversation, tasks))
        except DataError as error:
            intake.leave_out(error, row.fields)
    if not found:
        raise rows[0].error(f"no row of this source has anything for tasks {', '.join(tasks.tasks)}")
    return found


def _tasks_of(row: Row, conversation: Conversation, tasks: TraceTasks) -> Iterator[TaskRow]:
    *before, answer = conversation.turns
    trace = _trace(row, before[-1].content)
    confidence = trace.answer.confidence**tasks.gamma if trace else 1.0
    for task in tasks.tasks:
        prefix = tasks.reason_prefix if task == "reason" else tasks.answer_prefix
        asked = (*before[:-1], replace(before[-1], content=prefix + before[-1].content))
        if task == "answer":
            pieces = [(answer.content, tasks.answer_weight * confidence)]
        elif trace is None:
            continue
        else:
            share = confidence * tasks.reason_share
            pieces = [(text, weight * share) for text, weight in render(trace, answer.content, tasks)]
        steps = len(trace.steps) if trace else 0
        yield TaskRow(row, task, replace(conversation, turns=(*asked, _weighted(pieces))), steps)


def render(trace: Trace, answer: str, tasks: TraceTasks) -> list[tuple[str, float]]:
    """The steps as plain text and the answer, as pieces with their weights before confidence in the answer."""
    markup = tasks.markup_weight
    pieces = [(f"{tasks.open_tag}\n", markup)]
    for number, step in enumerate(trace.steps, start=1):
        pieces += [(f"{number}. ", markup), (step.text, _step_weight(trace, step, tasks))]
        quotes = trace.evidence_of(step)
        for place, quote in enumerate(quotes):
            pieces += [(' [ev: "' if place == 0 else '", "', markup), (quote.text, tasks.evidence_weight)]
        pieces.append(('"]\n' if quotes else "\n", markup))
    return [*pieces, (f"{tasks.close_tag}\n", markup), (answer, tasks.answer_weight)]


def _step_weight(trace: Trace, step: Step, tasks: TraceTasks) -> float:
    bonus = tasks.evidence_bonus if trace.evidence_of(step) else 0.0
    return tasks.step_weight * step.confidence**tasks.gamma * (1 + bonus)


def _weighted(pieces: Iterable[tuple[str, float]]) -> Turn:
    """The assistant's turn; its end weighs as its last piece, the answer."""
    kept = [(text, weight) for text, weight in pieces if text]
    weights = tuple((len(text), weight) for text, weight in kept)
    return Turn("assistant", "".join(text for text, _ in kept), weights)


def _trace(row: Row, prompt: str) -> Trace | None:
    """The row's trace, checked against the prompt it claims to be of."""
    fields = row.fields["trace"]
    if fields is None:
        return None
    try:
        trace = from_fields(fields)
    except TraceError as error:
        raise row.error(str(error), "trace") from error
    if trace.prompt_sha256 != prompt_sha256(prompt):
        raise row.error("is of another prompt", "trace.prompt_sha256", trace.prompt_sha256)
    for quote in trace.evidence:
        if find_span(prompt, quote.text, quote.start, quote.end) != (quote.start, quote.end):
            raise row.error("is not what stands in the prompt", f"trace.evidence[{quote.id}]", quote.text)
    return trace


def check_tasks(tasks: TraceTasks) -> None:
    """Refuses what would make no text or no loss.

    Raises:
        DataError: naming the setting.
    """
    if not tasks.tasks or len(set(tasks.tasks)) != len(tasks.tasks) or any(task not in TASKS for task in tasks.tasks):
        raise DataError("must be some of reason and answer, each once", field="traces.tasks", value=list(tasks.tasks))
    if len(tasks.tasks) == 2 and tasks.reason_prefix == tasks.answer_prefix:
        raise DataError("must differ between the tasks", field="traces.reason_prefix", value=tasks.reason_prefix)
