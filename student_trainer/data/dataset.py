"""Tokenised rows with loss masks, and the batches made of them.

In: sources, a tokenizer, a template. Out: a map-style dataset of `Example`s, and `collate`.
Must never use a random number (a resumed run sees the same rows), nor shorten or skip a row without counting it.

Axes: B examples of a batch, L tokens of one example, Lmax of the longest in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from student_trainer.data.intake import BadRow, Intake
from student_trainer.data.sources import DataSource, read_source
from student_trainer.data.templates import Segment, Template, choose
from student_trainer.data.trace_rows import TaskRow, TraceTasks, check_tasks, task_rows
from student_trainer.errors import DataError

if TYPE_CHECKING:
    import torch

Overlong = Literal["refuse", "drop"]
ROWS_PER_CALL = 1_024  # rows tokenised in one call: enough for the tokenizer's threads, little enough for memory


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised conversation.

    Attributes:
        token_ids: int32 [L].
        loss_mask: bool [L]; True where the token is a target: the assistant's contents and their ends of turn.
        target_bytes: UTF-8 bytes of the supervised contents, for losses per byte. An end-of-turn token counts 0 bytes,
            though its loss is part of the sum: a model must also know when to stop.
        key: "file:line" of the row, with the task of a trace.
        weights: float32 [L], weight of each target's loss; None: 1 everywhere.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    target_bytes: int
    key: str
    weights: np.ndarray | None = None

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


class Batch(TypedDict):
    """Right-padded tensors of one batch. Attention is causal: what stands behind a sequence is not seen by it, and needs no mask."""

    input_ids: torch.Tensor  # int64 [B, Lmax]
    loss_mask: torch.Tensor  # bool [B, Lmax], True at target tokens; the token, not the row that predicts it
    indices: tuple[int, ...]  # [B], positions in the dataset; on the host, where they are read


class TokenizedDataset:
    """Map-style dataset in the order of the sources and their rows.

    Attributes:
        dropped: the rows left out as too long, in order; always empty under overlong="refuse".
        bad_rows: the rows left out as bad; always empty under `data.bad_rows: refuse`.
    """

    def __init__(
        self, examples: Sequence[Example], dropped: Sequence[Overlength] = (), bad_rows: Sequence[BadRow] = ()
    ) -> None:
        self._examples = tuple(examples)
        self.dropped = tuple(dropped)
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
    intake: Intake | None = None,
) -> TokenizedDataset:
    """Read, parse and tokenise every source.

    Args:
        template: a key of `templates.TEMPLATES`, or "auto".
        system_prompt: for conversations that have no system turn of their own; "" for none.
        max_tokens: most tokens of one example.
        overlong: "refuse" stops at the first longer example; "drop" leaves it out and counts it in `dropped`.
        traces: what rows of format `trace` become.
        intake: takes bad rows and is told what each source holds; None refuses bad rows.
    Raises:
        DataError: anything wrong with a source, a row or the template; an overlong row; or no row left.
    """
    if overlong not in get_args(Overlong):
        raise DataError(f"must be one of {', '.join(get_args(Overlong))}", field="overlong", value=overlong)
    if not sources:
        raise DataError("there is no source of data", field="sources")
    check_tasks(traces or TraceTasks())
    intake = intake or Intake()
    chosen = choose(template, tokenizer)
    examples: list[Example] = []
    dropped: list[Overlength] = []
    for source in sources:
        for example in _examples(source, tokenizer, chosen, system_prompt, traces or TraceTasks(), intake):
            tokens = example.token_ids.size
            if tokens <= max_tokens:
                examples.append(example)
            elif overlong == "drop":
                dropped.append(Overlength(example.key, tokens))
            else:
                message = f"{example.key}: {tokens} tokens are above the limit of {max_tokens}"
                raise DataError(f"{message}; raise max_tokens or set overlong=drop", field="max_tokens")
    if not examples and not dropped:
        raise intake.all_bad(sources[0].path, intake.bad)
    if not examples:
        shortest = min(row.tokens for row in dropped)
        raise DataError(f"all {len(dropped)} rows are above {max_tokens} tokens; the shortest has {shortest}")
    return TokenizedDataset(examples, dropped, intake.bad)


def encode(
    conversations: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids int32 [L] and loss mask bool [L] of each list of segments; every segment is tokenised by itself."""
    texts = [segment.text for segments in conversations for segment in segments]
    # verbose=False: the limit is max_tokens of the config, not the tokenizer's idea of its model.
    ids = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    encoded = []
    for segments in conversations:
        parts = list(islice(ids, len(segments)))
        mask = np.repeat([segment.supervised for segment in segments], [len(part) for part in parts])
        encoded.append((np.array([i for part in parts for i in part], dtype=np.int32), mask))
    return encoded


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
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    system_prompt: str,
    traces: TraceTasks,
    intake: Intake,
) -> Iterator[Example]:
    rows = task_rows(read_source(source, intake), source.format, system_prompt, traces, intake, source.path)
    for start in range(0, len(rows), ROWS_PER_CALL):
        some, segmented = [], []
        for made in rows[start : start + ROWS_PER_CALL]:
            try:
                segments = template(made.conversation, tokenizer)
            except DataError as error:  # templates know conversations, not rows: the place is added here
                intake.leave_out(made.row.error(str(error)), made.row.fields)
            else:
                some.append(made)
                segmented.append(segments)
        if not some:
            continue
        for made, segments, (token_ids, loss_mask) in zip(some, segmented, encode(segmented, tokenizer), strict=True):
            try:
                example = _example(made, segments, token_ids, loss_mask, tokenizer)
            except DataError as error:
                intake.leave_out(error, made.row.fields)
            else:
                yield example


def _example(
    made: TaskRow,
    segments: Sequence[Segment],
    token_ids: np.ndarray,
    loss_mask: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    if loss_mask[0]:
        raise made.row.error("the answer has no token before it, so nothing can predict its first token")
    weights = None
    if any(segment.weights for segment in segments):
        weights = token_weights(segments, tokenizer)
        loss_mask = loss_mask & (weights > 0)  # nobody asks a teacher about what weighs nothing
        if not loss_mask.any():
            raise made.row.error("no target has a weight above 0")
    return Example(token_ids, loss_mask, sum(segment.content_bytes for segment in segments), made.key, weights)


def token_weights(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """float32 [L]: the mean weight of each token's characters; 1 in segments without weights.

    Raises:
        DataError: the tokenizer cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise DataError("weights of traces need a fast tokenizer (tokenizer.json)", field="tokenizer")
    parts = []
    for segment in segments:
        encoded = tokenizer(segment.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans_L2 = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        if not segment.weights:
            parts.append(np.ones(len(spans_L2), np.float32))
            continue
        counts, weights = zip(*segment.weights, strict=True)
        sums = np.concatenate([[0.0], np.cumsum(np.repeat(weights, counts))])
        starts = np.minimum(spans_L2[:, 0], len(segment.text) - 1)
        ends = np.maximum(spans_L2[:, 1], starts + 1)  # a token without characters weighs as the one it stands at
        parts.append(((sums[ends] - sums[starts]) / (ends - starts)).astype(np.float32))
    return np.concatenate(parts)
