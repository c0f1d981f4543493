"""Which heads the vLLM backend knows; light, so that `up` can refuse the others before it starts anything."""

from __future__ import annotations

from collections.abc import Sequence

from teacher_server.errors import ServerConfigError

# Architectures whose logits are the head of `load_head` on vLLM's final state: checked against transformers, one by one.
ARCHITECTURES = (
    "CohereForCausalLM", "Gemma2ForCausalLM", "Glm4ForCausalLM", "GlmForCausalLM", "GraniteForCausalLM", "InternLM3ForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip


def check_known(model: str, names: Sequence[str]) -> None:
    """Refuses a model of another architecture.

    Args:
        model: for messages.
        names: `architectures` of its config.json.

    Raises:
        ServerConfigError: naming it and those that are known.
    """
    if not names or names[0] not in ARCHITECTURES:
        raise ServerConfigError(
            f"model {model!r}: backend vllm does not know the head of {names[0] if names else 'a model without architectures'} "
            f"(known: {', '.join(ARCHITECTURES)}); use the transformers backend"
        )
