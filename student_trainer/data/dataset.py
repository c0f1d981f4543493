"""Tokenised rows with loss masks, and the batches made of them.

In: sources, a tokenizer, a template. Out: a map-style dataset of `Example`s, and `collate`. One conversation is one example, or one for
each of its answers (`encoding`).
Must never use a random number (a resumed run sees the same rows), nor shorten or skip a row without counting it.

Axes: B examples of a batch, L tokens of one example, Lmax of the longest in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from student_trainer.data.readers import ForTeachers, Readers, Reading
from student_trainer.data.rows.intake import BadRow, Intake
from student_trainer.data.rows.sources import DataSource, read_source
from student_trainer.data.teacher_view import TeacherContext, TeacherView, Told
from student_trainer.data.text.answer import Template
from student_trainer.data.text.clock import Clock
from student_trainer.data.text.encoding import Encoder, TokenSequence
from student_trainer.data.text.templates import choose, rendering_sha256
from student_trainer.data.trace_rows import TaskRow, TraceTasks, check_tasks, task_rows
from student_trainer.errors import DataError

if TYPE_CHECKING:
    import torch

Overlong = Literal["refuse", "drop"]
Turns = Literal["auto", "each", "last"]
ROWS_PER_CALL = 1_024  # rows tokenised in one call: enough for the tokenizer's threads, little enough for memory


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised conversation, or one answer of it behind the inference prompt.

    Attributes:
        token_ids: int32 [L].
        loss_mask: bool [L]; True where the token is a target: the assistant's contents and their ends of turn.
        target_bytes: UTF-8 bytes of the row's own characters under the mask, for losses per byte. What the template adds and the
            end-of-turn token count 0 bytes, though their loss is part of the sum: a model must also know when to stop.
        key: "file:line" of the row, with the task of a trace, and with the turn where a conversation is several examples.
        weights: float32 [L], weight of each target's loss; None: 1 everywhere.
        teacher: the row as the only teacher reads it; None where that is as the student does.
        tags: of its row, by which teachers are asked about it (`data.routing`).
        views: the row as one of several teachers reads it, by the teacher's name; who has none reads it as the student does.
        told: what a teacher with another tokenizer must be told to render the same prompt itself; None in a run without one.
        trace_steps: steps of its row's trace, by which a curriculum calls it harder; 0 without one.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    target_bytes: int
    key: str
    weights: np.ndarray | None = None
    teacher: TeacherView | None = None
    tags: tuple[str, ...] = ()
    views: Mapping[str, TeacherView] = field(default_factory=dict)
    told: Told | None = None
    trace_steps: int = 0

    def asked_by(self, name: str) -> TeacherView:
        """What the teacher called `name`, which has the student's tokenizer, is asked about this row."""
        return self.views.get(name) or self.asked

    @property
    def asked(self) -> TeacherView:
        """What a teacher is asked about this row."""
        return self.teacher or TeacherView(self.token_ids, self.loss_mask)

    @property
    def target_weights(self) -> np.ndarray:
        """float32 [N], of its targets in order."""
        if self.weights is None:
            return np.ones(int(self.loss_mask.sum()), np.float32)
        return self.weights[self.loss_mask]


@dataclass(frozen=True, eq=False)
class IndexedExample:
    """What a dataset gives for an index: the index, by which labels are joined, and the example."""

    index: int
    example: Example


class Overlength(NamedTuple):
    """A row left out for its length."""

    key: str
    tokens: int


@dataclass(frozen=True)
class Rendering:
    """How rows became text.

    Attributes:
        template: name or path of the chat template, or "plain".
        template_sha256: digest of the chat template's text; "" for plain.
        kwargs: the config's variables of the template.
        sha256: digest of all that decides the text beside the rows: template, variables, and the day if it is printed.
        day: the day that the template prints, or that a teacher with another tokenizer is told to print, ISO 8601; "" if it prints none.
        rows: rows that were read.
        parted: rows that became one example for each answer, since the template or the tokenizer does not let them share one.
        weightless: rows left out because nothing in them has a weight above 0.
        literal: rows in which control tokens of the tokenizer stand as text and were kept so.
        border_merges: targets whose first token would have been merged with the prompt's last.
    """

    template: str
    template_sha256: str
    kwargs: Mapping[str, Any]
    sha256: str
    day: str
    rows: int
    parted: int
    weightless: int
    literal: int
    border_merges: int


class Batch(TypedDict):
    """Right-padded tensors of one batch. Attention is causal: what stands behind a sequence is not seen by it, and needs no mask."""

    input_ids: torch.Tensor  # int64 [B, Lmax]
    loss_mask: torch.Tensor  # bool [B, Lmax], True at target tokens; the token, not the row that predicts it
    indices: tuple[int, ...]  # [B], positions in the dataset; on the host, where they are read


class TokenizedDataset:
    """Map-style dataset in the order of the sources and their rows.

    Attributes:
        dropped: the examples left out as too long, in order; always empty under overlong="refuse".
        rendering: how the rows were made into text; None for examples made otherwise.
        bad_rows: the rows left out as bad; always empty under `data.bad_rows: refuse`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        dropped: Sequence[Overlength] = (),
        rendering: Rendering | None = None,
        bad_rows: Sequence[BadRow] = (),
    ) -> None:
        self._examples = tuple(examples)
        self.dropped = tuple(dropped)
        self.rendering = rendering
        self.bad_rows = tuple(bad_rows)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> IndexedExample:
        return IndexedExample(range(len(self))[index], self._examples[index])

    def __iter__(self) -> Iterator[IndexedExample]:
        return (IndexedExample(i, example) for i, example in enumerate(self._examples))

    @cached_property
    def sha256(self) -> str:
        """Digest of every id and mask, in order: the same rows, tokenised the same way."""
        digest = hashlib.sha256()
        for example in self._examples:
            digest.update(len(example.token_ids).to_bytes(8, "little"))
            digest.update(example.token_ids.tobytes())
            digest.update(example.loss_mask.tobytes())
            if example.weights is not None:
                digest.update(example.weights.tobytes())
            if example.teacher is not None:
                digest.update(b"teacher" + example.teacher.token_ids.tobytes() + example.teacher.loss_mask.tobytes())
            for name, view in sorted(example.views.items()):
                digest.update(f"view {name}\0".encode() + view.token_ids.tobytes() + view.loss_mask.tobytes())
            if example.tags:
                digest.update(b"tags" + "\0".join(example.tags).encode())
            if example.told is not None:
                digest.update(b"told" + example.told.conversation)
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        """All tokens, prompts included."""
        return sum(example.token_ids.size for example in self._examples)

    @property
    def target_tokens(self) -> int:
        """Tokens under the loss mask, ends of turn included."""
        return sum(int(example.loss_mask.sum()) for example in self._examples)

    @property
    def target_bytes(self) -> int:
        """UTF-8 bytes of all supervised contents."""
        return sum(example.target_bytes for example in self._examples)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(example.token_ids.size for example in self._examples)


def build_dataset(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    system_prompt: str = "",
    max_tokens: int,
    overlong: Overlong = "refuse",
    traces: TraceTasks | None = None,
    turns: Turns = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    intake: Intake | None = None,
    context: TeacherContext | None = None,
    readers: Readers | None = None,
) -> TokenizedDataset:
    """Read, parse and tokenise every source.

    Args:
        template: "auto", "chat", "plain", the name of one of the tokenizer's templates, or a file (`templates.choose`).
        system_prompt: for conversations that have no system turn of their own; "" for none.
        max_tokens: most tokens of one example.
        overlong: "refuse" stops at the first longer example; "drop" leaves it out and counts it in `dropped`.
        traces: what rows of format `trace` become.
        turns: "auto", "each" or "last": which answers are learned, and what shares a sequence (`encoding.Encoder.encode`).
        template_kwargs: variables of the chat template; a row's own stand before them.
        clock: the day that the template prints; today's if None.
        intake: takes bad rows and is told what each source holds; None refuses bad rows.
        context: what of a row the only teacher alone is told; None for nothing.
        readers: who reads the rows beside the student; None for nobody who reads them otherwise.

    Raises:
        DataError: anything wrong with a source, a row or the template; an overlong row; or no row left.
    """
    for name, value, known in (("overlong", overlong, get_args(Overlong)), ("turns", turns, get_args(Turns))):
        if value not in known:
            raise DataError(f"must be one of {', '.join(known)}", field=name, value=value)
    if not sources:
        raise DataError("there is no source of data", field="sources")
    check_tasks(traces or TraceTasks())
    clock, intake = clock or Clock(), intake or Intake()
    chosen = choose(template, tokenizer, kwargs=template_kwargs, clock=clock)
    encoder = Encoder(tokenizer, chosen)
    if context is not None:
        readers = replace(readers or Readers(), context=context)
    reading = None
    if readers is not None:
        another = partial(choose, template, tokenizer, kwargs=template_kwargs, clock=clock)
        reading = Reading(readers, tokenizer, another, template_kwargs or {}, clock.day)
    examples: list[Example] = []
    dropped: list[Overlength] = []
    weightless: list[TaskRow] = []
    rows = 0
    for source in sources:
        read = _examples(source, chosen, encoder, turns, system_prompt, traces or TraceTasks(), intake, reading)
        for made, found in read:
            rows += 1
            if not found:
                weightless.append(made)
            for example in found:
                tokens = example.token_ids.size
                if tokens <= max_tokens:
                    examples.append(example)
                elif overlong == "drop":
                    dropped.append(Overlength(example.key, tokens))
                else:
                    message = f"{example.key}: {tokens} tokens are above the limit of {max_tokens}"
                    raise DataError(f"{message}; raise max_tokens or set overlong=drop", field="max_tokens")
    if not examples and dropped:
        shortest = min(row.tokens for row in dropped)
        raise DataError(f"all {len(dropped)} rows are above {max_tokens} tokens; the shortest has {shortest}")
    if not examples and not weightless:
        raise intake.all_bad(sources[0].path, intake.bad)
    if not examples:
        raise weightless[0].row.error(f"nothing is left to learn: all {len(weightless)} rows have the weight 0")
    kwargs = dict(template_kwargs or {})
    rendering = Rendering(
        chosen.name, chosen.source_sha256, kwargs, rendering_sha256(chosen, kwargs, clock),
        clock.day.isoformat() if clock.asked or (readers is not None and readers.tells) else "", rows, encoder.parted, len(weightless), chosen.literal_rows,
        encoder.border_merges,
    )  # fmt: skip
    return TokenizedDataset(examples, dropped, rendering, intake.bad)


def collate(
    items: Sequence[IndexedExample], pad_id: int, padded_length: Callable[[int], int] = lambda longest: longest
) -> Batch:
    """Right-pad examples into one batch.

    Args:
        items: what the dataset gave; at least one.
        pad_id: the id written behind the shorter examples; masked in `loss_mask`.
        padded_length: Lmax for a longest example of so many tokens; not less.
    """
    import torch

    shape = len(items), padded_length(max(item.example.token_ids.size for item in items))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.bool_)
    for b, item in enumerate(items):
        example, length = item.example, item.example.token_ids.size
        input_ids[b, :length] = example.token_ids
        loss_mask[b, :length] = example.loss_mask
    return {
        "input_ids": torch.from_numpy(input_ids),
        "loss_mask": torch.from_numpy(loss_mask),
        "indices": tuple(item.index for item in items),
    }


def _examples(
    source: DataSource,
    template: Template,
    encoder: Encoder,
    turns: str,
    system_prompt: str,
    traces: TraceTasks,
    intake: Intake,
    reading: Reading | None,
) -> Iterator[tuple[TaskRow, list[Example]]]:
    """The conversations of a source in order, each with its examples; none where nothing in it has a weight above 0."""
    read = read_source(source, intake)
    if reading is not None:
        read = [replace(row, beside=reading.fields) for row in read]
    rows = task_rows(read, source.format, system_prompt, traces, intake, source.path)
    for start in range(0, len(rows), ROWS_PER_CALL):
        some, answers, told = [], [], []
        for made in rows[start : start + ROWS_PER_CALL]:
            try:
                found = template.answers(made.conversation, turns)
                told.append({} if reading is None else reading.answers(made, turns))
                answers.append(found)
                some.append(made)
            except DataError as error:  # templates know conversations, not rows: the place is added here
                intake.leave_out(error if error.line else made.row.error(str(error)), made.row.fields)
        if not some:
            continue
        views = [{} for _ in some] if reading is None else reading.encode(told, turns)
        for made, sequences, seen in zip(some, encoder.encode(answers, turns), views, strict=True):
            try:
                if made.task and not sequences:
                    raise made.row.error("no target has a weight above 0")
                examples = [_example(made, sequence, parted=len(sequences) > 1) for sequence in sequences]
                if reading is not None:
                    held = reading.of(made, source.tags, sequences, seen)
                    examples = [_with(example, more) for example, more in zip(examples, held, strict=True)]
            except DataError as error:
                intake.leave_out(error, made.row.fields)
                continue
            yield made, examples


def _example(made: TaskRow, sequence: TokenSequence, *, parted: bool) -> Example:
    if sequence.loss_mask[0]:
        raise made.row.error("the answer has no token before it, so nothing can predict its first token")
    if not sequence.loss_mask.any():
        raise made.row.error("no target has a weight above 0")
    key = f"{made.key}[turn {sequence.turns[0]}]" if parted else made.key
    return Example(
        sequence.token_ids, sequence.loss_mask, sequence.target_bytes, key, sequence.weights, trace_steps=made.steps
    )


def _with(example: Example, held: ForTeachers) -> Example:
    return replace(example, teacher=held.teacher, tags=held.tags, views=held.views or {}, told=held.told)
