"""The teacher's rows on the student's device, in the forms in which labels travel.

In: tensors decoded from the wire. Out: a chunk of rows, and of a chunk either logits or K ids with a tail.
Must never widen more than a chunk to [C, V], nor compare anything itself (see `integrity.py`).

Axes: N rows, C rows of a chunk, V vocabulary rows, K kept ids, D width. All figures are at temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from student_trainer.errors import DataError
from student_trainer.losses.head import Head
from student_trainer.losses.integrity import BFLOAT16, Tolerance


class Seen(NamedTuple):
    """What the student recomputes from a chunk, to hold against `lse_N` and `label_logp_N`."""

    lse_C: Tensor
    label_logp_C: Tensor


@dataclass(frozen=True, eq=False)
class HiddenRows:
    """States after the teacher's final norm, and its head: exact at every temperature (docs/concepts/method.md 3).

    Attributes:
        hidden_ND: in the wire's dtype.
        head: of the teacher, sliced to the V of the student's.
        lse_N, label_logp_N: as served; NaN in rows of which the teacher sends none.
        tolerance: for the integrity check.
        checked: how many rows have lse and label_logp, if not all; not known of a part of the rows.
        checked_row: int, on the host, which rows these are, where that is asked; None: not told.
    """

    hidden_ND: Tensor
    head: Head
    lse_N: Tensor
    label_logp_N: Tensor
    tolerance: Tolerance = BFLOAT16
    checked: int | None = None
    checked_row: np.ndarray | None = None

    @property
    def vocab_rows(self) -> int:
        return self.head.vocab_rows

    def take(self, index_C: Tensor | slice) -> HiddenRows:
        """The rows `index_C` (int64, or a slice: then without a copy)."""
        lse_C, label_logp_C = self.lse_N[index_C], self.label_logp_N[index_C]
        return HiddenRows(self.hidden_ND[index_C], self.head, lse_C, label_logp_C, self.tolerance)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """[N, V] in `dtype`, of all rows held: take a chunk first."""
        return self.head.logits(self.hidden_ND).to(dtype)


@dataclass(frozen=True, eq=False)
class FullRows:
    """Every logit, for small vocabularies; attributes as in `HiddenRows`."""

    logits_NV: Tensor
    lse_N: Tensor
    label_logp_N: Tensor
    tolerance: Tolerance = BFLOAT16

    @property
    def vocab_rows(self) -> int:
        return self.logits_NV.shape[1]

    def take(self, index_C: Tensor | slice) -> FullRows:
        """The rows `index_C` (int64, or a slice: then without a copy)."""
        lse_C, label_logp_C = self.lse_N[index_C], self.label_logp_N[index_C]
        return FullRows(self.logits_NV[index_C], lse_C, label_logp_C, self.tolerance)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """[N, V] in `dtype`."""
        return self.logits_NV.to(dtype)


@dataclass(frozen=True, eq=False)
class TopKRows:
    """K logits a row and the exact log-mass of all others (docs/concepts/method.md 2); a label outside the K changes nothing.

    Attributes:
        topk_ids_NK: int64, distinct in a row.
        topk_logits_NK: logits at those ids.
        tail_logp_N: log of the mass outside; -inf if K = V.
        lse_N, label_logp_N: as served.
        likeliest: k, if ids that the student named are among the K; 0 means all K are the likeliest.
        tolerance: for the integrity check.
    """

    topk_ids_NK: Tensor
    topk_logits_NK: Tensor
    tail_logp_N: Tensor
    lse_N: Tensor
    label_logp_N: Tensor
    tolerance: Tolerance = BFLOAT16
    likeliest: int = 0

    @property
    def vocab_rows(self) -> None:
        """Not known from the rows: ids below the student's V are the feed's promise."""
        return None

    def take(self, index_C: Tensor | slice) -> TopKRows:
        """The rows `index_C` (int64, or a slice: then without a copy)."""
        return TopKRows(
            self.topk_ids_NK[index_C],
            self.topk_logits_NK[index_C],
            self.tail_logp_N[index_C],
            self.lse_N[index_C],
            self.label_logp_N[index_C],
            self.tolerance,
            self.likeliest,
        )

    def bucket(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, K] of the kept ids and [N] of the tail, normalised.

        Logits that travelled as bfloat16 miss a sum of 1 by some thousandths; normalising keeps the divergence proper.
        A sum that misses it by more shows in `seen`.
        """
        topk_logp_NK, tail_logp_N = self._served(dtype)
        total_N = torch.logaddexp(topk_logp_NK.logsumexp(-1), tail_logp_N)
        return topk_logp_NK - total_N[:, None], tail_logp_N - total_N

    def seen(self, label_ids_N: Tensor) -> Seen:
        """The log-sum-exp that makes the mass 1; logp of a kept label, or the served one up to what its place allows.

        A label outside the K has at most the probability of the k-th kept id, and of the whole tail.
        """
        topk_logp_NK, tail_logp_N = self._served(torch.float32)
        lse_N = self.lse_N + torch.logaddexp(topk_logp_NK.logsumexp(-1), tail_logp_N)
        label_NK = self.topk_ids_NK == label_ids_N[:, None]
        kept_N = torch.where(label_NK, topk_logp_NK, -torch.inf).amax(-1)
        outside_N = torch.minimum(self.label_logp_N, torch.minimum(topk_logp_NK[:, self.likeliest - 1], tail_logp_N))
        return Seen(lse_N, torch.where(label_NK.any(-1), kept_N, outside_N))

    def _served(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.topk_logits_NK.to(dtype) - self.lse_N.to(dtype)[:, None], self.tail_logp_N.to(dtype)


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Nothing but what the teacher says of the tokens that are there: enough for a policy gradient (docs/concepts/method.md 10).

    The student can recompute neither figure, so these rows carry no evidence of being about its tokens.

    Attributes:
        lse_N, label_logp_N: as served.
    """

    lse_N: Tensor
    label_logp_N: Tensor

    @property
    def vocab_rows(self) -> None:
        """Not known from the rows."""
        return None

    def take(self, index_C: Tensor | slice) -> GivenRows:
        """The rows `index_C` (int64, or a slice: then without a copy)."""
        return GivenRows(self.lse_N[index_C], self.label_logp_N[index_C])


EvidentRows = HiddenRows | FullRows | TopKRows  # of which the student recomputes lse and logp(label)
TeacherRows = EvidentRows | GivenRows


def seen_in_logits(z_CV: Tensor, label_ids_C: Tensor) -> Seen:
    """The two figures from full logits at temperature 1."""
    lse_C = z_CV.logsumexp(-1)
    return Seen(lse_C, z_CV.gather(-1, label_ids_C[:, None])[:, 0] - lse_C)


def check_vocabulary(rows: TeacherRows, head: Head) -> None:
    """Refuses rows over other ids than the student's head.

    Raises:
        DataError: names both numbers of ids.
    """
    if rows.vocab_rows not in (None, head.vocab_rows):
        ids = f"{rows.vocab_rows} and {head.vocab_rows}"
        raise DataError(f"teacher rows and student head are over {ids} ids; slice both heads to one V")
