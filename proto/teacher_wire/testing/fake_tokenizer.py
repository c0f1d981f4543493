"""A tokenizer in a few lines, for fake teachers whose students have another one: bytes, and the longest of some given pieces at each place.

Its ids: `FakeTokenizer.CONTROLS`, then the 256 bytes, then the pieces. A conversation is rendered as its turns, each behind the control token
of its role and a line break, with <end> behind it; the prompt ends with <assistant> and a line break.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from teacher_wire.tokenizing.messages import TextRow, TokenizedRow
from teacher_wire.vocabulary.byte_table import BOS, CONTROL, END, TEXT, THINK_CLOSE, THINK_OPEN, ByteTable


class RowTokenizer(Protocol):
    """What a fake teacher tokenises with.

    Attributes:
        table: of its ids.
        tokenizer_sha256, chat_template_sha256: as `TeacherInfo`.
    """

    @property
    def table(self) -> ByteTable: ...

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def chat_template_sha256(self) -> str: ...

    def rows(self, rows: Sequence[TextRow]) -> list[TokenizedRow]:
        """One answer for each row, in order."""
        ...


@dataclass(frozen=True)
class FakeTokenizer:
    """See module.

    Attributes:
        pieces: byte strings of more than one byte that are tokens.
    """

    pieces: tuple[bytes, ...] = ()
    CONTROLS: ClassVar[dict[str, int]] = {
        "<pad>": CONTROL, "<bos>": BOS, "<end>": END, "<system>": CONTROL, "<user>": CONTROL, "<assistant>": CONTROL,
        "<tool>": CONTROL, "<think>": THINK_OPEN, "</think>": THINK_CLOSE,
    }  # fmt: skip

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def table(self) -> ByteTable:
        held = [b""] * len(self.CONTROLS) + [bytes([byte]) for byte in range(256)] + list(self.pieces)
        ends_V1 = np.concatenate([[0], np.cumsum([len(data) for data in held])]).astype(np.int64)
        roles = [*self.CONTROLS.values(), *[TEXT] * (256 + len(self.pieces))]
        return ByteTable(np.frombuffer(b"".join(held), np.uint8), ends_V1, np.array(roles, np.uint8))

    @property
    def tokenizer_sha256(self) -> str:
        return hashlib.sha256(
            b"fake tokenizer\n" + self.table.bytes_B.tobytes() + repr(self.pieces).encode()
        ).hexdigest()

    @property
    def chat_template_sha256(self) -> str:
        return hashlib.sha256(b"fake chat template").hexdigest()

    def id_of(self, control: str) -> int:
        """The id of a control token, such as "<end>"."""
        return list(self.CONTROLS).index(control)

    def ids(self, text: bytes) -> list[int]:
        """The ids of a text."""
        first, found, place = len(self.CONTROLS), [], 0
        while place < len(text):
            piece = max(
                (p for p in self._by_first.get(text[place], ()) if text.startswith(p, place)), key=len, default=b""
            )
            found.append(first + 256 + self._numbers[piece] if piece else first + text[place])
            place += len(piece) or 1
        return found

    def rows(self, rows: Sequence[TextRow]) -> list[TokenizedRow]:
        return [self._row(row) for row in rows]

    @cached_property
    def _numbers(self) -> dict[bytes, int]:
        return {piece: number for number, piece in enumerate(self.pieces)}

    @cached_property
    def _by_first(self) -> dict[int, list[bytes]]:
        found: dict[int, list[bytes]] = {}
        for piece in self.pieces:
            found.setdefault(piece[0], []).append(piece)
        return found

    def _row(self, row: TextRow) -> TokenizedRow:
        try:
            row.text.decode()
            prompt = self._prompt(json.loads(row.conversation)) if row.conversation else []
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return TokenizedRow.refusal(f"{type(error).__name__}: {error}")
        ids: list[int] = []
        start = 0
        for place, role in (*row.marks, (len(row.text), TEXT)):
            ids += self.ids(row.text[start:place])
            if role != TEXT:
                ids.append(list(self.CONTROLS.values()).index(role))
            start = place
        if row.conversation:
            ids.append(self.id_of("<end>"))
        ends_C = self.table.ends_of(np.array(ids, np.int64)).astype(np.int32)
        return TokenizedRow(np.array(prompt + ids, np.int32), len(prompt), ends_C, bool(row.conversation))

    def _prompt(self, conversation: dict[str, Any]) -> list[int]:
        if "prompt" in conversation:
            return [self.id_of("<bos>"), *self.ids(conversation["prompt"].encode())]
        ids = [self.id_of("<bos>")]
        if conversation.get("tools"):
            ids += [self.id_of("<tool>"), *self.ids(json.dumps(conversation["tools"]).encode())]
        for message in conversation["messages"]:
            ids += [
                self.id_of(f"<{message['role']}>"),
                *self.ids(b"\n" + message["content"].encode()),
                self.id_of("<end>"),
            ]
        return [*ids, self.id_of("<assistant>"), *self.ids(b"\n")]
