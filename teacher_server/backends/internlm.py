"""InternLM3 without its remote code: the same computation as Llama under other names of settings.

`register` makes transformers know the type. The trainer has the same lines of its own: neither house imports the other.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class InternLM3Config(LlamaConfig):
    """Llama's settings; InternLM3 splits `attention_bias` into `qkv_bias` and `bias`, and no published model sets them."""

    model_type = "internlm3"

    def __init__(self, qkv_bias: bool = False, bias: bool = False, **settings: Any) -> None:
        if qkv_bias != bias:
            raise ValueError(f"InternLM3 with qkv_bias={qkv_bias} and bias={bias} is not supported: they must be equal")
        settings.setdefault("attention_bias", bias)
        settings.setdefault("mlp_bias", bias)
        super().__init__(**settings)


class InternLM3ForCausalLM(LlamaForCausalLM):
    """Llama by another name."""

    config_class = InternLM3Config


def register() -> None:
    """Makes transformers know the type; a second time changes nothing."""
    AutoConfig.register("internlm3", InternLM3Config, exist_ok=True)
    AutoModelForCausalLM.register(InternLM3Config, InternLM3ForCausalLM, exist_ok=True)
