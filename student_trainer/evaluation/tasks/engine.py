"""What a model must do to be measured: score continuations and write answers, as ids; one class for a student here, one for a served teacher.

In: ids; out: log-probabilities and answers. Nothing is cut to fit: what is too long is refused by name.
Axes: B sequences of a batch, L padded length, N scored rows, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from student_trainer.errors import ModelError
from student_trainer.inference.prompts import Prompter
from student_trainer.inference.sampling import Sampling
from student_trainer.inference.served import Scored, ServedTeacher
from student_trainer.inference.writer import StudentWriter, Written
from student_trainer.losses.head import Head
from student_trainer.model.load import Student

Pair = tuple[Sequence[int], Sequence[int]]
Done = Callable[[int], None] | None


class Engine(Protocol):
    """A model to be measured.

    Attributes:
        name: for people.
        prompter: its tokenizer and template.
        max_tokens: longest sequence it takes; None if it knows no limit.
        max_scored: longest sequence that `score` takes: of a student one token more, since the last is read by nobody.
    """

    name: str
    prompter: Prompter
    max_tokens: int | None
    max_scored: int | None

    def score(self, pairs: Sequence[Pair], done: Done = None) -> list[Scored]:
        """What it says of each continuation behind its context."""
        ...

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, until: Sequence[str] = (), done: Done = None
    ) -> list[Written]:
        """An answer to each prompt; it may go on behind the first of `until`."""
        ...


class StudentEngine:
    """A student in this process.

    Args:
        name: for people.
        student: loaded by `inference.load`.
        prompter: its template.
        batch_size: sequences of a pass.
        chunk_bytes: bound on logits held at a time.
    """

    def __init__(
        self, name: str, student: Student, prompter: Prompter, batch_size: int, chunk_bytes: int = 256 << 20
    ) -> None:
        self.name, self.prompter = name, prompter
        self.student = student
        self.writer = StudentWriter(student, prompter)
        self.max_tokens = self.writer.positions
        self.max_scored = None if self.max_tokens is None else self.max_tokens + 1
        self._batch_size, self._chunk_bytes = batch_size, chunk_bytes

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], done: Done = None) -> list[Scored]:
        """In passes over sequences of like length, the longest first; log-softmax in float32."""
        head = self.student.head(self.student.vocab_rows)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        found: dict[int, Scored] = {}
        for start in range(0, len(order), self._batch_size):
            numbers = order[start : start + self._batch_size]
            try:
                found.update(zip(numbers, self._scored([pairs[number] for number in numbers], head), strict=True))
            except torch.OutOfMemoryError as error:
                raise ModelError(f"{self.name}: out of memory while scoring {len(numbers)} sequences: lower --batch-size") from error  # fmt: skip
            if done is not None:
                done(len(numbers))
        return [found[number] for number in range(len(pairs))]

    def _scored(self, pairs: Sequence[Pair], head: Head) -> list[Scored]:
        # The last token of a sequence has no row that is read.
        lengths = [len(context) + len(told) - 1 for context, told in pairs]
        ids_BL = torch.full((len(pairs), max(lengths)), self.student.pad_id, dtype=torch.int64)
        for b, (context, told) in enumerate(pairs):
            ids_BL[b, : lengths[b]] = torch.tensor([*context, *told][:-1])
        device = head.weight_VD.device
        state_BLD = self.student.states(ids_BL.to(device))
        most = max(1, self._chunk_bytes // (8 * head.vocab_rows))
        found = []
        for b, (context, told) in enumerate(pairs):
            label_N = torch.tensor(list(told), device=device)
            state_ND = state_BLD[b, len(context) - 1 : len(context) - 1 + len(told)]
            logp, is_greedy = 0.0, True
            for part_ND, ids_N in zip(state_ND.split(most), label_N.split(most), strict=True):
                logp_NV = torch.log_softmax(head.logits(part_ND).float(), -1)
                logp += float(logp_NV.gather(1, ids_N[:, None]).double().sum())
                is_greedy = is_greedy and bool((logp_NV.argmax(-1) == ids_N).all())
            found.append(Scored(logp, is_greedy))
        return found

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, until: Sequence[str] = (), done: Done = None
    ) -> list[Written]:
        """In batches of prompts of like length."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found: dict[int, Written] = {}
        for start in range(0, len(order), self._batch_size):
            numbers = order[start : start + self._batch_size]
            made = self.writer.write([prompts[number] for number in numbers], sampling, numbers, until=until)
            found.update(zip(numbers, made, strict=True))
            if done is not None:
                done(len(numbers))
        return [found[number] for number in range(len(prompts))]


class ServedEngine:
    """A teacher behind its server: Score for likelihoods, Generate for answers; its weights are never loaded."""

    def __init__(self, name: str, teacher: ServedTeacher) -> None:
        self.name, self.prompter = name, teacher.prompter
        self.teacher = teacher
        self.max_tokens: int | None = teacher.info.limits.max_sequence_tokens
        self.max_scored: int | None = self.max_tokens

    def score(self, pairs: Sequence[Pair], done: Done = None) -> list[Scored]:
        return self.teacher.score(pairs, done=done)

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, until: Sequence[str] = (), done: Done = None
    ) -> list[Written]:
        return self.teacher.write(prompts, sampling, done=done)


def tokenizer_of(engine: Engine) -> Any:
    """The tokenizer that an engine's ids are of."""
    return engine.prompter.tokenizer
