"""The tokens of a request: packed sequences and the rows that are wanted of them.

Axes: B sequences, T packed tokens, N wanted rows, M named ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teacher_wire.core.errors import RequestError


@dataclass(frozen=True)
class TokenBatch:
    """B sequences packed into T tokens, and which of their rows are wanted.

    Attributes:
        token_ids_T: int32 ids.
        cu_lengths_B1: int32, rising from 0 to T; sequence b is [cu[b], cu[b+1]).
        wanted_T: bool; row t describes token t+1, so the last token of a sequence cannot be wanted.
        extra_ids_NM: int32 ids, distinct in a row, whose logits the student wants beside the likeliest ones; or None.

    Raises:
        RequestError: the three do not fit together.
    """

    token_ids_T: np.ndarray
    cu_lengths_B1: np.ndarray
    wanted_T: np.ndarray
    extra_ids_NM: np.ndarray | None = None

    def __post_init__(self) -> None:
        ids, cu, wanted = self.token_ids_T, self.cu_lengths_B1, self.wanted_T
        for name, array, dtype in (
            ("token_ids", ids, np.int32),
            ("cu_lengths", cu, np.int32),
            ("wanted", wanted, np.bool_),
        ):
            if array.ndim != 1 or array.dtype != dtype:
                raise RequestError(
                    "wrong type", field=name, value=f"{array.dtype}{list(array.shape)}", limit=f"{np.dtype(dtype)}[n]"
                )
        if cu.size < 2 or cu[0] != 0 or cu[-1] != ids.size or np.any(np.diff(cu.astype(np.int64)) < 2):
            raise RequestError(
                "cu_lengths must rise from 0 to the number of tokens in steps of at least 2",
                field="cu_lengths", value=_short(cu), limit=f"0..{ids.size}",
            )  # fmt: skip
        if wanted.size != ids.size:
            raise RequestError("must have one flag per token", field="wanted", value=wanted.size, limit=ids.size)
        if np.any(wanted[cu[1:] - 1]):
            sequence = int(np.argmax(wanted[cu[1:] - 1]))
            raise RequestError("the last token of a sequence has no row", field="wanted", value=f"sequence {sequence}")
        if not wanted.any():
            raise RequestError("no row is wanted", field="wanted", value=0, limit=">= 1")
        if np.any(ids < 0):
            raise RequestError("negative token id", field="token_ids", value=int(ids.min()), limit=">= 0")
        if self.extra_ids_NM is not None:
            self._check_extra(self.extra_ids_NM)

    def _check_extra(self, extra_NM: np.ndarray) -> None:
        if extra_NM.ndim != 2 or extra_NM.dtype != np.int32 or extra_NM.shape[0] != self.rows or not extra_NM.shape[1]:
            shown = f"{extra_NM.dtype}{list(extra_NM.shape)}"
            raise RequestError("wrong type", field="extra_ids", value=shown, limit=f"int32[{self.rows}, M]")
        if np.any(extra_NM < 0) or np.any(np.diff(np.sort(extra_NM, axis=-1), axis=-1) == 0):
            raise RequestError("ids of a row must be distinct and not negative", field="extra_ids")

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[bool]] | None = None) -> TokenBatch:
        """Packs sequences of ids; by default every row that has a next token is wanted."""
        lengths = [len(s) for s in sequences]
        cu = np.zeros(len(sequences) + 1, np.int32)
        cu[1:] = np.cumsum(lengths, dtype=np.int32)
        ids = np.fromiter((i for s in sequences for i in s), np.int32, int(cu[-1]))
        if wanted is None:
            flags = np.ones(ids.size, np.bool_)
            flags[cu[1:] - 1] = False
        else:
            flags = np.fromiter((bool(w) for s in wanted for w in s), np.bool_)
        return cls(ids, cu, flags)

    @property
    def tokens(self) -> int:
        return int(self.token_ids_T.size)

    @property
    def sequences(self) -> int:
        return int(self.cu_lengths_B1.size - 1)

    @property
    def rows(self) -> int:
        """N, the number of wanted rows."""
        return int(np.count_nonzero(self.wanted_T))

    @property
    def lengths_B(self) -> np.ndarray:
        return np.diff(self.cu_lengths_B1)

    def rows_of(self) -> np.ndarray:
        """Packed positions [N] of the wanted rows."""
        return np.flatnonzero(self.wanted_T)

    def labels_N(self) -> np.ndarray:
        """int32 [N]: the token each wanted row describes."""
        return self.token_ids_T[self.rows_of() + 1]

    def sequence_of_row(self, row: int) -> int:
        """The sequence that wanted row number `row` belongs to."""
        return int(np.searchsorted(self.cu_lengths_B1, self.rows_of()[row], side="right") - 1)

    def sequences_of_rows(self) -> np.ndarray:
        """int64 [N]: the sequence of each wanted row."""
        return np.searchsorted(self.cu_lengths_B1, self.rows_of(), side="right") - 1

    @property
    def row_bounds_B1(self) -> np.ndarray:
        """int64 [B+1]: rows [bounds[b], bounds[b+1]) of an answer are sequence b's; none if it has no wanted row."""
        before_T1 = np.zeros(self.tokens + 1, np.int64)
        np.cumsum(self.wanted_T, out=before_T1[1:])
        return before_T1[self.cu_lengths_B1]

    def select(self, sequences: Sequence[int]) -> TokenBatch:
        """These sequences alone, in the given order, with their extra ids.

        Raises:
            RequestError: a number that no sequence has, or none of them has a wanted row.
        """
        for number in sequences:
            if not 0 <= number < self.sequences:
                limit = f"0..{self.sequences - 1}"
                raise RequestError("no such sequence", field="sequences", value=number, limit=limit)
        chosen = np.asarray(sequences, np.int64)
        cu_B1 = np.zeros(chosen.size + 1, np.int32)
        np.cumsum(self.lengths_B[chosen], out=cu_B1[1:])
        place_T = _ranges(self.cu_lengths_B1, chosen)
        extra_NM = None if self.extra_ids_NM is None else self.extra_ids_NM[_ranges(self.row_bounds_B1, chosen)]
        return TokenBatch(self.token_ids_T[place_T], cu_B1, self.wanted_T[place_T], extra_NM)


def _ranges(bounds_B1: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """All numbers of the intervals [bounds[b], bounds[b+1]) of the chosen b, one interval after the other."""
    parts = [np.arange(bounds_B1[b], bounds_B1[b + 1]) for b in chosen]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _short(array: np.ndarray) -> str:
    return np.array2string(array, threshold=8, edgeitems=3)
