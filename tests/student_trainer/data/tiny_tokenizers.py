"""Real tokenizers, trained in milliseconds, with the chat templates of the model families.

In: a family's name. Out: a `PreTrainedTokenizerFast`.
Must never need a download.
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# GLM-4: no end-of-turn token; the next role's header, or the end of text, ends a turn.
GLM = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Shows the number of turns in the first line: every added turn rewrites what came before.
REWRITING = "{{ messages | length }}" + CHATML
SILENT = "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}{% if add_generation_prompt %}{% endif %}"

# family -> (template, eos, bos, whether the tokenizer itself adds bos, special tokens)
FAMILIES: dict[str, tuple[str | None, str, str | None, bool, tuple[str, ...]]] = {
    "chatml": (CHATML, "<|im_end|>", None, False, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "llama": (
        LLAMA3,
        "<|eot_id|>",
        "<|begin_of_text|>",
        True,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "glm": (GLM, "<|endoftext|>", None, False, ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>")),
    "plain": (None, "</s>", None, False, ("</s>",)),
    "plain_bos": (None, "</s>", "<s>", True, ("<s>", "</s>")),
    "rewriting": (REWRITING, "<|im_end|>", None, False, ("<|im_start|>", "<|im_end|>")),
    "silent": (SILENT, "<|im_end|>", None, False, ("<|im_start|>", "<|im_end|>")),
}
TEXT = [
    "user\nComplete the function.\ndef add(a, b):\n    return a + b\n",
    "assistant\n    return None\n\n\n",
    "    for i in range(10):\n        print(i)\r\n",
    "The quick brown fox. 你好,世界。 😀👍🏽 naïve café",
] * 20


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 ids or fewer; merges such as newline + indentation cross template borders on purpose."""
    template, eos, bos, adds_bos, special = FAMILIES[family]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    if adds_bos and bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=eos)
    fast.chat_template = template
    return fast


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# How SentencePiece tokenizers write their space: by pre-tokenizer (Metaspace, three schemes) or by normalizer (Prepend).
SCHEMES = ("first", "always", "never", "prepend")


@cache
def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """A Metaspace BPE with byte fallback, under a template of Zephyr's manner."""
    from tokenizers import normalizers

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if scheme != "never" else [])
        )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=special[:3], initial_alphabet=list("\n<|>usyxb"), show_progress=False
    )
    core.train_from_iterator(["the cat the mat a cat", "assistant user system the cat"] * 30, trainer)
    vocabulary = json.loads(core.to_str())
    for byte in special[3:]:
        vocabulary["model"]["vocab"].setdefault(byte, len(vocabulary["model"]["vocab"]))
    vocabulary["model"]["vocab"]["\n\n"] = len(vocabulary["model"]["vocab"])
    vocabulary["model"]["merges"].append(["\n", "\n"])
    core = Tokenizer.from_str(json.dumps(vocabulary))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    fast.chat_template = ZEPHYR
    return fast
