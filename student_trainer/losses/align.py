"""The only shift in the house: which rows of a causal model are wanted, and where they stand in a padded batch.

In: loss masks over tokens and packed lengths. Out: flags over rows and flat positions, in packed order.
Must never see logits or labels, nor import torch: whoever shifts a second time does it somewhere else, visibly.

Axes: B sequences, T packed tokens, N wanted rows. The row at position t describes token t+1 of the same sequence.
"""

from __future__ import annotations

import numpy as np

from student_trainer.errors import DataError


def wanted_rows(loss_mask_T: np.ndarray, cu_lengths_B1: np.ndarray) -> np.ndarray:
    """Flags of the rows that describe a supervised token.

    Args:
        loss_mask_T: bool [T]; True at target tokens.
        cu_lengths_B1: int [B+1], rising from 0 to T; sequence b is [cu[b], cu[b+1]).
    Returns:
        bool [T]; row t is wanted iff token t+1 of the same sequence is supervised. As many as there are targets.
    Raises:
        DataError: a sequence supervises its first token, which no row describes; names the sequence.

    Source: docs/concepts/method.md, notation ("the state at position t-1 predicts token t").
    """
    _check_lengths(loss_mask_T, cu_lengths_B1)
    first_B = loss_mask_T[cu_lengths_B1[:-1]]
    if first_B.any():
        raise DataError(f"sequence {int(np.argmax(first_B))} supervises its first token, which no row describes")
    wanted_T = np.zeros_like(loss_mask_T)
    wanted_T[:-1] = loss_mask_T[1:]  # crosses no border: first tokens are never supervised
    return wanted_T


def row_index(cu_lengths_B1: np.ndarray, wanted_T: np.ndarray, padded_length: int) -> np.ndarray:
    """Positions of the wanted rows in the flattening of a right-padded [B, padded_length] batch.

    Args:
        cu_lengths_B1: int [B+1], as in `wanted_rows`.
        wanted_T: bool [T].
        padded_length: tokens of every padded sequence.
    Returns:
        int64 [N], rising: `hidden_BLD.reshape(-1, D)[row_index]` are the student's rows in the teacher's order.
    Raises:
        DataError: a sequence is longer than padded_length, or its last row, which describes nothing, is wanted.
    """
    _check_lengths(wanted_T, cu_lengths_B1)
    lengths_B = np.diff(cu_lengths_B1)
    if lengths_B.max() > padded_length:
        sequence = int(np.argmax(lengths_B))
        raise DataError(f"sequence {sequence} has {lengths_B[sequence]} tokens, padded_length is {padded_length}")
    last_B = wanted_T[cu_lengths_B1[1:] - 1]
    if last_B.any():
        raise DataError(f"the last row of sequence {int(np.argmax(last_B))} is wanted, but describes no token of it")
    packed_N = np.flatnonzero(wanted_T)
    sequence_N = np.searchsorted(cu_lengths_B1, packed_N, side="right") - 1
    return (sequence_N * padded_length + packed_N - cu_lengths_B1[sequence_N]).astype(np.int64)


def _check_lengths(flags_T: np.ndarray, cu_lengths_B1: np.ndarray) -> None:
    if flags_T.ndim != 1 or flags_T.dtype != np.bool_:
        raise DataError("must have one flag per token", field="flags", value=f"{flags_T.dtype}{list(flags_T.shape)}")
    rising = cu_lengths_B1.size >= 2 and cu_lengths_B1[0] == 0 and bool(np.all(np.diff(cu_lengths_B1) > 0))
    if not rising or cu_lengths_B1[-1] != flags_T.size:
        raise DataError(f"lengths must rise from 0 to {flags_T.size}", field="cu_lengths", value=cu_lengths_B1.tolist())
