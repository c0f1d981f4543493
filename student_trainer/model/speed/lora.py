"""Linear layers with low-rank adapters as one autograd function each: fewer launches than peft's, no float32 copy of x.

In: a peft model; out: the same model, whose plain LoRA layers compute the same numbers by another way.
Must never change what is saved or trained, nor touch a layer it does not fully understand: that keeps peft's forward.

Axes: N tokens, I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def install(model: nn.Module) -> int:
    """Gives every plain LoRA layer of `model` the fast forward; returns how many."""
    layers = [
        module for module in model.modules() if type(module) is LoraLayer and type(module.base_layer) is nn.Linear
    ]
    for layer in layers:
        layer.__class__ = FastLoraLayer
    return len(layers)


def uninstall(model: nn.Module) -> None:
    """Takes `install` back."""
    for module in model.modules():
        if type(module) is FastLoraLayer:
            module.__class__ = LoraLayer


class FastLoraLayer(LoraLayer):
    """peft's layer with another forward; what it does not cover goes to peft's own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., I] -> [..., O]; ours if this call is one adapter, on, unmerged, without dropout, in the weight's dtype."""
        base = self.base_layer
        found = None if args or kwargs else plain_adapter(self, x, base.weight.dtype)
        if found is None:
            return super().forward(x, *args, **kwargs)
        a_RI, b_OR, scaling = found
        if torch.compiler.is_compiling():  # the compiler joins casts, scaling and sums by itself
            low = nn.functional.linear(x, a_RI.to(x.dtype)) * scaling
            return base(x) + nn.functional.linear(low, b_OR.to(x.dtype))
        return _LoraLinear.apply(x, base.weight, base.bias, a_RI, b_OR, scaling)


def plain_adapter(layer: Any, x: Tensor, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
    """A [R, I], B [O, R] and the scaling of a layer's adapter; None if a call is more than x W^T + scaling (x A^T) B^T in one dtype."""
    names = layer.active_adapters
    name = names[0] if len(names) == 1 else None
    if layer.disable_adapters or layer.merged or name in layer.lora_variant or name not in layer.lora_A:
        return None
    device = x.device.type
    computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    a, b = layer.lora_A[name], layer.lora_B[name]
    if not isinstance(layer.lora_dropout[name], nn.Identity) or not x.dtype == weight_dtype == computed_in:
        return None
    if a.bias is not None or b.bias is not None:
        return None
    return a.weight, b.weight, layer.scaling[name]


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T in the dtype of x; W and bias are frozen, A and B may be wider."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        x_NI, narrow_a_RI, narrow_b_OR = x.reshape(-1, x.shape[-1]), a_RI.to(x.dtype), b_OR.to(x.dtype)
        u_NR = x_NI @ narrow_a_RI.T
        y_NO = nn.functional.linear(x_NI, weight_OI, bias_O)
        y_NO.addmm_(u_NR, narrow_b_OR.T, alpha=scaling)  # one rounding, where peft rounds product, scaling and sum
        ctx.save_for_backward(x_NI, u_NR, weight_OI, narrow_a_RI, narrow_b_OR)
        ctx.scaling, ctx.dtype = scaling, a_RI.dtype
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, u_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_u_NR = (grad_NO @ b_OR).mul_(ctx.scaling)
        grad_x_NI = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = (grad_NO @ weight_OI).addmm_(grad_u_NR, a_RI).view(*grad.shape[:-1], -1)
        grad_a_RI = outer(grad_u_NR, x_NI, ctx.dtype)
        grad_b_OR = outer(grad_NO, u_NR, ctx.dtype).mul_(ctx.scaling)
        return grad_x_NI, None, None, grad_a_RI, grad_b_OR, None


def outer(g_NO: Tensor, x_NI: Tensor, dtype: torch.dtype) -> Tensor:
    """g^T x in `dtype`; float32 sums of bfloat16 products stay float32 where the device can."""
    if g_NO.is_cuda and g_NO.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(g_NO.T, x_NI, out_dtype=torch.float32)
    return torch.mm(g_NO.T, x_NI).to(dtype)
