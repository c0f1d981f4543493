"""Models of random weights in the shapes of real ones, and conversations of a given length: for benches of speed.

In: the name of a shape; out: a folder as of a hub, whose tokenizer names all ids of the shape.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from tests.tiny import make_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, vocab_size=151_936),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=151_936),
    "cpu": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=4_096),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300),
}  # fmt: skip


def make_folder(shape: str, folder: Path) -> Path:
    """Random weights as transformers draws them, in bfloat16 on a GPU; the ids of the tokenizer are below the vocabulary, and END is never drawn on purpose."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = Qwen2Config(
        **SHAPES[shape],
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    _fill_vocabulary(folder / "tokenizer.json", SHAPES[shape]["vocab_size"])
    return folder


def _fill_vocabulary(file: Path, size: int) -> None:
    """Words that no text has, so that the loss is over all ids of the shapes."""
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words.update({f"<unused {number}>": number for number in range(len(words), size)})
    file.write_text(json.dumps(tokenizer))


def write_rows(file: Path, count: int, tokens: int) -> None:
    """Conversations whose prompts have about so many tokens (bytes of letters that the tokenizer does not merge)."""
    rng = np.random.default_rng(0)
    letters = np.array(list("BCDFGJKLMNPQRSTVWXZ"))
    with file.open("w") as out:
        for _ in range(count):
            text = "".join(rng.choice(letters, max(2, tokens - 6)))
            out.write(
                json.dumps(
                    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:8]}]}
                )
                + "\n"
            )
