"""Who is who: the digests by which student and teacher recognise each other.

Bytes and JSON in, hex sha256 out. No model code here: both houses must compute the same digest.
"""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np

from teacher_wire.messages import Tensor

# The parts of a fast tokenizer's JSON that decide which text becomes which ids.
_TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")


def tokenizer_sha256(tokenizer_json: str) -> str:
    """Digest of what a fast tokenizer does to text (`tokenizer.backend_tokenizer.to_str()`).

    Padding and truncation settings and BOS/EOS post-processing do not count: ids are made without them.
    """
    parsed = json.loads(tokenizer_json)
    kept = {part: parsed.get(part) for part in _TOKENIZER_PARTS}
    return _sha256_text(json.dumps(kept, sort_keys=True, ensure_ascii=False))


def text_sha256(text: str | None) -> str:
    """Digest of a chat template; the empty string for none."""
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
