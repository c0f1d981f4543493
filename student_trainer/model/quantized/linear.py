"""A frozen linear layer in 4 bit, multiplied by its dequantised weight; with plain adapters on it, one autograd function.

In: bitsandbytes' `Linear4bit` layers; out: the same modules, parameters and files, whose products are those of the dequantised weight to
the bit, in both directions. The weight is dequantised for each product and never kept. To torch.compile a product is one opaque operator: a
compiler that saw inside would keep the dequantised weight for the way back, which is what 4 bit is to save.

bitsandbytes' own forward is not used: on some processors it repacks a layer's weight in place when the layer first runs without gradients.

Axes: N tokens, I inputs and O outputs of a layer, R rank. Packed weights are uint8 [O * I / 2, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLayer4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from student_trainer.model.speed.lora import outer, plain_adapter


def install(model: nn.Module) -> int:
    """Gives every 4-bit layer of `model` our product; returns how many."""
    layers = [module for module in model.modules() if type(module) is Linear4bit]
    for layer in layers:
        layer.__class__ = FourBitLinear
    return len(layers)


def install_adapters(model: nn.Module) -> int:
    """Gives every plain adapter of a 4-bit layer of `model` a fast forward; returns how many. After `install`."""
    layers = [
        module
        for module in model.modules()
        if type(module) is LoraLayer4bit and type(module.base_layer) is FourBitLinear
    ]
    for layer in layers:
        layer.__class__ = FastLoraLayer4bit
    return len(layers)


class FourBitLinear(Linear4bit):
    """bitsandbytes' layer with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in the dtype of x; computed in the dtype that the weight was quantised from."""
        packed, statistics, meta = parts_of(self)
        y = torch.ops.lyceum.linear_4bit(x.to(self.weight.quant_state.dtype), packed, statistics, *meta)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


Meta = tuple[int, int, int, int, str, torch.dtype]  # outputs, inputs, block, block of the scales or 0, kind, dtype


def parts_of(layer: Linear4bit) -> tuple[Tensor, list[Tensor], Meta]:
    """A 4-bit weight as an operator takes it: packed numbers; scales (with `double` also their scales, levels and mean); and what it is."""
    state = layer.weight.quant_state
    statistics, nested = [state.absmax], 0
    if state.nested:
        statistics += [state.state2.absmax, state.state2.code, state.offset]
        nested = int(state.state2.blocksize)
    outputs, inputs = state.shape
    return layer.weight, statistics, (outputs, inputs, state.blocksize, nested, state.quant_type, state.dtype)


def dequantized(packed: Tensor, statistics: list[Tensor], meta: Meta) -> Tensor:
    """The weight [O, I] that a 4-bit layer multiplies by."""
    outputs, inputs, block, nested_block, kind, dtype = meta
    nested: dict[str, Any] = {}
    if nested_block:
        _, scales, levels, offset = statistics
        nested["state2"] = QuantState(absmax=scales, code=levels, blocksize=nested_block, dtype=torch.float32)
        nested["offset"] = offset
    shape = torch.Size((outputs, inputs))
    state = QuantState(
        absmax=statistics[0], shape=shape, blocksize=block, quant_type=kind, dtype=dtype, code=None, **nested
    )
    return dequantize_4bit(packed.data, state)


@torch.library.custom_op("lyceum::linear_4bit", mutates_args=())
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    statistics: list[Tensor],
    outputs: int,
    inputs: int,
    block: int,
    nested_block: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """x W^T, [..., I] -> [..., O]."""
    weight_OI = dequantized(packed, statistics, (outputs, inputs, block, nested_block, kind, dtype))
    return nn.functional.linear(x, weight_OI)


@torch.library.custom_op("lyceum::linear_4bit_back", mutates_args=())
def linear_4bit_back(
    grad: Tensor,
    packed: Tensor,
    statistics: list[Tensor],
    outputs: int,
    inputs: int,
    block: int,
    nested_block: int,
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """g W, [..., O] -> [..., I]."""
    return grad @ dequantized(packed, statistics, (outputs, inputs, block, nested_block, kind, dtype))


@linear_4bit.register_fake
def _(x: Tensor, packed: Tensor, statistics: list[Tensor], outputs: int, inputs: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@linear_4bit_back.register_fake
def _(grad: Tensor, packed: Tensor, statistics: list[Tensor], outputs: int, inputs: int, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], inputs))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, statistics, *ctx.meta = inputs
    ctx.save_for_backward(packed, *statistics)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, *statistics = ctx.saved_tensors
    made = torch.ops.lyceum.linear_4bit_back(grad, packed, list(statistics), *ctx.meta)
    return made, None, [None] * len(statistics), None, None, None, None, None, None  # type: ignore[return-value]


linear_4bit.register_autograd(_back, setup_context=_keep)


class FastLoraLayer4bit(LoraLayer4bit):
    """peft's layer with another forward; what it does not cover goes to peft's own. Compare `speed.lora.FastLoraLayer`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., I] -> [..., O]; ours if this call is one adapter, on, unmerged, without dropout, in the weight's dtype."""
        base = self.base_layer
        found = None if args or kwargs else plain_adapter(self, x, base.weight.quant_state.dtype)
        if found is None:
            return super().forward(x, *args, **kwargs)
        a_RI, b_OR, scaling = found
        if torch.compiler.is_compiling():  # the compiler joins casts, scaling and sums by itself
            low = nn.functional.linear(x, a_RI.to(x.dtype)) * scaling
            return base(x) + nn.functional.linear(low, b_OR.to(x.dtype))
        packed, statistics, meta = parts_of(base)
        return _LoraLinear4bit.apply(x, packed, statistics, meta, base.bias, a_RI, b_OR, scaling)


class _LoraLinear4bit(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T in the dtype of x, W dequantised anew each way; A and B may be wider."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        statistics: list[Tensor],
        meta: Meta,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        x_NI, narrow_a_RI, narrow_b_OR = x.reshape(-1, x.shape[-1]), a_RI.to(x.dtype), b_OR.to(x.dtype)
        u_NR = x_NI @ narrow_a_RI.T
        y_NO = nn.functional.linear(x_NI, dequantized(packed, statistics, meta), bias_O)
        y_NO.addmm_(u_NR, narrow_b_OR.T, alpha=scaling)
        ctx.save_for_backward(x_NI, u_NR, narrow_a_RI, narrow_b_OR, packed, *statistics)
        ctx.meta, ctx.scaling, ctx.dtype = meta, scaling, a_RI.dtype
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, u_NR, a_RI, b_OR, packed, *statistics = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_u_NR = (grad_NO @ b_OR).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight_OI = dequantized(packed, list(statistics), ctx.meta)
            grad_x = (grad_NO @ weight_OI).addmm_(grad_u_NR, a_RI).view(*grad.shape[:-1], -1)
        grad_a_RI = outer(grad_u_NR, x_NI, ctx.dtype)
        grad_b_OR = outer(grad_NO, u_NR, ctx.dtype).mul_(ctx.scaling)
        return grad_x, None, None, None, None, grad_a_RI, grad_b_OR, None
