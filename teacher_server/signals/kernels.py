"""Two-stage top-k and log-sum-exp over logits as Triton kernels: the vocabulary is read once.

In: logits [C, V] of 16-bit floats on a CUDA device; out: what `output.py` needs of them. Nothing of [C, V] in float32.
Must never be the only way: `output.py` is the oracle, and what runs wherever `usable` says no.

Axes: C rows of a chunk, V vocabulary, B blocks of BLOCK neighbouring ids, K kept ids.
"""

# mypy: disable-error-code="no-untyped-def"
# The kernels below are Triton's language, which has no types.
from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # a build of torch without CUDA
    triton = None

BLOCK = 64
MAX_K = 128  # the candidates of a row are held in registers
_TILE_BLOCKS = 128  # blocks that one program of the first pass reads
_WIDE = 4096  # ids of a partial sum where only the log-sum-exp is wanted


def usable(logits_CV: Tensor, k: int = 0) -> bool:
    """Whether these kernels take the logits, and a top-k of that many."""
    blocks = -(-logits_CV.shape[-1] // BLOCK)
    wide = logits_CV.element_size() != 2
    return triton is not None and logits_CV.is_cuda and not wide and k <= MAX_K and blocks < 1 << 15


def lse(logits_CV: Tensor) -> Tensor:
    """Log-sum-exp [C], float32."""
    top_CB, sum_CB = _partial(logits_CV, _WIDE, 1)
    return torch.logsumexp(top_CB + sum_CB.log(), dim=-1)


def top_k(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest: their ids [C, K] int32 in rising order, lse [C], and the log-sum-exp [C] of all others.

    A block that holds one of the k largest is among the k blocks of largest maxima, lower blocks first at a tie:
    each of k others ahead of it would hold an entry ahead of it. Both choices are by a key that no two entries share.
    """
    rows, vocab = logits_CV.shape
    top_CB, sum_CB = _partial(logits_CV, BLOCK, _TILE_BLOCKS)
    blocks = top_CB.shape[1]
    ids_CK = torch.empty(rows, k, dtype=torch.int32, device=logits_CV.device)
    chosen_CK = torch.empty_like(ids_CK)
    lse_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    rest_C = torch.empty_like(lse_C)
    with torch.cuda.device_of(logits_CV):
        _select[(rows,)](
            *(logits_CV, top_CB, sum_CB, chosen_CK, ids_CK, lse_C, rest_C),
            *(logits_CV.stride(0), vocab, blocks, k, min(k, blocks)),
            BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks), PLACES=triton.next_power_of_2(k), num_warps=4,
        )  # fmt: skip
    return ids_CK, lse_C, rest_C


def _partial(logits_CV: Tensor, block: int, tile_blocks: int) -> tuple[Tensor, Tensor]:
    """Largest logit of every block and the sum of exp(logit - largest), float32 [C, B] each."""
    rows, vocab = logits_CV.shape
    assert logits_CV.stride(1) == 1, "kernels go along rows"
    blocks = triton.cdiv(vocab, block)
    top_CB = torch.empty(rows, blocks, dtype=torch.float32, device=logits_CV.device)
    sum_CB = torch.empty_like(top_CB)
    with torch.cuda.device_of(logits_CV):
        grid = (rows, triton.cdiv(blocks, tile_blocks))
        _block_figures[grid](
            *(logits_CV, top_CB, sum_CB, logits_CV.stride(0), vocab, blocks),
            BLOCK=block,
            BLOCKS=tile_blocks,
            num_warps=4,
        )
    return top_CB, sum_CB


if triton is not None:

    @triton.jit
    def _block_figures(z_ptr, top_ptr, sum_ptr, step, vocab, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        z = tl.load(z_ptr + row * step + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
        top = tl.max(z, axis=1)
        base = tl.where(top == -float("inf"), 0.0, top)
        total = tl.sum(tl.exp(z - base[:, None]), axis=1)
        tl.store(top_ptr + row * blocks + block, top, mask=block < blocks)
        tl.store(sum_ptr + row * blocks + block, total, mask=block < blocks)

    @triton.jit
    def _order(z, kept: tl.constexpr):
        """16 bits that rise with the float32 value of a 16-bit float; -0 as 0."""
        bits = (z + 0.0).to(kept).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)

    @triton.jit
    def _key(order, place):
        """32 bits, as a signed integer, that no two places share: by rising order, then falling place."""
        return ((order - 0x8000) << 16) | (0xFFFF - place)

    @triton.jit
    def _kth_largest(key, k):
        """The k-th largest of distinct signed keys, bit by bit from the top."""
        found = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, -0x80000000)
        for step in range(31):
            tried = found + (1 << (30 - step))
            found = tl.where(tl.sum((key >= tried).to(tl.int32)) >= k, tried, found)
        return found

    @triton.jit
    def _select(
        z_ptr, top_ptr, sum_ptr, chosen_ptr, ids_ptr, lse_ptr, rest_ptr, step, vocab, blocks, k, k_blocks,
        BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        kept = z_ptr.dtype.element_ty
        block = tl.arange(0, BLOCKS)
        there = block < blocks
        top = tl.load(top_ptr + row * blocks + block, mask=there, other=-float("inf"))
        total = tl.load(sum_ptr + row * blocks + block, mask=there, other=0.0)
        peak = tl.max(top)
        tl.store(lse_ptr + row, peak + tl.log(tl.sum(total * tl.exp(top - peak))))

        key = tl.where(there, _key(_order(top, kept), block), -0x80000000)
        chosen = key >= _kth_largest(key, k_blocks)
        place = tl.cumsum(chosen.to(tl.int32)) - 1
        tl.store(chosen_ptr + row * k + place, block, mask=chosen)
        tl.debug_barrier()

        seat = tl.arange(0, PLACES * BLOCK)
        owner = tl.load(chosen_ptr + row * k + seat // BLOCK, mask=seat < k_blocks * BLOCK, other=0)
        ids = owner * BLOCK + seat % BLOCK
        real = (seat < k_blocks * BLOCK) & (ids < vocab)
        z = tl.load(z_ptr + row * step + ids, mask=real, other=-float("inf")).to(tl.float32)
        key = tl.where(real, _key(_order(z, kept), seat), -0x80000000)  # seats rise with ids
        taken = key >= _kth_largest(key, k)
        place = tl.cumsum(taken.to(tl.int32)) - 1
        tl.store(ids_ptr + row * k + place, ids, mask=taken)

        top = tl.where(chosen, -float("inf"), top)
        z = tl.where(taken, -float("inf"), z)
        peak = tl.maximum(tl.max(top), tl.max(z))
        base = tl.where(peak == -float("inf"), 0.0, peak)
        rest = tl.sum(tl.where(chosen, 0.0, total * tl.exp(top - base))) + tl.sum(tl.exp(z - base))
        tl.store(rest_ptr + row, base + tl.log(rest))
