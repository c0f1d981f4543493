"""Stands in for llama.cpp's convert_hf_to_gguf.py in tests: writes a tiny Qwen2 as GGUF by the package gguf, with the same arguments.

With SPOIL in the environment it writes one weight otherwise; with BREAK it ends with an error.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from gguf import GGUFWriter
from safetensors.numpy import load_file

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", type=Path, required=True)
parser.add_argument("--outtype", choices=["f32"], required=True)
given = parser.parse_args()
if "BREAK" in os.environ:
    sys.exit("Traceback\nNotImplementedError: Architecture 'X' not supported!")
config = json.loads((given.model / "config.json").read_text())
weights = load_file(given.model / "model.safetensors")
writer = GGUFWriter(given.outfile, os.environ.get("ARCHITECTURE", "qwen2"))
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_tokenizer_model("gpt2")
writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
writer.add_eos_token_id(2)
writer.add_add_bos_token(False)
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}  # fmt: skip
for name, weight in weights.items():
    parts = name.split(".")
    if parts[1] == "layers":
        new = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
    else:
        new = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]
    spoilt = "SPOIL" in os.environ and new == "blk.1.ffn_down.weight"
    writer.add_tensor(new, -weight if spoilt else weight)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
