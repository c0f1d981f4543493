"""The bytes that each id of a tokenizer stands for, and the roles of those that stand for none (docs/concepts/method.md 8.3).

`tokenizer_file.byte_table` makes one of a tokenizer.json; teachers give theirs away as an artifact (`artifacts/kinds/byte_table.py`).

Axes: V ids, B bytes of all of them one behind another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Roles of ids; all but TEXT stand for no bytes. UNUSED: beyond the tokenizer. CONTROL: any other control token.
TEXT, UNUSED, CONTROL, BOS, END, THINK_OPEN, THINK_CLOSE = range(7)
ROLES = 7


@dataclass(frozen=True, eq=False)
class ByteTable:
    """See module.

    Attributes:
        bytes_B: uint8.
        ends_V1: int64, of each id's bytes in `bytes_B`, behind a 0: id v has bytes_B[ends_V1[v] : ends_V1[v + 1]].
        role_V: uint8, one of the roles above.
    """

    bytes_B: np.ndarray
    ends_V1: np.ndarray
    role_V: np.ndarray

    def __len__(self) -> int:
        return len(self.role_V)

    def of(self, token_id: int) -> bytes:
        """Its bytes; empty for a role other than TEXT."""
        return self.bytes_B[self.ends_V1[token_id] : self.ends_V1[token_id + 1]].tobytes()

    def ends_of(self, ids_n: np.ndarray) -> np.ndarray:
        """int64 [n], where each token of a text ends, in bytes from its start; a token without bytes ends where the one before it does."""
        return np.cumsum(self.ends_V1[ids_n + 1] - self.ends_V1[ids_n])

    def text_of(self, ids_n: np.ndarray) -> bytes:
        """What these ids stand for, one behind another."""
        return b"".join(self.of(int(token_id)) for token_id in ids_n)

    def padded(self, rows: int) -> ByteTable:
        """The table with UNUSED ids up to `rows` entries, if it has fewer."""
        more = max(0, rows - len(self))
        return ByteTable(
            self.bytes_B,
            np.concatenate([self.ends_V1, np.full(more, self.ends_V1[-1])]),
            np.concatenate([self.role_V, np.full(more, UNUSED, np.uint8)]),
        )
