"""The types between rows and templates: a `Row` with its place, and the `Conversation` made of it.

Knows no format and no file. `data.formats` re-exports all of it; import it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from student_trainer.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One JSON object and where it stands.

    Attributes:
        fields: the object, under the names that formats know (`columns` of the source applied).
        file: the source as the config names it, or the file of a folder.
        line: line from 1 (JSON Lines, CSV), or position from 1 (JSON list, Parquet, `datasets`).
        renamed: a format's field -> the row's own name for it, where `columns` maps it; errors name the row's own.
        beside: fields that somebody other than the format reads.
    """

    fields: Mapping[str, Any]
    file: str
    line: int
    renamed: Mapping[str, str] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, message: str, field: str = "", value: object = None) -> DataError:
        """A `DataError` at this row; to be raised by the caller."""
        for end in range(len(field), 0, -1):  # "messages[0].role" is about the column mapped to "messages"
            if field[:end] in self.renamed and field[end : end + 1] in ("", ".", "["):
                field = self.renamed[field[:end]] + field[end:]
                break
        return DataError(message, file=self.file, line=self.line, field=field, value=value)


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Attributes:
        role: one of `ROLES`.
        content: the text; "" only where `extra` says the rest (an assistant that calls tools), of an empty system message
            and of a tool that answered nothing.
        weights: (characters, weight of their loss) all along the content; empty: `loss_weight` everywhere.
        loss_weight: of an assistant turn's loss; 0 makes it context that is not trained.
        extra: further fields of the message as chat templates read them: `reasoning_content`, `tool_calls`, `name`, `tool_call_id`.
    """

    role: str
    content: str
    weights: tuple[tuple[int, float], ...] = ()
    loss_weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a chat template takes it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Conversation:
    """Turns in order: an optional system turn first, the last one the assistant's.

    Attributes:
        tools: JSON schemas of the tools on offer, as chat templates take them.
        template_kwargs: further variables of the chat template, such as `enable_thinking`; a row's own stand before the config's.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
