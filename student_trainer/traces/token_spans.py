"""Which tokens of a written trace are which step: character spans of JSON values, and of tokens in decoded text.

In: valid JSON text, token ids; out: spans, half-open, in characters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

Path = tuple[str | int, ...]
Span = tuple[int, int]
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+)')


def value_spans(text: str) -> dict[Path, Span]:
    """Where each string, number or literal of valid JSON stands, by its path."""
    found: dict[Path, Span] = {}
    _value(text, 0, (), found)
    return found


def _value(text: str, at: int, path: Path, found: dict[Path, Span]) -> int:
    """Takes in one value; where it ends."""
    token = _next(text, at)
    if token.group(1) not in "{[":
        found[path] = token.span(1)
        return token.end()
    opened, number, at = token.group(1), 0, token.end()
    while (token := _next(text, at)).group(1) not in "}]":
        at = token.end() if token.group(1) == "," else at
        key: str | int = number
        if opened == "{":
            name = _next(text, at)
            key = json.loads(name.group(1))
            at = _next(text, name.end()).end()  # the colon
        at = _value(text, at, (*path, key), found)
        number += 1
    return token.end()


def _next(text: str, at: int) -> re.Match[str]:
    token = _TOKEN.match(text, at)
    assert token is not None, "the text has been parsed before"
    return token


def token_spans(token_ids: Sequence[int], text: str, tokenizer: Any, *, skip_special: bool = True) -> list[Span]:
    """Where each token stands in `text`, which is all of them decoded (special tokens left out, if `skip_special`).

    Tokens that hold a part of a character meet at that character.
    """
    pieces = tokenizer.batch_decode([[token_id] for token_id in token_ids], skip_special_tokens=skip_special)
    if "".join(pieces) == text:
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    else:
        prefixes = tokenizer.batch_decode(
            [list(token_ids[: count + 1]) for count in range(len(token_ids))], skip_special_tokens=skip_special
        )
        ends = [min(len(prefix), len(text)) for prefix in prefixes]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def mean_probability(spans: Sequence[Span], token_logp_n: np.ndarray, within: Span) -> float:
    """exp of the mean log-probability of the tokens that touch `within`; 1 if none does."""
    touched = [i for i, (start, end) in enumerate(spans) if start < within[1] and end > within[0]]
    return math.exp(float(token_logp_n[touched].mean())) if touched else 1.0
