"""Where a block looks, compared between models of different heads (algorithms.md 5).

In: queries and keys of the student, with gradients, and pooled maps, or keys and values, of the teacher; out: a loss per row. Maps are made
again in chunks of sequences and rows, in the forward pass and once more in the backward pass; `output_attentions` is never asked for.

Axes: N supervised rows of a micro-batch, S its sequences that have any, R rows of the one with most, T tokens, H query heads, G key heads,
d channels of a head, P blocks of keys, A relation heads, F channels of all key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from student_trainer.losses.features.states import wide

SINKS = 4  # the first keys hold most of the mass and teach nothing: dropped, the rest renormalised
FIRST_ROW = 64  # rows before it see one block at most
LEAST_MASS = 0.05  # of a teacher's row beside the sinks; below, the row is left out
RELATION_HEADS = 8
_CHUNK_BYTES = 64 << 20  # of the scores of a chunk of rows
_UNSEEN = -1e30  # log-probability of keys that a row does not see; finite, so that its gradient is 0 and no NaN


@dataclass(frozen=True, eq=False)
class AttentionStates:
    """What one block of the student computes its attention of, with gradients.

    Attributes:
        query_BLHd: normed and rotated, as they are multiplied.
        key_BLGd: likewise.
        plain_key_BLGd: before rotation and before their norm.
        value_BLGd: values.
        scale: of the products.
        softcap: of the scaled products, c tanh(x / c); 0 for none.
        window: how many positions a row sees, itself included; None for all.
    """

    query_BLHd: Tensor
    key_BLGd: Tensor
    plain_key_BLGd: Tensor
    value_BLGd: Tensor
    scale: float
    softcap: float = 0.0
    window: int | None = None

    def visible(self, position_R: Tensor, tokens: int) -> Tensor:
        """bool [..., R, T]: which keys rows [..., R] see."""
        key_T = torch.arange(tokens, device=position_R.device)
        seen_RT = key_T <= position_R[..., None]
        return seen_RT if self.window is None else seen_RT & (key_T > position_R[..., None] - self.window)

    def scores(self, query_SRHd: Tensor, key_STGd: Tensor) -> Tensor:
        """[S, G, H / G, R, T], scaled and capped; all keys."""
        query_SRGhd = query_SRHd.unflatten(2, (key_STGd.shape[2], -1))
        scores = wide(torch.einsum("srghd,stgd->sghrt", query_SRGhd, key_STGd)) * self.scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores


@dataclass(frozen=True, eq=False)
class RowGrid:
    """The supervised rows of a micro-batch by sequence, so that many short sequences cost as few kernels as one long one.

    Attributes:
        sequence_S: int64, which of the B.
        position_SR: int64, of the rows; 0 behind a sequence's last.
        place_N: int64, where the rows are in the flattened grid.
        tokens: T, one more than the highest position.
        tokens_S: one more than the highest position of each sequence.
    """

    sequence_S: Tensor
    position_SR: Tensor
    place_N: Tensor
    tokens: int
    tokens_S: list[int]

    @classmethod
    def of(cls, position_N: np.ndarray, sequence_N: np.ndarray, device: torch.device) -> RowGrid:
        """Of at least one row, in order of sequences and positions."""
        sequence_S, first_S, rows_S = np.unique(sequence_N, return_index=True, return_counts=True)
        place_SR = np.arange(rows_S.max())[None]
        there_SR = place_SR < rows_S[:, None]
        position_SR = np.where(there_SR, position_N[np.minimum(first_S[:, None] + place_SR, len(position_N) - 1)], 0)
        arrays = (sequence_S.astype(np.int64), position_SR, np.flatnonzero(there_SR))
        which_S, rows_SR, place_N = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
        tokens_S = (position_N[first_S + rows_S - 1] + 1).tolist()
        return cls(which_S, rows_SR, place_N, max(tokens_S), tokens_S)

    def of_rows(self, found_SR: Tensor) -> Tensor:
        """[N, ...], what was found of each row."""
        return found_SR.flatten(0, 1).index_select(0, self.place_N)

    def chunks(self, row_bytes: int) -> Iterator[tuple[slice, slice]]:
        """Sequences and rows whose scores, of `row_bytes` a row, lie in memory at a time: whole sequences while they fit, else rows of one."""
        sequences, rows = self.position_SR.shape
        at_a_time = max(1, _CHUNK_BYTES // row_bytes)
        step = max(1, at_a_time // rows)
        for first in range(0, sequences, step):
            for row in range(0, rows, at_a_time):
                yield slice(first, first + step), slice(row, row + at_a_time)


def pooled_logp(states: AttentionStates, rows: RowGrid, block: int) -> Tensor:
    """[N, P], log-probabilities of blocks of keys, averaged over heads, without the sinks and renormalised.

    A block of which a row sees no key has a log-probability below -1e29.

    Args:
        states: of the student's block.
        rows: which.
        block: keys in a block.
    """
    tokens = rows.tokens
    query_SRHd = states.query_BLHd[rows.sequence_S[:, None], rows.position_SR]
    key_STGd = states.key_BLGd[rows.sequence_S, :tokens]

    def run(query_SRHd: Tensor, key_STGd: Tensor, position_SR: Tensor) -> Tensor:
        seen_SRT = states.visible(position_SR, tokens)[:, None, None]
        logp = states.scores(query_SRHd, key_STGd).masked_fill(~seen_SRT, -torch.inf).log_softmax(-1)
        seen_SRT = seen_SRT & (torch.arange(tokens, device=seen_SRT.device) >= SINKS)
        logp = functional.pad(logp.masked_fill(~seen_SRT, _UNSEEN), (0, -tokens % block), value=_UNSEEN)
        pooled_SRP = logp.unflatten(-1, (-1, block)).permute(0, 3, 4, 1, 2, 5).flatten(3).logsumexp(-1)
        return pooled_SRP - pooled_SRP.logsumexp(-1, keepdim=True)

    return _in_chunks(run, rows, query_SRHd.shape[2] * tokens, query_SRHd, key_STGd)


def pooled_kl(logp_RP: Tensor, teacher_RP: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of the pooled maps, a lower bound of that of the whole maps.

    Args:
        logp_RP: the student's, of `pooled_logp`.
        teacher_RP: the teacher's mass per block, sinks dropped and not renormalised.

    Returns:
        [R] nats, and bool [R]: rows whose teacher looks elsewhere than at the sinks with at least LEAST_MASS. Blocks that the student's window
        hides are left out of both.
    """
    seen_RP = logp_RP > _UNSEEN / 2
    teacher_RP = torch.where(seen_RP, teacher_RP.to(logp_RP.dtype), 0)
    mass_R1 = teacher_RP.sum(-1, keepdim=True)
    share_RP = teacher_RP / mass_R1.clamp_min(1e-6)
    log_share_RP = torch.where(share_RP > 0, share_RP, 1).log()
    kl_R = (share_RP * (log_share_RP - torch.where(seen_RP, logp_RP, 0))).sum(-1)
    return kl_R, mass_R1[:, 0] >= LEAST_MASS


def relation_heads(student_width: int, teacher_width: int) -> int:
    """A: the most heads, at most RELATION_HEADS, that divide both widths."""
    return max(a for a in range(1, RELATION_HEADS + 1) if student_width % a == 0 and teacher_width % a == 0)


def relation_kl(student_STF: Tensor, teacher_STF: Tensor, rows: RowGrid, heads: int) -> Tensor:
    """[N], KL between the relations of tokens, softmax(X X^T / sqrt(d)) of causal rows, averaged over relation heads (MiniLMv2).

    Args:
        student_STF, teacher_STF: keys before rotation, or values, all key heads side by side; widths may differ.
        rows: that are compared.
        heads: A, divides both widths.
    """

    def logp(x_STAd: Tensor, position_SR: Tensor) -> Tensor:
        tokens, channels = x_STAd.shape[1], x_STAd.shape[3]
        row_SRAd = x_STAd[torch.arange(len(x_STAd), device=x_STAd.device)[:, None], position_SR]
        scores = wide(torch.einsum("srad,stad->sart", row_SRAd, x_STAd)) * channels**-0.5
        hidden_SRT = torch.arange(tokens, device=x_STAd.device) > position_SR[..., None]
        return scores.masked_fill(hidden_SRT[:, None], -torch.inf).log_softmax(-1)

    def run(_: Tensor, student_STAd: Tensor, teacher_STAd: Tensor, position_SR: Tensor) -> Tensor:
        ours, theirs = logp(student_STAd, position_SR), logp(teacher_STAd, position_SR)
        seen = theirs > -torch.inf
        kl = theirs.exp() * (torch.where(seen, theirs, 0) - torch.where(seen, ours, 0))
        return kl.sum(-1).mean(1)

    student_STAd, teacher_STAd = (x.unflatten(-1, (heads, -1)) for x in (student_STF, teacher_STF))
    return _in_chunks(run, rows, heads * student_STF.shape[1], rows.position_SR, student_STAd, teacher_STAd)


def _in_chunks(
    run: Callable[..., Tensor], rows: RowGrid, row_scores: int, of_rows_SR: Tensor, *of_sequences_S: Tensor
) -> Tensor:
    """[N, ...] from what `run` makes of chunks: of rows, of whole sequences, and of the rows' positions."""
    parts: dict[int, list[Tensor]] = {}
    for sequences, within in rows.chunks(4 * row_scores):
        wholes = (whole[sequences] for whole in of_sequences_S)
        found = _checkpointed(run, of_rows_SR[sequences, within], *wholes, rows.position_SR[sequences, within])
        parts.setdefault(sequences.start, []).append(found)
    return rows.of_rows(torch.cat([torch.cat(found, 1) for found in parts.values()]))


def _checkpointed(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Computed again in the backward pass; the scores of no more than one chunk lie in memory."""
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return run(*tensors)
    found: Tensor = checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
    return found
