"""Who is who: the digests by which student and teacher recognise each other.

Bytes and JSON in, hex sha256 out. No model code here: both houses must compute the same digest.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping

import numpy as np

from teacher_wire.core.tensor import Tensor

# The parts of a fast tokenizer's JSON that decide which text becomes which ids.
_TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")
# What of an added token decides how text is cut; whether it is `special` only decides what decoding leaves out.
_ADDED_FIELDS = ("content", "id", "lstrip", "rstrip", "single_word", "normalized")
MAX_ADDED_TOKENS = 2_048  # told one by one; a tokenizer with more is compared as a whole


def tokenizer_sha256(tokenizer_json: str) -> str:
    """Digest of what a fast tokenizer does to text (`tokenizer.backend_tokenizer.to_str()`).

    Padding and truncation settings and BOS/EOS post-processing do not count: ids are made without them.
    """
    parsed = json.loads(tokenizer_json)
    kept = {part: parsed.get(part) for part in _TOKENIZER_PARTS}
    return _sha256_text(json.dumps(kept, sort_keys=True, ensure_ascii=False))


def base_tokenizer_sha256(tokenizer_json: str) -> str:
    """Digest of a fast tokenizer without its added tokens, decoder and settings: which ids ordinary text becomes."""
    parsed = json.loads(tokenizer_json)
    kept = {part: parsed.get(part) for part in ("normalizer", "pre_tokenizer", "model")}
    return _sha256_text(json.dumps(kept, sort_keys=True, ensure_ascii=False))


def added_tokens(tokenizer_json: str) -> str:
    """The added tokens of a fast tokenizer as they travel: JSON, a list of [content, id, flags ...] in order of ids.

    "" where there are more than `MAX_ADDED_TOKENS`. Two tokenizers with the same `base_tokenizer_sha256` give the same ids
    to every text that holds none of the tokens in which these lists differ.
    """
    entries = json.loads(tokenizer_json).get("added_tokens") or []
    if len(entries) > MAX_ADDED_TOKENS:
        return ""
    listed = sorted(([entry.get(name) for name in _ADDED_FIELDS] for entry in entries), key=lambda entry: entry[1])
    return json.dumps(listed, ensure_ascii=False, separators=(",", ":"))


def differing_added_tokens(ours: str, theirs: str) -> tuple[dict[str, int], dict[str, int]] | None:
    """Contents and ids of the added tokens that only we, and that only they, have or have otherwise; None if it cannot be told."""
    try:
        mine, others = ({json.dumps(e): e for e in json.loads(text)} for text in (ours, theirs))
        return (
            {str(mine[key][0]): int(mine[key][1]) for key in mine.keys() - others.keys()},
            {str(others[key][0]): int(others[key][1]) for key in others.keys() - mine.keys()},
        )
    except (ValueError, TypeError, LookupError):  # "": not told; anything else is not what `added_tokens` writes
        return None


def default_template(template: str | Mapping[str, str] | None) -> str | None:
    """The text of `tokenizer.chat_template`: of named templates the one called "default"; None where there is none."""
    if isinstance(template, Mapping):
        return template.get("default")
    return template


def template_sha256(template: str | Mapping[str, str] | None) -> str:
    """Digest of a tokenizer's own chat template, which may be several by name; the empty string for none."""
    return text_sha256(default_template(template))


def text_sha256(text: str | None) -> str:
    """Digest of a text; the empty string for none."""
    return _sha256_text(text) if text else ""


def head_sha256(weight_VD: Tensor, bias_V: Tensor | None, logit_scale: float, final_softcap: float) -> str:
    """Digest of an output head: dtype, shape, weight bytes, bias bytes, scale and soft-cap."""
    digest = hashlib.sha256()
    for tensor in (weight_VD, bias_V):
        if tensor is not None:
            digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(tensor.array).data.cast("B"))
    digest.update(struct.pack("<dd", logit_scale, final_softcap))
    return digest.hexdigest()


def _sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
