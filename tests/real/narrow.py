"""A student of another width than its teacher: a Llama model cut to a share of its channels, its heads and the neurons of its FFNs.

In: a folder with a Llama model whose head is tied; out: a folder with the narrower one, which knows a little of what the other does and has much to
learn. What has the largest weights stays: of channels by all that writes into them, of key heads (their query heads go with them) and neurons by what they write.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# module -> what its weight's axes count; "" stays whole
_AXES = {
    "embed_tokens": ("", "channels"),
    "norm": ("channels",),
    "input_layernorm": ("channels",),
    "post_attention_layernorm": ("channels",),
    "q_proj": ("queries", "channels"),
    "k_proj": ("keys", "channels"),
    "v_proj": ("keys", "channels"),
    "o_proj": ("channels", "queries"),
    "gate_proj": ("neurons", "channels"),
    "up_proj": ("neurons", "channels"),
    "down_proj": ("channels", "neurons"),
}


@torch.no_grad()
def narrow(source: Path, out: Path, share: float = 2 / 3) -> None:
    """Writes the narrower model, in float32, with the tokenizer of the other.

    Args:
        share: of everything that is cut; at least one key head stays.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config, layers = model.config, model.model.layers
    heads = config.num_key_value_heads
    head, groups = config.hidden_size // config.num_attention_heads, config.num_attention_heads // heads
    fewer = max(1, round(share * heads))
    neurons = round(share * config.intermediate_size)
    writers = [layer.self_attn.o_proj for layer in layers] + [layer.mlp.down_proj for layer in layers]
    into = [model.model.embed_tokens.weight.T, *(writer.weight for writer in writers)]
    energy_D = torch.stack([weight.square().sum(1) / weight.square().sum() for weight in into]).sum(0)
    channels = _largest(energy_D, round(share * config.hidden_size))
    kept: list[dict[str, Tensor]] = []
    for layer in layers:
        of_heads = layer.self_attn.o_proj.weight.square().sum(0).view(heads, -1).sum(1)
        chosen = _largest(of_heads, fewer)
        of_neurons = layer.mlp.down_proj.weight.square().sum(0)
        kept.append({"keys": _units(chosen, head), "queries": _units(chosen, groups * head), "neurons": _largest(of_neurons, neurons)})  # fmt: skip
    state = {}
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "lm_head":
            continue
        here = {"channels": channels} | (kept[int(parts[2])] if parts[1] == "layers" else {})
        for axis, counted in enumerate(_AXES[parts[-2]]):
            weight = weight.index_select(axis, here[counted]) if counted else weight
        state[name] = weight
    shape = {"hidden_size": len(channels), "intermediate_size": neurons, "num_key_value_heads": fewer,
             "num_attention_heads": fewer * groups, "head_dim": head, "tie_word_embeddings": True}  # fmt: skip
    cut = LlamaForCausalLM(LlamaConfig(**(config.to_dict() | shape)))
    missing, unexpected = cut.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    cut.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def _largest(energy: Tensor, count: int) -> Tensor:
    return energy.topk(count).indices.sort().values


def _units(index: Tensor, size: int) -> Tensor:
    """The entries of units of so many."""
    return (index[:, None] * size + torch.arange(size)).flatten()
