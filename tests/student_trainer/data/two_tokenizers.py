"""Texts in the tokens of tokenizers, and byte tables made by hand, for tests of what joins two tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from teacher_wire.vocabulary.byte_table import TEXT, ByteTable
from teacher_wire.vocabulary.tokenizer_file import byte_table

TEXTS = (
    "The quick brown fox jumps over 12345 lazy dogs, 3.14159 times in 2026.",
    "  leading spaces\n\n\n    return None\r\n\tx = {'a': 1}\r\n",
    "你好,世界。机器学习模型的蒸馏。",
    "😀👍🏽 naïve café — a👩‍👩‍👧‍👦b",
    "the cat the mat a cat",
    "Ünïcode ﬁne \u200b\u00a0x\u3000y e\u0301 \x00\x7f",
    "",
    " ",
)


def table_of(tokens: Sequence[bytes | int]) -> ByteTable:
    """A table of the tokens' bytes; a number is the role of a token without bytes."""
    held = [token if isinstance(token, bytes) else b"" for token in tokens]
    roles = [TEXT if isinstance(token, bytes) else token for token in tokens]
    ends = np.concatenate([[0], np.cumsum([len(data) for data in held])]).astype(np.int64)
    return ByteTable(np.frombuffer(b"".join(held), np.uint8), ends, np.array(roles, np.uint8))


@cache
def table_for(tokenizer) -> ByteTable:
    """The byte table of a tokenizer, its end-of-sequence token as the end of a turn."""
    return byte_table(
        tokenizer.backend_tokenizer.to_str(), bos=tokenizer.bos_token or "", ends=[tokenizer.eos_token], rows=0
    )


def written(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A text in a tokenizer's tokens with the end of turn behind it, and where each of them ends; without the space that is put before it."""
    table = table_for(tokenizer)
    backend = tokenizer.backend_tokenizer
    ids_n = np.array([*backend.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id], np.int64)
    whole = table.text_of(ids_n)
    dummy = len(whole) - len(text.encode())
    assert whole == b" " * dummy + text.encode() and dummy in (0, 1)
    return ids_n, np.maximum(0, table.ends_of(ids_n) - dummy)
