"""Which rows of an answer carry the two numbers by which a student checks it, if not all of them do (docs/concepts/method.md 3.6).

In: a batch; out: a flag per wanted row, the same on both sides of the wire. The first and the last wanted row of every sequence are checked,
and one row in eight of the others: a shifted or foreign sequence never passes, a single wrong row is found in an eighth of the cases.
The choice depends on the tokens, not on chance: labels that are computed again are checked at the same rows.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np

from teacher_wire.core.batch import TokenBatch

ONE_IN = 8
_STEP, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def checked_rows(batch: TokenBatch) -> np.ndarray:
    """bool [N]: the wanted rows that are checked. The row at position t of a sequence is, besides the first and the last one, if
    splitmix64(s xor t) is divisible by 8; s is the first 8 bytes, little-endian, of the SHA-256 of the sequence's int32 ids.
    """
    cu_B1, bounds_B1 = batch.cu_lengths_B1.tolist(), batch.row_bounds_B1
    ids_T = np.ascontiguousarray(batch.token_ids_T, "<i4")
    seeds_B = np.array(
        [
            int.from_bytes(hashlib.sha256(ids_T[start:stop].data).digest()[:8], "little")
            for start, stop in pairwise(cu_B1)
        ],
        np.uint64,
    )
    sequence_N = batch.sequences_of_rows()
    position_N = (batch.rows_of() - batch.cu_lengths_B1[sequence_N]).astype(np.uint64)
    checked_N = _splitmix64(seeds_B[sequence_N] ^ position_N) % np.uint64(ONE_IN) == 0
    with_rows = np.diff(bounds_B1) > 0
    checked_N[bounds_B1[:-1][with_rows]] = True
    checked_N[bounds_B1[1:][with_rows] - 1] = True
    return checked_N


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) over uint64, which wraps."""
    z = state + _STEP
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed
