"""Where a block looks, compared between models of different heads (docs/concepts/method.md 5).

In: queries and keys of the student, with gradients, and pooled maps, or keys and values, of the teacher; out: a loss per row. Maps are made
again in chunks of sequences and rows, in the forward pass and once more in the backward pass, whose gradients are written out: a graph of the
passes over scores would hold and move several times as many bytes. `output_attentions` is never asked for.

Axes: N supervised rows of a micro-batch, S its sequences that have any, R rows of the one with most, T tokens, H query heads, G key heads,
d channels of a head, P blocks of keys, A relation heads, F channels of all key heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from student_trainer.losses.features.states import wide

SINKS = 4  # the first keys hold most of the mass and teach nothing: dropped, the rest renormalised
FIRST_ROW = 64  # rows before it see one block at most
LEAST_MASS = 0.05  # of a teacher's row beside the sinks; below, the row is left out
RELATION_HEADS = 8
_CHUNK_BYTES = 128 << 20  # of the scores of a chunk of rows; three times as much is held
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
        last_SR: `position_SR` on the host.
    """

    sequence_S: Tensor
    position_SR: Tensor
    place_N: Tensor
    tokens: int
    tokens_S: list[int]
    last_SR: np.ndarray

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
        return cls(which_S, rows_SR, place_N, max(tokens_S), tokens_S, position_SR)

    def of_rows(self, found_SR: Tensor) -> Tensor:
        """[N, ...], what was found of each row."""
        return found_SR.flatten(0, 1).index_select(0, self.place_N)

    def chunks(self, row_bytes: int) -> Iterator[Chunk]:
        """Sequences and rows whose scores, of `row_bytes` a row, lie in memory at a time: whole sequences while they fit, else equal parts of one."""
        sequences, rows = self.last_SR.shape
        at_a_time = max(1, _CHUNK_BYTES // row_bytes)
        step = max(1, at_a_time // rows)
        parts = -(-rows // at_a_time)
        within = -(-rows // parts)
        for first in range(0, sequences, step):
            for row in range(0, rows, within):
                sequence, part = slice(first, first + step), slice(row, row + within)
                yield Chunk(sequence, part, int(self.last_SR[sequence, part].max()) + 1)

    def into(self, whole_BTX: Tensor, rows_SRX: Tensor) -> None:
        """Adds values of the rows at their places; no two rows share one, so that the sum is the same each time."""
        flat_SR = self.sequence_S[:, None] * whole_BTX.shape[1] + self.position_SR
        flat_N = flat_SR.flatten().index_select(0, self.place_N)
        flat_XX = whole_BTX.flatten(0, 1)
        flat_XX.index_copy_(0, flat_N, flat_XX.index_select(0, flat_N) + self.of_rows(rows_SRX).to(whole_BTX.dtype))


@dataclass(frozen=True)
class Chunk:
    """Rows of neighbouring sequences of a `RowGrid`, and how many keys the one that sees the most can see."""

    sequences: slice
    rows: slice
    keys: int


def pooled_logp(states: AttentionStates, rows: RowGrid, block: int) -> Tensor:
    """[N, P], log-probabilities of blocks of keys, averaged over heads, without the sinks and renormalised.

    A block of which a row sees no key has a log-probability below -1e29.

    Args:
        states: of the student's block.
        rows: which.
        block: keys in a block.
    """
    found: Tensor = _PooledLogp.apply(states.query_BLHd, states.key_BLGd, states, rows, block)
    return rows.of_rows(found)


class _PooledLogp(torch.autograd.Function):
    """`pooled_logp` of the grid, [S, R, P], with the gradients of queries and keys.

    With l the log-probability of a key under a head, b its block, g the gradient on the log-sum of b over heads and keys: the gradient on l is
    g exp(l - log-sum) outside of the sinks, and on the score that minus exp(l) times its sum over the keys.
    """

    @staticmethod
    def forward(ctx: Any, query_BLHd: Tensor, key_BLGd: Tensor, states: AttentionStates, rows: RowGrid, block: int) -> Tensor:  # fmt: skip
        blocks = -(-rows.tokens // block)
        sum_SRP = wide(query_BLHd.new_empty(0)).new_full((*rows.position_SR.shape, blocks), -torch.inf)
        for chunk in rows.chunks(4 * query_BLHd.shape[2] * rows.tokens):
            logp_sGhrt = _logp(states, query_BLHd, key_BLGd, rows, chunk, block)[0]
            logp_sGhrt[..., :SINKS] = -torch.inf
            logp_sGhrPb = logp_sGhrt.unflatten(-1, (-1, block))
            top_srP = logp_sGhrPb.amax((1, 2, 5))
            top_srP = torch.where(top_srP > -torch.inf, top_srP, 0)
            total_srP = logp_sGhrPb.sub_(top_srP[:, None, None, ..., None]).exp_().sum((1, 2, 5))
            sum_SRP[chunk.sequences, chunk.rows, : total_srP.shape[-1]] = total_srP.log() + top_srP
        seen_SRP = sum_SRP > -torch.inf
        sum_SRP = torch.where(seen_SRP, sum_SRP, _UNSEEN)
        logp_SRP = sum_SRP - torch.where(seen_SRP.any(-1, keepdim=True), sum_SRP.logsumexp(-1, keepdim=True), 0)
        ctx.save_for_backward(query_BLHd, key_BLGd, sum_SRP, logp_SRP)
        ctx.given = states, rows, block
        return logp_SRP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SRP: Tensor) -> tuple[Tensor | None, ...]:
        query_BLHd, key_BLGd, sum_SRP, logp_SRP = ctx.saved_tensors
        states, rows, block = ctx.given
        slope_SRP = grad_SRP - logp_SRP.exp() * grad_SRP.sum(-1, keepdim=True)
        grad_query_SRHd = query_BLHd.new_zeros(*rows.position_SR.shape, *query_BLHd.shape[2:])
        grad_key_BLGd = torch.zeros_like(key_BLGd, memory_format=torch.contiguous_format)
        for chunk in rows.chunks(4 * query_BLHd.shape[2] * rows.tokens):
            logp_sGhrt, score_sGhrt, query_sGxd, key_sGtd = _logp(states, query_BLHd, key_BLGd, rows, chunk, block)
            blocks = logp_sGhrt.shape[-1] // block
            part = chunk.sequences, chunk.rows, slice(blocks)
            grad_sGhrt = (logp_sGhrt.unflatten(-1, (-1, block)) - sum_SRP[part][:, None, None, ..., None]).exp_()
            grad_sGhrt = grad_sGhrt.mul_(slope_SRP[part][:, None, None, ..., None]).flatten(-2)
            grad_sGhrt[..., :SINKS] = 0
            grad_sGhrt.addcmul_(logp_sGhrt.exp_(), grad_sGhrt.sum(-1, keepdim=True), value=-1)
            if score_sGhrt is not None:
                grad_sGhrt.mul_(1 - (score_sGhrt / states.softcap).square())
            grad_sGxt = grad_sGhrt.mul_(states.scale).to(query_BLHd.dtype).flatten(2, 3)
            heads, at_once = grad_sGhrt.shape[2], grad_sGhrt.shape[3]
            grad_query_sGhrd = (grad_sGxt @ key_sGtd).unflatten(2, (heads, at_once))
            grad_query_SRHd[chunk.sequences, chunk.rows] = grad_query_sGhrd.permute(0, 3, 1, 2, 4).flatten(2, 3)
            _onto(grad_key_BLGd, rows, chunk, grad_sGxt.transpose(2, 3) @ query_sGxd)
        grad_query_BLHd = torch.zeros_like(query_BLHd, memory_format=torch.contiguous_format)
        rows.into(grad_query_BLHd, grad_query_SRHd)
        return grad_query_BLHd, grad_key_BLGd, None, None, None


def _logp(
    states: AttentionStates, query_BLHd: Tensor, key_BLGd: Tensor, rows: RowGrid, chunk: Chunk, block: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probabilities [s, G, h, r, t] of the keys up to the end of a block, -inf where hidden; the scores, if they are capped; queries [s, G, h r, d]
    and keys [s, G, t, d] of the chunk.
    """
    keys = -(-chunk.keys // block) * block
    sequence_s, position_sr = rows.sequence_S[chunk.sequences], rows.position_SR[chunk.sequences, chunk.rows]
    query_srGhd = query_BLHd[sequence_s[:, None], position_sr].unflatten(2, (key_BLGd.shape[2], -1))
    query_sGxd = query_srGhd.permute(0, 2, 3, 1, 4).flatten(2, 3)
    key_stGd = key_BLGd[sequence_s, :keys]
    key_sGtd = functional.pad(key_stGd, (0, 0, 0, 0, 0, keys - key_stGd.shape[1])).transpose(1, 2)
    score_sGxt = wide(query_sGxd @ key_sGtd.transpose(2, 3)).mul_(states.scale)
    score_sGhrt = score_sGxt.unflatten(2, (query_srGhd.shape[3], query_srGhd.shape[1]))
    capped = None
    if states.softcap:
        capped = score_sGhrt = score_sGhrt.div_(states.softcap).tanh_().mul_(states.softcap)
    hidden_srt = ~states.visible(position_sr, keys)[:, None, None]
    # In place unless the scores are needed again: nothing that they are made of is kept.
    masked = score_sGhrt.masked_fill(hidden_srt, -torch.inf) if capped is not None else score_sGhrt.masked_fill_(hidden_srt, -torch.inf)  # fmt: skip
    return masked.log_softmax(-1), capped, query_sGxd, key_sGtd


def _onto(grad_BLGd: Tensor, rows: RowGrid, chunk: Chunk, part_sGtd: Tensor) -> None:
    """Adds the gradient on the first keys of the chunk's sequences, each of which is there once."""
    keys = min(part_sGtd.shape[2], grad_BLGd.shape[1])
    part_stGd = part_sGtd[:, :, :keys].transpose(1, 2)
    if len(grad_BLGd) == len(rows.sequence_S):  # all, in their order
        grad_BLGd[chunk.sequences, :keys] += part_stGd
    else:
        sequence_s = rows.sequence_S[chunk.sequences]
        grad_BLGd[sequence_s, :keys] = grad_BLGd[sequence_s, :keys] + part_stGd


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

    student_STAd, teacher_STAd = (x.unflatten(-1, (heads, -1)) for x in (student_STF, teacher_STF))
    found: Tensor = _RelationKl.apply(student_STAd, teacher_STAd, rows)
    return rows.of_rows(found)


class _RelationKl(torch.autograd.Function):
    """`relation_kl` of the grid, [S, R], with the gradient of the student's tokens: on a score, the difference of both probabilities."""

    @staticmethod
    def forward(ctx: Any, student_STAd: Tensor, teacher_STAd: Tensor, rows: RowGrid) -> Tensor:
        kl_SR = wide(student_STAd.new_empty(0)).new_empty(rows.position_SR.shape)
        for chunk in rows.chunks(4 * student_STAd.shape[2] * rows.tokens):
            ours, theirs = (_relations(x_STAd, rows, chunk)[0] for x_STAd in (student_STAd, teacher_STAd))
            ours.neg_().add_(theirs).masked_fill_(_later(rows, chunk), 0).mul_(theirs.exp_())
            kl_SR[chunk.sequences, chunk.rows] = ours.sum(-1).mean(1).to(kl_SR.dtype)
        ctx.save_for_backward(student_STAd, teacher_STAd)
        ctx.rows = rows
        return kl_SR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SR: Tensor) -> tuple[Tensor | None, ...]:
        student_STAd, teacher_STAd = ctx.saved_tensors
        rows: RowGrid = ctx.rows
        grad_STAd = torch.zeros_like(student_STAd, memory_format=torch.contiguous_format)
        grad_row_SRAd = student_STAd.new_zeros(*rows.position_SR.shape, *student_STAd.shape[2:])
        heads, channels = student_STAd.shape[2:]
        for chunk in rows.chunks(4 * heads * rows.tokens):
            ours, row_sArd, key_sAtd = _relations(student_STAd, rows, chunk)
            ours.exp_().sub_(_relations(teacher_STAd, rows, chunk)[0].exp_())
            share_sr = grad_SR[chunk.sequences, chunk.rows] * (channels**-0.5 / heads)
            grad_sArt = ours.mul_(share_sr[:, None, :, None]).to(student_STAd.dtype)
            grad_row_SRAd[chunk.sequences, chunk.rows] = (grad_sArt @ key_sAtd).transpose(1, 2)
            grad_STAd[chunk.sequences, : chunk.keys] += (grad_sArt.transpose(2, 3) @ row_sArd).transpose(1, 2)
        in_order = torch.arange(len(rows.sequence_S), device=rows.sequence_S.device)
        replace(rows, sequence_S=in_order).into(grad_STAd, grad_row_SRAd)
        return grad_STAd, None, None


def _relations(x_STAd: Tensor, rows: RowGrid, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [s, A, r, t], -inf where hidden; the rows [s, A, r, d] and the tokens [s, A, t, d] of the chunk."""
    part_stAd, position_sr = x_STAd[chunk.sequences], rows.position_SR[chunk.sequences, chunk.rows]
    row_srAd = part_stAd[torch.arange(len(part_stAd), device=x_STAd.device)[:, None], position_sr]
    row_sArd, key_sAtd = row_srAd.transpose(1, 2).contiguous(), part_stAd[:, : chunk.keys].transpose(1, 2).contiguous()
    score_sArt = wide(row_sArd @ key_sAtd.transpose(2, 3)).mul_(x_STAd.shape[3] ** -0.5)
    return score_sArt.masked_fill_(_later(rows, chunk), -torch.inf).log_softmax(-1), row_sArd, key_sAtd


def _later(rows: RowGrid, chunk: Chunk) -> Tensor:
    """bool [s, 1, r, t]: tokens that stand behind a row."""
    token_t = torch.arange(chunk.keys, device=rows.position_SR.device)
    return token_t > rows.position_SR[chunk.sequences, None, chunk.rows, None]
