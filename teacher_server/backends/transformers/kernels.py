"""The steps of a decoder layer between its matrix products, as Triton kernels: one program a row.

In: activations in the model's dtype on a CUDA device; out: the same, or rows of float8 with a scale each.
Must never be the only way: `steps.py` holds the plain versions, which are the oracle and run wherever `usable` says no.
They round to the model's dtype where transformers does, so that the two differ by the last bit of a few numbers.

Axes: T packed tokens, D width, F ffn width, R rotated heads, d channels of a head.
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

FLOAT8 = torch.float8_e4m3fn
_LARGEST_FLOAT8 = 448.0
_FFN_BLOCK = 4096  # channels of a row at a time


def usable(tensor: Tensor) -> bool:
    """Whether these kernels run where `tensor` is."""
    return triton is not None and tensor.is_cuda


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, *, float8: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + residual, and its RMS norm: norm_TD, sum_TD, and with `float8` a scale a row (float32 [T, 1])."""
    rows, width = x_TD.shape
    sum_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    norm_TD = torch.empty_like(x_TD, dtype=FLOAT8 if float8 else x_TD.dtype)
    scale_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TD.device) if float8 else None
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x_TD):
        _add_rms_norm[(rows,)](
            *(x_TD, x_TD if residual_TD is None else residual_TD, weight_D, sum_TD, norm_TD),
            *(norm_TD if scale_T1 is None else scale_T1, eps, width),
            ADD=residual_TD is not None, FLOAT8=float8, LARGEST=_LARGEST_FLOAT8, BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip
    return norm_TD, sum_TD, scale_T1


def rotate(x_TRd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> None:
    """Rotary position embedding of the first R heads of every row, in place; x may be a slice of wider rows."""
    rows, heads, channels = x_TRd.shape
    assert x_TRd.stride(2) == 1 and x_TRd.stride(1) == channels and cos_Td.is_contiguous() and sin_Td.is_contiguous()
    with torch.cuda.device_of(x_TRd):
        _rotate[(rows,)](
            *(x_TRd, cos_Td, sin_Td, x_TRd.stride(0), heads, channels // 2),
            HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(channels // 2), num_warps=4,
        )  # fmt: skip


def silu_mul(gate_up_T2F: Tensor, *, float8: bool = False) -> tuple[Tensor, Tensor | None]:
    """silu(gate) * up of rows that hold both side by side: [T, F], and with `float8` a scale a row."""
    rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = torch.empty(rows, width, dtype=FLOAT8 if float8 else gate_up_T2F.dtype, device=gate_up_T2F.device)
    with torch.cuda.device_of(gate_up_T2F):
        if not float8:
            grid = (rows, triton.cdiv(width, _FFN_BLOCK))
            _silu_mul[grid](gate_up_T2F, out_TF, width, BLOCK=_FFN_BLOCK, num_warps=8)
            return out_TF, None
        scale_T1 = torch.empty(rows, 1, dtype=torch.float32, device=gate_up_T2F.device)
        _silu_mul_float8[(rows,)](
            gate_up_T2F, out_TF, scale_T1, width, LARGEST=_LARGEST_FLOAT8, BLOCK=_FFN_BLOCK, num_warps=8
        )
    return out_TF, scale_T1


def to_float8(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as float8 e4m3 with the scale that maps a row's largest magnitude to 448."""
    rows, width = x_TD.shape
    out_TD = torch.empty(rows, width, dtype=FLOAT8, device=x_TD.device)
    scale_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TD.device)
    with torch.cuda.device_of(x_TD):
        block = triton.next_power_of_2(width)
        _to_float8[(rows,)](x_TD, out_TD, scale_T1, width, LARGEST=_LARGEST_FLOAT8, BLOCK=block, num_warps=8)
    return out_TD, scale_T1


if triton is not None:

    @triton.jit
    def _row_scale(x, LARGEST: tl.constexpr):
        return tl.maximum(tl.max(tl.abs(x)), 1e-12) / LARGEST

    @triton.jit
    def _add_rms_norm(
        x_ptr, residual_ptr, weight_ptr, sum_ptr, norm_ptr, scale_ptr, eps, width,
        ADD: tl.constexpr, FLOAT8: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        kept = x_ptr.dtype.element_ty
        x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(residual_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            x = x.to(kept)
            tl.store(sum_ptr + row * width + columns, x, mask=inside)
            x = x.to(tl.float32)
        mean = tl.sum(x * x) / width
        x = (x * (1 / tl.sqrt(mean + eps))).to(kept).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = (x * weight).to(kept).to(tl.float32)
        if FLOAT8:
            scale = _row_scale(x, LARGEST)
            tl.store(scale_ptr + row, scale)
            x = x / scale
        tl.store(norm_ptr + row * width + columns, x.to(norm_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotate(x_ptr, cos_ptr, sin_ptr, stride, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        inside = (head < heads) & (channel < half)
        first = x_ptr + row * stride + head * (2 * half) + channel
        a = tl.load(first, mask=inside, other=0.0)
        b = tl.load(first + half, mask=inside, other=0.0)
        kept = a.dtype
        table = row * (2 * half) + channel
        seen = channel < half
        cos_a = tl.load(cos_ptr + table, mask=seen, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + table + half, mask=seen, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + table, mask=seen, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + table + half, mask=seen, other=0.0).to(tl.float32)
        a, b = a.to(tl.float32), b.to(tl.float32)
        turned_a = (a * cos_a).to(kept).to(tl.float32) + (-b * sin_a).to(kept).to(tl.float32)
        turned_b = (b * cos_b).to(kept).to(tl.float32) + (a * sin_b).to(kept).to(tl.float32)
        tl.store(first, turned_a.to(kept), mask=inside)
        tl.store(first + half, turned_b.to(kept), mask=inside)

    @triton.jit
    def _gated(gate_up_ptr, columns, inside, width):
        gate = tl.load(gate_up_ptr + columns, mask=inside, other=0.0)
        up = tl.load(gate_up_ptr + width + columns, mask=inside, other=0.0)
        kept = gate.dtype
        gate = gate.to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(kept).to(tl.float32)
        return (gate * up.to(tl.float32)).to(kept)

    @triton.jit
    def _silu_mul(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        tl.store(
            out_ptr + row * width + columns, _gated(gate_up_ptr + row * 2 * width, columns, inside, width), mask=inside
        )

    @triton.jit
    def _silu_mul_float8(gate_up_ptr, out_ptr, scale_ptr, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        gate_up_ptr += row * 2 * width
        top = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            top = tl.maximum(top, tl.abs(_gated(gate_up_ptr, columns, columns < width, width).to(tl.float32)))
        scale = _row_scale(top, LARGEST)
        tl.store(scale_ptr + row, scale)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            x = _gated(gate_up_ptr, columns, inside, width).to(tl.float32) / scale
            tl.store(out_ptr + row * width + columns, x.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _to_float8(x_ptr, out_ptr, scale_ptr, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        scale = _row_scale(x, LARGEST)
        tl.store(scale_ptr + row, scale)
        tl.store(out_ptr + row * width + columns, (x / scale).to(out_ptr.dtype.element_ty), mask=inside)
