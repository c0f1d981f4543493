"""What the trained and the exported student are both asked, and the rows that a quantisation is calibrated on.

In: rows of a file, or of the run itself; out: token ids. A row's prompt is what inference feeds the student to get its last answer.
Axes: T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from student_trainer.config.data import DataConfig
from student_trainer.data.dataset import TokenizedDataset, build_dataset
from student_trainer.data.inputs import source_of
from student_trainer.data.rows.formats import Conversation, Turn
from student_trainer.data.rows.intake import BadRow, Intake
from student_trainer.data.rows.sources import parse_source, read_source
from student_trainer.data.text.encoding import Encoder
from student_trainer.data.text.templates import choose
from student_trainer.errors import DataError
from student_trainer.rollout.prompts import prompt_length

MOST_TOKENS = (
    1024  # of a prompt or a calibration row; a longer prompt is left out, a longer row cut, and both are counted
)
_OURS = (
    "What is the capital of France?", "Write a haiku about rain.", "2 + 2 * 3 =", "Translate to German: good morning", "List three prime numbers.",
    "Explain photosynthesis in one sentence.", "def fibonacci(n):", "Who wrote Hamlet?",
)  # fmt: skip


class Rows:
    """Rows to ask about and to calibrate on, by the tokenizer and template that the student was trained with.

    Args:
        tokenizer: the student's.
        rows: `path` or `path#N`; None takes the run's held-out rows, else its training rows, else prompts of our own.
        data: the section `data` of the run; None where there is none.

    Attributes:
        told: where they are from.
        limit: tokens of the longest prompt that may be asked, once prompts were.
        left_out: prompts that are empty or above `limit`.
        cut: calibration rows that end at `MOST_TOKENS`.
        bad: rows that cannot be read, in the order of the files.
    """

    def __init__(self, tokenizer: Any, rows: str | None, data: DataConfig | None) -> None:
        self._tokenizer, self._data = tokenizer, data
        self.limit, self.left_out, self.cut = MOST_TOKENS, 0, 0
        self._bad: dict[tuple[str, int], BadRow] = {}
        if rows is not None:
            self._sources, self.told = [parse_source(rows)], rows
        elif data is not None:
            sources = data.eval or data.train
            self._sources = [source_of(source) for source in sources]
            self.told = f"the run's {'held-out' if data.eval else 'training'} rows"
        else:
            self._sources, self.told = [], "prompts of our own, since no rows are named (--rows)"

    @property
    def bad(self) -> list[BadRow]:
        """Each row once, however often the files were read."""
        return list(self._bad.values())

    @property
    def notes(self) -> list[str]:
        """Whatever was left out or cut, one line per reason."""
        told = []
        if bad := self.bad:
            told.append(
                f"bad rows of {self.told}, left out: {len(bad):,}; the first is {bad[0].file}:{bad[0].line}: {bad[0].reason}"
            )
        if self.left_out:
            told.append(f"prompts that are empty or above {self.limit:,} tokens, not asked: {self.left_out:,}")
        if self.cut:
            told.append(f"calibration rows above {MOST_TOKENS:,} tokens, read as far as those: {self.cut:,}")
        return told

    def prompts(self, count: int, most: int | None) -> list[list[int]]:
        """At most `count` prompts, spread over the rows.

        Args:
            count: how many.
            most: longest prompt; None: `MOST_TOKENS` alone bounds it.

        Raises:
            DataError: rows that cannot be read, or none that is short enough.
        """
        if not self._sources:
            found = self._encoded([Conversation((Turn("user", text),)) for text in _OURS])
        elif (asked := self._questions()) is not None:
            found = self._encoded(asked)
        else:
            found = [row.example.token_ids[: prompt_length(row.example)].tolist() for row in self._dataset()]
        self.limit = limit = min(MOST_TOKENS, most) if most is not None else MOST_TOKENS
        short = [ids for ids in found if 0 < len(ids) <= limit]
        self.left_out = len(found) - len(short)
        if not short:
            raise DataError(f"no prompt has between 1 and {limit} tokens", field="--rows", value=self.told)
        return [short[i] for i in _spread(len(short), count)]

    def whole(self, count: int) -> list[list[int]]:
        """At most `count` rows with their answers, to calibrate on; longer ones end at `MOST_TOKENS`, as calibration reads pieces of text.

        Raises:
            DataError: there are no rows, or they have no answers.
        """
        if not self._sources:
            raise DataError(
                "a quantisation is calibrated on rows, and there is no run to take them from: name a file by --rows"
            )
        if self._questions() is not None:
            raise DataError(
                "a quantisation is calibrated on rows with answers, and these have prompts alone",
                field="--rows",
                value=self.told,
            )
        rows = self._dataset()
        chosen = [rows[i].example.token_ids.tolist() for i in _spread(len(rows), count)]
        self.cut = sum(len(ids) > MOST_TOKENS for ids in chosen)
        return [ids[:MOST_TOKENS] for ids in chosen]

    def _questions(self) -> list[Conversation] | None:
        """The rows as questions, if they have a prompt and no answer."""
        intake = Intake("skip")
        rows = [row for source in self._sources for row in read_source(source, intake)]
        self._note(intake)
        if any(set(row.fields) - {"prompt", "system"} or not isinstance(row.fields.get("prompt"), str) for row in rows):
            return None
        system = [(Turn("system", str(row.fields["system"])),) if row.fields.get("system") else () for row in rows]
        return [
            Conversation((*before, Turn("user", row.fields["prompt"])))
            for before, row in zip(system, rows, strict=True)
        ]

    def _dataset(self) -> TokenizedDataset:
        settings: dict[str, Any] = {}
        if self._data is not None:
            settings = {
                "template": self._data.template,
                "system_prompt": self._data.system_prompt or "",
                "template_kwargs": self._data.template_kwargs,
            }
        intake = Intake("skip")
        rows = build_dataset(self._sources, self._tokenizer, max_tokens=2**31 - 1, intake=intake, **settings)
        self._note(intake)
        return rows

    def _note(self, intake: Intake) -> None:
        for row in intake.bad:
            self._bad.setdefault((row.file, row.line), row)

    def _encoded(self, conversations: list[Conversation]) -> list[list[int]]:
        data = self._data
        template = choose(
            "auto" if data is None else data.template,
            self._tokenizer,
            kwargs=None if data is None else data.template_kwargs,
        )
        if data is not None and data.system_prompt:
            system = Turn("system", data.system_prompt)
            conversations = [
                c if c.turns[0].role == "system" else replace(c, turns=(system, *c.turns)) for c in conversations
            ]
        return Encoder(self._tokenizer, template).prompts(
            [template.prompt(conversation) for conversation in conversations]
        )


def _spread(of: int, count: int) -> list[int]:
    """At most `count` numbers below `of`, evenly spread, so that sources and kinds of rows are all among them."""
    return sorted({int(place) for place in np.linspace(0, of - 1, min(of, count)).round()})
