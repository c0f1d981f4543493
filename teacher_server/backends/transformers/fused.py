"""The body of Llama-shaped models with fewer and larger pieces: one product for q, k and v, one for gate and up, and
one pass over memory for each of norm with residual, rotation and gating.

In: packed tokens; out: the states after the final norm [T, D]. The weights are the model's own, laid side by side; the
model's modules go on as views of them. Optionally the products are of float8 rows (`quantize`), with a stated error.
Axes: T packed tokens, D width, F ffn width, H query heads, G key heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from teacher_server.backends.transformers import kernels, layer_ops
from teacher_server.backends.transformers.attention import Packing, attend
from teacher_server.backends.transformers.capture.taps import Taps

# Decoder layers that are: norm, attention, residual, norm, gated SiLU ffn, residual; Qwen3 also norms q and k.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


@dataclass
class _Product:
    """x W^T + b, of bfloat16 or of float8 rows."""

    weight_ND: Tensor
    bias_N: Tensor | None
    scale_1N: Tensor | None = None  # of float8 weights

    def __call__(self, x_TD: Tensor, scale_T1: Tensor | None) -> Tensor:
        if self.scale_1N is None or scale_T1 is None:
            return nn.functional.linear(x_TD, self.weight_ND, self.bias_N)
        out_TN = torch._scaled_mm(
            x_TD, self.weight_ND.t(), scale_a=scale_T1, scale_b=self.scale_1N, out_dtype=torch.bfloat16, use_fast_accum=True
        )  # fmt: skip
        return out_TN if self.bias_N is None else out_TN.add_(self.bias_N)

    def quantize(self) -> None:
        """Weights as float8, with a scale for each output channel."""
        self.weight_ND, scale_N1 = layer_ops.to_float8(self.weight_ND)
        self.scale_1N = scale_N1.t().contiguous()


@dataclass
class _Layer:
    """One decoder layer's weights and constants."""

    norm_D: Tensor
    qkv: _Product
    q_norm_d: Tensor | None
    k_norm_d: Tensor | None
    out: _Product
    ffn_norm_D: Tensor
    gate_up: _Product
    down: _Product
    scale: float

    @property
    def products(self) -> tuple[_Product, ...]:
        return self.qkv, self.out, self.gate_up, self.down


def unsuited(body: Any) -> str:
    """Why this body cannot be run here; empty if it can (a probe must still agree)."""
    if not all(hasattr(body, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return "not built of embed_tokens, layers, norm and rotary_emb"
    for layer in body.layers:
        if type(layer).__name__ not in LAYERS:
            return f"layers of type {type(layer).__name__}"
        if getattr(layer.self_attn, "sliding_window", None) is not None:
            return "sliding windows"
    if body.config.hidden_act != "silu":
        return f"activation {body.config.hidden_act}"
    return ""


class FusedBody:
    """A Llama-shaped body; see `unsuited`.

    Args:
        body: transformers' decoder. Its projections become views of the joined weights.
    """

    def __init__(self, body: Any) -> None:
        attention = body.layers[0].self_attn
        self._embed = body.embed_tokens
        self._rotary = body.rotary_emb
        self._norm_D, self._eps = body.norm.weight, body.norm.variance_epsilon
        self._channels = attention.head_dim
        self._query_heads = attention.q_proj.out_features // self._channels
        self._key_heads = attention.k_proj.out_features // self._channels
        self._layers = [_layer(layer) for layer in body.layers]
        self._float8 = False

    def quantize(self) -> None:
        """From now on the products of the layers are of float8 rows; the joined weights stay where the model holds them."""
        for layer in self._layers:
            for product in layer.products:
                product.quantize()
        self._float8 = True

    def __call__(self, ids_T: Tensor, positions_T: Tensor, packing: Packing, taps: Taps | None = None) -> Tensor:
        """States after the final norm [T, D]; `taps` are shown what they wish of the blocks."""
        x_TD = self._embed(ids_T)
        fast = kernels if kernels.usable(x_TD) else layer_ops
        cos_1Td, sin_1Td = self._rotary(x_TD[None], positions_T[None])
        cos_Td, sin_Td = cos_1Td[0].contiguous(), sin_1Td[0].contiguous()
        residual_TD = None
        for before, layer in enumerate(self._layers):
            h_TD, residual_TD, scale_T1 = self._norm(fast, x_TD, residual_TD, layer.norm_D)
            if taps is not None:
                taps.state(before, residual_TD)
            x_TD = self._attend(fast, layer, layer.qkv(h_TD, scale_T1), cos_Td, sin_Td, packing, taps, before + 1)
            h_TD, residual_TD, scale_T1 = self._norm(fast, x_TD, residual_TD, layer.ffn_norm_D)
            gated_TF, scale_T1 = fast.silu_mul(layer.gate_up(h_TD, scale_T1), float8=self._float8)
            if taps is not None:
                taps.ffn(before + 1, gated_TF, scale_T1)
            x_TD = layer.down(gated_TF, scale_T1)
        state_TD, last_TD, _ = fast.add_rms_norm(x_TD, residual_TD, self._norm_D, self._eps)
        if taps is not None:
            taps.state(len(self._layers), last_TD)
        final_TD: Tensor = state_TD
        return final_TD

    def _norm(
        self, fast: ModuleType, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor, Tensor | None] = fast.add_rms_norm(
            x_TD, residual_TD, weight_D, self._eps, float8=self._float8
        )
        return found

    def _attend(
        self, fast: ModuleType, layer: _Layer, qkv: Tensor, cos_Td: Tensor, sin_Td: Tensor, packing: Packing,
        taps: Taps | None, block: int,
    ) -> Tensor:  # fmt: skip
        heads, keys = self._query_heads, self._key_heads
        qkv_THd = qkv.view(len(qkv), heads + 2 * keys, self._channels)
        if taps is not None:  # before the norm and the rotation below, which are in place
            taps.plain_key(block, qkv_THd[:, heads : heads + keys])
        if layer.q_norm_d is not None and layer.k_norm_d is not None:
            for part, weight_d in ((slice(heads), layer.q_norm_d), (slice(heads, heads + keys), layer.k_norm_d)):
                rows = qkv_THd[:, part].reshape(-1, self._channels)
                qkv_THd[:, part] = fast.add_rms_norm(rows, None, weight_d, self._eps)[0].view_as(qkv_THd[:, part])
        fast.rotate(qkv_THd[:, : heads + keys], cos_Td, sin_Td)
        query_THd, key_TGd, value_TGd = qkv_THd.split([heads, keys, keys], dim=1)
        if taps is not None:
            taps.attention(block, query_THd, key_TGd, value_TGd, scale=layer.scale)
        found_TD = attend(query_THd, key_TGd, value_TGd, packing, layer.scale).reshape(len(qkv), -1)
        if not self._float8:
            return layer.out(found_TD, None)
        return layer.out(*fast.to_float8(found_TD))


def _layer(layer: Any) -> _Layer:
    attention, ffn = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return _Layer(
        norm_D=layer.input_layernorm.weight,
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm_d=None if q_norm is None else q_norm.weight,
        k_norm_d=None if k_norm is None else k_norm.weight,
        out=_joined([attention.o_proj]),
        ffn_norm_D=layer.post_attention_layernorm.weight,
        gate_up=_joined([ffn.gate_proj, ffn.up_proj]),
        down=_joined([ffn.down_proj]),
        scale=attention.scaling,
    )


def _joined(modules: Sequence[nn.Linear]) -> _Product:
    """The modules' weights one below the other; the modules keep views, so that nothing is held twice."""
    weight_ND, bias_N = modules[0].weight.data, None if modules[0].bias is None else modules[0].bias.data
    if len(modules) > 1:
        weight_ND = torch.cat([module.weight.data for module in modules])
        if bias_N is not None:
            bias_N = torch.cat([module.bias.data for module in modules])
        start = 0
        for module in modules:
            rows = slice(start, start + module.out_features)
            module.weight = nn.Parameter(weight_ND[rows], requires_grad=False)
            if bias_N is not None:
                module.bias = nn.Parameter(bias_N[rows], requires_grad=False)
            start += module.out_features
    return _Product(weight_ND, bias_N)
