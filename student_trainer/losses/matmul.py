"""The three products of an output head with float32 (or float64) results, whatever the weights are held in.

In: states, weights and gradients of any float dtype. Out: float32, or float64 if an operand is.
Must never round a logit to bfloat16 (a softmax of rounded logits is off by percents), nor obey autocast, which would.

Axes: C rows of a chunk, V vocabulary rows, D width, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_BYTES = 64 << 20  # of a float32 tile [some of V, D], where a whole one would be made only to be thrown away
PADDED = ("cuda",)  # devices where rows are aligned
ALIGNED = 64  # elements; rows that begin elsewhere are multiplied by kernels of an older generation, at a fifth of the speed on an H200


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if a tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Nothing yet, [rows, columns] as `shape` says; on a GPU rows begin at multiples of `ALIGNED`, whatever the vocabulary (151,665 ids of Qwen2.5's tokenizer)."""
    rows, columns = shape
    if device.type not in PADDED or columns % ALIGNED == 0:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    width = -(-columns // ALIGNED) * ALIGNED
    return torch.empty(rows, width, dtype=dtype, device=device)[:, :columns]


def project(h_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """h W^T: [C, V]; on a GPU see `empty_rows`. Under `no_grad`, or of tensors that need no gradient: it is written into a matrix that is there."""
    with _no_autocast(h_CD):
        if _tensor_cores(h_CD, weight_VD):
            z_CV = empty_rows((len(h_CD), len(weight_VD)), torch.float32, h_CD.device)
            for part in _aligned(weight_VD):
                torch.mm(h_CD, weight_VD[part].T, out_dtype=torch.float32, out=z_CV[:, part])
            return z_CV
        dtype = wide(h_CD, weight_VD)
        h_CD = h_CD.to(dtype)
        z_CV = empty_rows((len(h_CD), len(weight_VD)), dtype, h_CD.device)
        if weight_VD.dtype == dtype:
            return torch.mm(h_CD, weight_VD.T, out=z_CV)
        for tile in _tiles(weight_VD):
            torch.mm(h_CD, weight_VD[tile].to(dtype).T, out=z_CV[:, tile])
        return z_CV


def project_transposed(h_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """W h^T: [V, C], as `project`; fast on a GPU if C is a multiple of `ALIGNED`, whatever V is."""
    with _no_autocast(h_CD):
        if _tensor_cores(h_CD, weight_VD):
            return torch.mm(weight_VD, h_CD.T, out_dtype=torch.float32)
        dtype = wide(h_CD, weight_VD)
        h_CD = h_CD.to(dtype)
        if weight_VD.dtype == dtype:
            return weight_VD @ h_CD.T
        z_VC = h_CD.new_empty(len(weight_VD), len(h_CD))
        for tile in _tiles(weight_VD):
            torch.mm(weight_VD[tile].to(dtype), h_CD.T, out=z_VC[tile])
        return z_VC


def project_back(g_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """g W: [C, D]. `g_CV` is wide; it is rounded to bfloat16 only where the weight is and tensor cores multiply."""
    with _no_autocast(g_CV):
        if _on_gpu(g_CV) and weight_VD.dtype == torch.bfloat16:
            g_CV = _narrow(g_CV)
            first, *rest = (
                torch.mm(g_CV[:, part], weight_VD[part], out_dtype=torch.float32) for part in _aligned(weight_VD)
            )
            return first.add_(rest[0]) if rest else first
        dtype = wide(g_CV, weight_VD)
        g_CV = g_CV.to(dtype)
        if weight_VD.dtype == dtype:
            return g_CV @ weight_VD
        h_CD = g_CV.new_zeros(g_CV.shape[0], weight_VD.shape[1])
        for tile in _tiles(weight_VD):
            h_CD.addmm_(g_CV[:, tile], weight_VD[tile].to(dtype))
        return h_CD


def add_outer(sum_VD: Tensor, g_CV: Tensor, h_CD: Tensor) -> None:
    """sum += g^T h, in place; the sum is wide."""
    with _no_autocast(g_CV):
        if not (_on_gpu(g_CV) and h_CD.dtype == torch.bfloat16):
            sum_VD.addmm_(g_CV.to(sum_VD.dtype).T, h_CD.to(sum_VD.dtype))
            return
        g_CV = _narrow(g_CV)
        for tile in _tiles(sum_VD):  # the product cannot be added by the kernel, and whole it is as large as the sum
            sum_VD[tile].add_(torch.mm(g_CV[:, tile].T, h_CD, out_dtype=torch.float32))


def _narrow(g_CV: Tensor) -> Tensor:
    """In bfloat16, with aligned rows."""
    if g_CV.dtype == torch.bfloat16:
        return g_CV
    return empty_rows(g_CV.shape, torch.bfloat16, g_CV.device).copy_(g_CV)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _tensor_cores(a: Tensor, b: Tensor) -> bool:
    return _on_gpu(a) and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def _aligned(weight_VD: Tensor) -> list[slice]:
    """All rows but a few, whose number is a multiple of `ALIGNED`, and those few."""
    vocab = len(weight_VD)
    whole = vocab - vocab % ALIGNED
    return [part for part in (slice(0, whole), slice(whole, vocab)) if part.start < part.stop]


def _tiles(weight_VD: Tensor) -> Iterator[slice]:
    rows = max(1, TILE_BYTES // (4 * weight_VD.shape[1] * ALIGNED)) * ALIGNED
    for part in _aligned(weight_VD):
        yield from (slice(start, min(start + rows, part.stop)) for start in range(part.start, part.stop, rows))
