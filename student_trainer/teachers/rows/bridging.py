"""The way to a teacher with another tokenizer, before step 0: its byte table, its tokens of all rows, their alignments, and the classes of ids.

In: a client, the student's tokenizer and the rows of a run; out: a `BridgePlan`. What the teacher is asked is kept on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.markup import escape

from student_trainer.config.run import TOKENS, TrainConfig, cache_folder
from student_trainer.config.teachers import CrossTokenizerConfig
from student_trainer.data.cross_tokenizer.classes import (
    FOLDER,
    Partition,
    classes_key,
    kept_classes,
    vocabulary_classes,
)
from student_trainer.data.cross_tokenizer.first_tokens import first_tokens, first_with_bytes
from student_trainer.data.dataset import Example
from student_trainer.errors import ModelError
from student_trainer.model.load import Outline
from student_trainer.progress import ProgressBar
from student_trainer.teachers.artifact_cache import fetch_artifact
from student_trainer.teachers.rows.bridged_rows import BridgedRow, bridged_row, row_key, text_row
from student_trainer.teachers.rows.reading import BridgePlan
from student_trainer.teachers.rows.tokenised import tokenised
from teacher_wire.artifacts.kinds.byte_table import of_artifact
from teacher_wire.core.errors import CapabilityError
from teacher_wire.core.identity import tokenizer_sha256
from teacher_wire.core.info import BYTE_TABLE, TeacherInfo
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.tokenizing.messages import TextRow, TokenizedRow
from teacher_wire.vocabulary.byte_table import ByteTable
from teacher_wire.vocabulary.tokenizer_file import byte_table

_TOLD_EVERY = 256  # rows between two movements of a bar


def teacher_rows(info: TeacherInfo) -> int:
    """V of a teacher with another tokenizer: ids that its head and its tokenizer have."""
    return min(info.vocab_rows, info.tokenizer_size)


@dataclass(frozen=True)
class Bridging:
    """What a bridge is built of.

    Attributes:
        config: the run.
        settings: of the teacher.
        student: who is to learn.
        student_rows: V of the student's head that learns.
        examples: all that the teacher may be asked about.
        console: told of progress.
        on_trouble: called with a sentence if something cannot be kept.
    """

    config: TrainConfig
    settings: CrossTokenizerConfig
    student: Outline
    student_rows: int
    examples: Sequence[Example]
    console: Console
    on_trouble: Callable[[str], None]

    async def build(self, client: TeacherClient, info: TeacherInfo, *, only_rows: bool) -> BridgePlan:
        """The bridge to a teacher.

        Args:
            client: of its server.
            info: the teacher.
            only_rows: nothing will be computed with its labels, so that no classes are needed.

        Raises:
            TeacherWireError: it does not answer.
            ModelError: the student's tokens do not say which bytes they stand for.
        """
        cache = cache_folder(self.config.run.cache_dir)
        ours, theirs = await self.tables(client, info)
        distinct = {row_key(example): example for example in self.examples}
        texts = [text_row(example, ours) for example in distinct.values()]
        with ProgressBar(self.console, f"tokens of {info.name}", len(texts)) as bar:
            answers = await tokenised(
                lambda some: client.tokenize(info, some), info, texts, cache / TOKENS, bar.update, self.on_trouble
            )
        least = self.settings.min_coverage

        def aligned(tell: Callable[[int], None]) -> dict[bytes, BridgedRow]:
            found: dict[bytes, BridgedRow] = {}
            for (key, example), answer in zip(distinct.items(), answers, strict=True):
                found[key] = bridged_row(example, ours, answer, theirs, least, teacher_rows(info))
                if len(found) % _TOLD_EVERY == 0:
                    tell(len(found))
            return found

        with ProgressBar(self.console, f"rows aligned with {info.name}", len(texts)) as bar:
            rows = await asyncio.to_thread(aligned, bar.update)
        ours, theirs = cut(ours, self.student_rows), cut(theirs, teacher_rows(info))
        key = classes_key(ours, theirs, self._own_sha256(), info.tokenizer_sha256)
        classes = None
        if not only_rows:
            classes = (await self.partition(client, info, ours, theirs)).on(self.student.device)
        settings = self.settings
        digest = hashlib.sha256(f"{key} {info.chat_template_sha256}".encode()).hexdigest()
        return BridgePlan(classes, rows, settings.alm_weight, settings.alm_temperature, digest)

    async def tables(self, client: TeacherClient, info: TeacherInfo) -> tuple[ByteTable, ByteTable]:
        """The bytes of the student's ids and of the teacher's."""
        with self.console.status(f"fetching the byte table of {info.name}"):
            fetched = await fetch_artifact(
                client,
                info,
                info.artifact(BYTE_TABLE),
                self.config.run.cache_dir,
                on_trouble=self.on_trouble,
                max_bytes=round(self.config.cache.heads_gb * 2**30),
            )
        return self._own_table(), of_artifact(fetched)

    async def partition(
        self, client: TeacherClient, info: TeacherInfo, ours: ByteTable, theirs: ByteTable
    ) -> Partition:
        """The classes of the ids of both tables, which are those that are learned."""
        loop = asyncio.get_running_loop()

        async def ask(texts: Sequence[bytes]) -> list[TokenizedRow]:
            return await client.tokenize(info, [TextRow(text) for text in texts])

        def first_of_teacher(texts: Sequence[bytes]) -> np.ndarray:
            rows = asyncio.run_coroutine_threadsafe(ask(texts), loop).result()
            first = [-1 if row.refused else first_with_bytes(row.token_ids_T, row.byte_ends_C) for row in rows]
            return np.array(first, np.int64)

        def make() -> Partition:
            return vocabulary_classes(ours, theirs, first_tokens(self.student.tokenizer, ours), first_of_teacher)

        folder = cache_folder(self.config.run.cache_dir) / FOLDER
        key = classes_key(ours, theirs, self._own_sha256(), info.tokenizer_sha256)
        with self.console.status(f"joining the vocabularies of the student and of {info.name}"):
            return await asyncio.to_thread(kept_classes, folder, key, make)

    def _own_table(self) -> ByteTable:
        """The bytes of the student's ids; what ends its answers ends a turn."""
        tokenizer = self.student.tokenizer
        last = {int(example.token_ids[example.loss_mask][-1]) for example in self.examples}
        added = {
            number: str(token.content) for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        ends = [added[number] for number in sorted(last) if number in added]
        if tokenizer.eos_token is not None and str(tokenizer.eos_token) not in ends:
            ends.append(str(tokenizer.eos_token))
        bos = "" if tokenizer.bos_token is None else str(tokenizer.bos_token)
        written = tokenizer.backend_tokenizer.to_str()
        try:
            return byte_table(written, bos=bos, ends=ends, rows=self.student.vocab_rows)
        except CapabilityError as error:
            raise ModelError(
                f"model.path {self.config.model.path}: the tokenizer does not say which bytes its tokens stand for ({error}), by which "
                "those of a teacher with another tokenizer are joined to them: take a teacher with the student's tokenizer"
            ) from error

    def _own_sha256(self) -> str:
        return tokenizer_sha256(self.student.tokenizer.backend_tokenizer.to_str())


def cut(table: ByteTable, rows: int) -> ByteTable:
    """The table of the first `rows` ids; those that it lacks are unused."""
    if len(table) <= rows:
        return table.padded(rows)
    ends_V1 = table.ends_V1[: rows + 1]
    return ByteTable(table.bytes_B[: int(ends_V1[-1])], ends_V1, table.role_V[:rows])


def tell_coverage(
    name: str, plan: BridgePlan, examples: Sequence[Example], min_coverage: float, console: Console
) -> None:
    """Says how much of the rows a teacher can label, and which it does not."""
    rows = [plan.row(example) for example in examples]
    if not rows:
        return
    refused = [(example.key, row.refused) for example, row in zip(examples, rows, strict=True) if row.refused]
    below = sum(row.view is None and not row.refused for row in rows)
    mean = sum(row.coverage for row in rows) / len(rows)
    told = f"teacher {name}: {mean:.1%} of the tokens of a row are one to one with its own"
    if below:
        told += f"; {below:,} of {len(rows):,} rows are below cross_tokenizer.min_coverage={min_coverage:g} and not labelled by it"
    console.print(escape(told), soft_wrap=True)
    if refused:
        key, why = refused[0]
        told = (
            f"teacher {name} cannot read {len(refused):,} of {len(rows):,} rows and does not label them; {key}: {why}"
        )
        console.print(f"[yellow]note:[/] {escape(told)}", soft_wrap=True)
