"""Bytes that decide where a pair fits: teachers' weights and heads, labels on the wire, and the peak memory of students as `plan` estimates it.

Shapes are those of the Qwen2.5 family; nothing is loaded and no GPU is needed, 2 minutes on a core.
    python -m tests.bench.sizing [--write]      # into tests/bench/tables/sizing.json, from which `make reference` makes the tables of docs and README
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from student_trainer.config.model import ModelConfig
from student_trainer.planning.estimate.parts import Step, estimate
from student_trainer.planning.estimate.shapes import shapes_of
from teacher_wire.score.signals import spec_of

TABLE = Path("tests/bench/tables/sizing.json")
WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# width, FFN, layers, heads, key-value heads, rows of the embedding, whether the head is tied to it
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27648, 64, 40, 8, 152_064, False),
    "72B": (8192, 29568, 80, 64, 8, 152_064, False),
}
STUDENTS = ("0.5B", "1.5B", "3B", "7B")
TEACHERS = ("7B", "14B", "32B", "72B")
SEQUENCES, LENGTH, VOCAB = 2, 2048, 151_936
HEAD_WIDTH = 3584  # of the teacher whose head lies beside the student


def config_of(size: str) -> Any:
    """Of transformers."""
    from transformers import Qwen2Config

    *widths, vocab, tied = SHAPES[size]
    return Qwen2Config(**dict(zip(WIDTHS, widths, strict=True)), vocab_size=vocab, tie_word_embeddings=tied)


def parameters(size: str) -> int:
    """Weights of a model, counted on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(size))
    return sum({id(weight): weight.numel() for weight in model.parameters()}.values())


def of_teacher(size: str) -> dict[str, Any]:
    """Bytes of its weights and head in bfloat16, and of one label row by each transport."""
    width, vocab = SHAPES[size][0], SHAPES[size][5]
    rows = {
        "hidden": spec_of("hidden", vocab).row_bytes(width, 2),
        "int8": spec_of("hidden", vocab, reduction="int8").row_bytes(width, 2),
        "top_k 128": spec_of("top_k", vocab, k=128).row_bytes(width, 2),
    }
    return {"size": size, "weights": 2 * parameters(size), "head": 2 * vocab * width, "row_bytes": rows}


def of_student(size: str, way: str) -> dict[str, Any]:
    """Peak bytes held on a GPU, 2 x 2,048 tokens with checkpointing, a 7B teacher's head beside it."""
    tree: dict[str, Any] = {"path": "random", "gradient_checkpointing": True, "graphs": False}
    tree |= {"full": {"lora": None}, "qlora": {"quantize": "nf4"}, "lora": {}}[way]
    config = ModelConfig.model_validate(tree)
    rows = SEQUENCES * (LENGTH - 1)
    found: dict[str, Any] = {"size": size, "way": way}
    for transport, head in (("hidden", 2 * VOCAB * HEAD_WIDTH), ("top_k", 0)):
        step = Step(
            SEQUENCES, LENGTH, rows, checkpointing=True, compiled=True, graphs=False, fused=True, vocab_rows=VOCAB,
            teacher_heads_bytes=head, label_bytes=rows * (7176 if head else 652),
        )  # fmt: skip
        found[transport] = estimate(shapes_of(config_of(size), config, bfloat16=True), step, on_gpu=True).on_card
    return found


def main() -> None:
    """See module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found = {
        "command": "python -m tests.bench.sizing --write",
        "teachers": [of_teacher(size) for size in TEACHERS],
        "students": [of_student(size, way) for size in STUDENTS for way in ("lora", "qlora", "full")],
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if options.write:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
