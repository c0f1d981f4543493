"""Which token a tokenizer begins a text with, for the classes of two vocabularies.

In: many texts and a tokenizer that is here; out: an id for each. A teacher's tokenizer is asked over the wire instead, and what comes
back is read by `first_with_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from student_trainer.data.cross_tokenizer.classes import FirstTokens
from teacher_wire.vocabulary.byte_table import ByteTable

_TEXTS_PER_CALL = 8_192
_NEUTRAL = "\n.:1"  # characters to write a text behind; the first that no merge joins to it is taken


def first_tokens(tokenizer: Any, table: ByteTable) -> FirstTokens:
    """How a tokenizer of this machine begins texts.

    A tokenizer that puts a space before what it is given alone (SentencePiece) is given the text behind a neutral character.

    Args:
        tokenizer: a fast one of transformers.
        table: the bytes of its ids.
    """
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    puts_space = table.text_of(np.array(backend.encode("x", add_special_tokens=False).ids, np.int64)) != b"x"
    return lambda texts: _first(backend, table, texts, _NEUTRAL if puts_space else "")


def first_with_bytes(ids_n: np.ndarray, ends_n: np.ndarray) -> int:
    """The first token of a text that stands for some of its bytes; -1 if none does.

    Args:
        ids_n: of the text.
        ends_n: where each ends in its bytes.
    """
    found = np.flatnonzero(np.asarray(ends_n) > 0)
    return int(ids_n[found[0]]) if found.size else -1


def _first(backend: Any, table: ByteTable, texts: Sequence[bytes], neutral: str) -> np.ndarray:
    first = np.full(len(texts), -1, np.int64)
    waiting = np.arange(len(texts))
    for before in neutral or ("",):
        own = backend.encode(before, add_special_tokens=False).ids if before else []
        merged: list[int] = []
        for start in range(0, len(waiting), _TEXTS_PER_CALL):
            some = waiting[start : start + _TEXTS_PER_CALL].tolist()
            encoded = backend.encode_batch([before + texts[at].decode() for at in some], add_special_tokens=False)
            for at, one in zip(some, encoded, strict=True):
                ids = one.ids
                if ids[: len(own)] != own:
                    merged.append(at)
                    continue
                first[at] = next((token_id for token_id in ids[len(own) :] if len(table.of(token_id))), -1)
        waiting = np.array(merged, np.int64)
        if not waiting.size:
            break
    return first
