"""Tiny random models of real families and a tokenizer for them; no pytest here, so that scripts can use it too."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "an", "old", "dog", "run", "by"]


def make_tokenizer(folder: Path, seed_text: str = "", chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level BPE of 300 ids in `folder`; `seed_text` changes its merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS) * 5, "user assistant system", seed_text * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def make_model(
    folder: Path, family: str = "qwen2", *, seed: int = 0, vocab: int = 300, hidden: int = 32, **changes
) -> Path:
    """A random model of a family, with a tokenizer, in `folder`."""
    import torch
    import transformers as tf

    shape = dict(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    extra = {
        "qwen2": {"tie_word_embeddings": True},
        "llama": {},
        "internlm3": {},
        "glm": {"head_dim": hidden // 4},
        "glm4": {"head_dim": hidden // 4},
        "gemma2": {
            "head_dim": hidden // 4,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": hidden // 4,
            "sliding_window": 64,
        },
        "cohere": {"logit_scale": 0.25},
        "qwen3": {"head_dim": hidden // 4},
        "granite": {"logits_scaling": 4.0},
        "granitemoe": {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2},
        "cohere2": {"logit_scale": 0.25, "sliding_window": 64},
        "hyperclovax": {"logits_scaling": 4.0},
        "nanochat": {"final_logit_softcapping": 5.0},
        "gemma3_text": {"head_dim": hidden // 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": hidden // 4, "sliding_window": 64},
        "qwen3_moe": {"head_dim": hidden // 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "recurrent_gemma": {"logits_soft_cap": 5.0, "lru_width": hidden, "attention_window_size": 64, "num_hidden_layers": 3},
        "falcon_h1": {
            "lm_head_multiplier": 0.078125, "mamba_d_ssm": 2 * hidden, "mamba_n_heads": 4, "mamba_d_head": hidden // 2,
            "mamba_d_state": 8, "mamba_n_groups": 1, "head_dim": hidden // 4,
        },
        "phi": {},  # its head has a bias
        "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": hidden // 4},
        "bert": {"is_decoder": True},  # has layers between its last state and its head
        "bert-generation": {"is_decoder": False},  # sees what comes later
    }[family]  # fmt: skip
    if family == "internlm3":
        from teacher_server.backends import internlm

        internlm.register()
    config = tf.AutoConfig.for_model(family, **{**shape, **extra, **changes})
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # random models are nearly uniform: make their opinions worth testing
        parameter.data.mul_(3.0)
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def head_of(backend):
    """The output head of a backend, as its students get it."""
    from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD, TeacherHead

    (wanted,) = (artifact for artifact in backend.facts.artifacts if artifact.kind == OUTPUT_HEAD)
    return TeacherHead.of(backend.artifact(wanted))


async def fetched_head(client, info, progress=None, **options):
    """The output head of a teacher over the wire."""
    from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD, TeacherHead

    return TeacherHead.of(await client.artifact(info, info.artifact(OUTPUT_HEAD), progress, **options))
