"""The published sizes of families, and a student of one of them with random weights.

In: a teacher's config and the name of a size; out: the config of a student. The shapes are those of the published config.json files; what
is no shape (vocabulary, positions, rotary base, norms' epsilon) stays the teacher's, since the student reads the teacher's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from student_trainer.errors import ConfigError


@dataclass(frozen=True)
class Size:
    """A published shape, by the names of config.json; what is None stays out of it."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    head_dim: int | None = None

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.num_hidden_layers} layers of width {self.hidden_size}"


# By model_type, then by the size's name, ascending. Qwen2.5 and Qwen2 are one model_type with the same shapes.
SIZES: Mapping[str, Mapping[str, Size]] = {
    "qwen2": {
        "0.5b": Size(896, 4864, 24, 14, 2, True),
        "1.5b": Size(1536, 8960, 28, 12, 2, True),
        "3b": Size(2048, 11008, 36, 16, 2, True),
        "7b": Size(3584, 18944, 28, 28, 4, False),
        "14b": Size(5120, 13824, 48, 40, 8, False),
        "32b": Size(5120, 27648, 64, 40, 8, False),
    },
    "qwen3": {
        "0.6b": Size(1024, 3072, 28, 16, 8, True, 128),
        "1.7b": Size(2048, 6144, 28, 16, 8, True, 128),
        "4b": Size(2560, 9728, 36, 32, 8, True, 128),
        "8b": Size(4096, 12288, 36, 32, 8, False, 128),
        "14b": Size(5120, 17408, 40, 40, 8, False, 128),
    },
    "llama": {
        "smollm2-135m": Size(576, 1536, 30, 9, 3, True, 64),
        "smollm2-360m": Size(960, 2560, 32, 15, 5, True, 64),
        "llama3.2-1b": Size(2048, 8192, 16, 32, 8, True, 64),
        "smollm2-1.7b": Size(2048, 8192, 24, 32, 32, True, 64),
        "llama3.2-3b": Size(3072, 8192, 28, 24, 8, True, 128),
        "llama3.1-8b": Size(4096, 14336, 32, 32, 8, False, 128),
    },
    "gemma2": {
        "2b": Size(2304, 9216, 26, 8, 4, True, 256),
        "9b": Size(3584, 14336, 42, 16, 8, True, 256),
    },
    "gemma3_text": {
        "270m": Size(640, 2048, 18, 4, 1, True, 256),
        "1b": Size(1152, 6912, 26, 4, 1, True, 256),
    },
}  # fmt: skip
# Derived from the number of layers where they are absent; of another depth than the teacher's they must be derived anew.
_DERIVED = ("layer_types", "max_window_layers", "no_rope_layers")


def size_of(config: Mapping[str, Any], name: str) -> Size:
    """The size called `name` of the teacher's family.

    Raises:
        ConfigError: a family without a table, no such size, or one that is not smaller than the teacher.
    """
    family = str(config.get("model_type"))
    table = SIZES.get(family)
    if table is None:
        raise ConfigError(
            f"--width {name}: there is no table of sizes for the family {family}; there is one for: {', '.join(SIZES)}. Fewer layers can "
            "be had of every family: --layers"
        )
    width, depth = int(config.get("hidden_size") or 0), int(config.get("num_hidden_layers") or 0)
    smaller = {
        key: size
        for key, size in table.items()
        if size.hidden_size < width or (size.hidden_size == width and size.num_hidden_layers < depth)
    }
    if name.lower() in smaller:
        return smaller[name.lower()]
    known = "; ".join(f"{key} ({size.told})" for key, size in smaller.items()) or "none"
    why = "is not smaller than the teacher" if name.lower() in table else "is no size of its family in the table"
    raise ConfigError(f"--width {name}: {why} ({family}, {depth} layers of width {width}); smaller ones: {known}")


def sized_config(config: Mapping[str, Any], size: Size, layers: int | None) -> dict[str, Any]:
    """The teacher's config in another size, and with another number of layers where one is named."""
    made = {key: value for key, value in config.items() if key not in (*_DERIVED, "_name_or_path")}
    shapes = {key: value for key, value in asdict(size).items() if value is not None}
    made |= shapes
    if size.head_dim is None:
        made.pop("head_dim", None)
    if "query_pre_attn_scalar" in made and size.head_dim is not None:
        made["query_pre_attn_scalar"] = size.head_dim  # as all smaller Gemmas have it
    if layers is not None:
        made["num_hidden_layers"] = layers
    return made
