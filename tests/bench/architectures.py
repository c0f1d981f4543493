"""Every causal family of transformers as a tiny random model: is head(states) the model's own logits, and is what differs refused by name?

    python -m tests.bench.architectures [FAMILY ...] [--json]

Settings that change logits are given values that show. `refused` is a family whose logits differ in a way that the table does not know, or
that sees later tokens; `raises` one that cannot be asked by ids alone; `unbuilt` one whose tiny config did not build, of which this says nothing.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model.load import Student

SHAPE = dict(
    vocab_size=300, hidden_size=32, d_model=32, n_embd=32, dim=32, emb_dim=32, hidden_dim=32, embedding_dim=32, word_embed_proj_dim=32,
    intermediate_size=64, ffn_dim=64, decoder_ffn_dim=64, encoder_ffn_dim=64, d_ff=64, n_inner=64, d_inner=64, dff=64, ffn_hidden_size=64,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, ffn_config=None, expert_ffn_hidden_size=16, mamba_expand=2,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, decoder_layers=2, encoder_layers=2, num_decoder_layers=2, num_encoder_layers=2,
    num_blocks=2, num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4, encoder_attention_heads=4,
    num_decoder_attention_heads=4, num_encoder_attention_heads=4, num_key_value_heads=2, head_dim=8, lru_width=32, attention_window_size=64,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_groups=1,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=8, mamba_n_groups=1, mamba_num_heads=4, mamba_head_dim=16,
    state_size=8, ssm_state_size=8, time_step_rank=2, mamba_headdim=16, n_mamba_heads=2, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=8, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    max_position_embeddings=128, n_positions=128, n_ctx=128, max_seq_len=128, max_target_positions=128, is_decoder=True, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, query_pre_attn_scalar=8, sliding_window=64, hidden_size_per_layer_input=8, vocab_size_per_layer_input=300,
    laurel_rank=4, index_head_dim=16, index_n_heads=2, index_topk=64, adapter_rank=4, dsk_lora_rank=8, rotary_dim=4,
)  # fmt: skip
TELLING = dict(
    logit_scale=0.25, lm_head_multiplier=0.078125, logits_scaling=4.0, logits_mup_width_multiplier=2.0,
    final_logit_softcapping=5.0, logits_soft_cap=5.0, output_logit_soft_cap=5.0, lm_head_bias=True,
)  # fmt: skip
NESTED = ("text_config", "vision_config", "audio_config", "decoder", "attn_config", "thinker_config")
# Settings that must fit each other; families whose code finds another relation between them are tried with their own.
DETAILS = {
    name
    for name in SHAPE
    if any(
        part in name
        for part in (
            "head_dim",
            "rank",
            "mamba",
            "linear_",
            "index_",
            "state_size",
            "lru",
            "n_group",
            "query_",
            "laurel",
            "headdim",
            "time_step",
        )
    )
}
LARGEST = 60_000_000


def _fitting(config: Any, shape: dict[str, Any]) -> dict[str, Any]:
    """What of `shape` a config knows; a list stays a list, and what must be derived is left alone."""
    known = {
        name: getattr(config, name)
        for name in shape
        if hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)
    }
    return {
        name: shape[name]
        for name, value in known.items()
        if shape[name] is not None and not isinstance(value, list | tuple | dict)
    }


def tiny(family: str, shape: dict[str, Any] | None = None) -> Any:
    """A tiny random model of `family` with settings of `shape` where it has them; raises whatever its config or code raises."""
    default = tf.AutoConfig.for_model(family)
    settings = _fitting(default, {**(SHAPE if shape is None else shape), **TELLING})
    for name in NESTED:
        part = getattr(default, name, None)
        if isinstance(part, tf.PreTrainedConfig):
            settings[name] = _fitting(part, {**(SHAPE if shape is None else shape), **TELLING})
    config = tf.AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        count = sum(p.numel() for p in tf.AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters: not tiny")
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # heads that are tied, biased or zero at the start should show
        if "norm" not in name and parameter.dim() >= 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def look(family: str) -> tuple[str, str]:
    """What becomes of a family, and the sentence it is told with."""
    told = ("unbuilt", "")
    loose = {name: value for name, value in SHAPE.items() if name not in DETAILS}
    for shape in (SHAPE, {**SHAPE, "num_key_value_heads": 4}, loose, {"num_hidden_layers": 2, "vocab_size": 300}):
        try:
            model = tiny(family, shape)
        except Exception as error:
            told = told if told[1] else ("unbuilt", f"{type(error).__name__}: {' '.join(str(error).split())[:110]}")
            continue
        told = _asked(family, model)
        if told[0] != "raises":
            break
    return told


def _asked(family: str, model: Any) -> tuple[str, str]:
    try:
        Student(model, None).check(ModelConfig(path=family, dtype="float32"))
    except ModelError as error:
        return ("raises" if "by token ids alone" in str(error) else "refused"), str(error)[:230]
    head = Student(model, None).head(2)
    way = [f"x {head.logit_scale:g}"] * (head.logit_scale != 1) + [f"cap {head.final_softcap:g}"] * bool(
        head.final_softcap
    )
    return "agrees", " ".join(way + ["bias"] * (head.bias_V is not None))


def main() -> None:
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    names = [name for name in sys.argv[1:] if name != "--json"] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = {}
    for family in names:
        found[family] = look(family)
        print(f"{family:26} {found[family][0]:8} {found[family][1]}", flush=True)
    counts = dict(Counter(kind for kind, _ in found.values()))
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    if "--json" in sys.argv:
        print(json.dumps({"counts": counts, "families": {name: kind for name, (kind, _) in found.items()}}))


if __name__ == "__main__":
    main()
