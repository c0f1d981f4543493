"""Where a block looks, compared between models of different heads (algorithms.md 5).

In: queries and keys of the student, with gradients, and pooled maps, or keys and values, of the teacher; out: a loss per row. Maps are made
again in chunks of rows, in the forward pass and once more in the backward pass; `output_attentions` is never asked for.

Axes: R rows at hand of one sequence, T its tokens, H query heads, G key heads, d channels of a head, P blocks of keys, A relation heads,
F channels of all key heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        """bool [R, T]: which keys a row sees."""
        key_T = torch.arange(tokens, device=position_R.device)
        seen_RT = key_T <= position_R[:, None]
        return seen_RT if self.window is None else seen_RT & (key_T > position_R[:, None] - self.window)

    def scores(self, query_RHd: Tensor, key_TGd: Tensor) -> Tensor:
        """[G, H / G, R, T], scaled and capped; all keys."""
        groups, channels = key_TGd.shape[1:]
        query_RGhd = query_RHd.view(len(query_RHd), groups, -1, channels)
        scores = wide(torch.einsum("rghd,tgd->ghrt", query_RGhd, key_TGd)) * self.scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores


def pooled_logp(states: AttentionStates, sequence: int, position_R: Tensor, tokens: int, block: int) -> Tensor:
    """[R, P], log-probabilities of blocks of keys, averaged over heads, without the sinks and renormalised.

    A block of which a row sees no key has a log-probability below -1e29.

    Args:
        states: of the student's block.
        sequence: which of the B.
        position_R: int64, of the rows, below `tokens`.
        tokens: T, keys at hand; at least one more than the highest position.
        block: keys in a block.
    """
    query_RHd, key_TGd = states.query_BLHd[sequence, position_R], states.key_BLGd[sequence, :tokens]

    def run(query_RHd: Tensor, key_TGd: Tensor, position_R: Tensor) -> Tensor:
        seen_RT = states.visible(position_R, tokens)
        logp = states.scores(query_RHd, key_TGd).masked_fill(~seen_RT, -torch.inf).log_softmax(-1)
        seen_RT = seen_RT & (torch.arange(tokens, device=seen_RT.device) >= SINKS)
        logp = functional.pad(logp.masked_fill(~seen_RT, _UNSEEN), (0, -tokens % block), value=_UNSEEN)
        pooled_RP = logp.unflatten(-1, (-1, block)).permute(2, 3, 0, 1, 4).flatten(2).logsumexp(-1)
        return pooled_RP - pooled_RP.logsumexp(-1, keepdim=True)

    return _in_chunks(run, query_RHd.shape[1] * tokens, query_RHd, key_TGd, position_R)


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


def relation_kl(student_TF: Tensor, teacher_TF: Tensor, position_R: Tensor, heads: int) -> Tensor:
    """[R], KL between the relations of tokens, softmax(X X^T / sqrt(d)) of causal rows, averaged over relation heads (MiniLMv2).

    Args:
        student_TF, teacher_TF: keys before rotation, or values, all key heads side by side; widths may differ.
        position_R: int64, rows that are compared.
        heads: A, divides both widths.
    """

    def logp(x_TAd: Tensor, position_R: Tensor) -> Tensor:
        tokens, _, channels = x_TAd.shape
        scores = wide(torch.einsum("rad,tad->art", x_TAd[position_R], x_TAd)) * channels**-0.5
        hidden_RT = torch.arange(tokens, device=x_TAd.device) > position_R[:, None]
        return scores.masked_fill(hidden_RT, -torch.inf).log_softmax(-1)

    def run(student_TAd: Tensor, teacher_TAd: Tensor, position_R: Tensor) -> Tensor:
        ours, theirs = logp(student_TAd, position_R), logp(teacher_TAd, position_R)
        seen = theirs > -torch.inf
        kl = theirs.exp() * (torch.where(seen, theirs, 0) - torch.where(seen, ours, 0))
        return kl.sum(-1).mean(0)

    student_TAd, teacher_TAd = (x.unflatten(-1, (heads, -1)) for x in (student_TF, teacher_TF))
    rows = max(1, _CHUNK_BYTES // (4 * heads * len(student_TF)))
    parts = position_R.split(rows)
    return torch.cat([_checkpointed(run, student_TAd, teacher_TAd, part_R) for part_R in parts])


def _in_chunks(
    run: Callable[..., Tensor], row_scores: int, rows_R: Tensor, keys_T: Tensor, position_R: Tensor
) -> Tensor:
    rows = max(1, _CHUNK_BYTES // (4 * row_scores))
    parts = zip(rows_R.split(rows), position_R.split(rows), strict=True)
    return torch.cat([_checkpointed(run, part, keys_T, position) for part, position in parts])


def _checkpointed(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Computed again in the backward pass; the scores of no more than one chunk lie in memory."""
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return run(*tensors)
    found: Tensor = checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
    return found
