"""Quotes found again in a prompt: exactly, or after folding white space and Unicode composition.

In: a prompt and a quote with the offsets a model claims; out: half-open UTF-8 byte offsets that are right, or None.
It never changes a prompt; what it finds is always whole characters of it.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache


def find_span(prompt: str, text: str, start: int, end: int) -> tuple[int, int] | None:
    """Where `text` stands in `prompt`: as claimed, else the nearest exact place, else the nearest after folding.

    Args:
        prompt: user content.
        text: the quote; not empty.
        start, end: claimed byte offsets, as far off as they like.
    """
    data, quote = prompt.encode(), text.encode()
    if data[start:end] == quote and 0 <= start <= end:
        return start, end
    places = _places(data, quote)
    if places:
        nearest = min(places, key=lambda place: (abs(place - start), place))
        return nearest, nearest + len(quote)
    return _folded_span(prompt, text, start)


def _places(data: bytes, quote: bytes) -> list[int]:
    """Every place of `quote`, overlapping ones too; valid UTF-8 is only ever found at character borders."""
    found, at = [], data.find(quote)
    while at >= 0:
        found.append(at)
        at = data.find(quote, at + 1)
    return found


def _folded_span(prompt: str, text: str, start: int) -> tuple[int, int] | None:
    """The span of whole pieces whose folded form is that of `text`, nearest to byte `start`."""
    wanted = "".join(folded for folded, _ in _pieces(text)).strip(" ")
    if not wanted:
        return None
    whole, begins, ends = _folded(prompt)
    spans, at = [], whole.find(wanted)
    while at >= 0:
        if at in begins and at + len(wanted) in ends:
            spans.append((begins[at], ends[at + len(wanted)]))
        at = whole.find(wanted, at + 1)
    return min(spans, key=lambda span: (abs(span[0] - start), span), default=None)


@lru_cache(maxsize=2)
def _folded(prompt: str) -> tuple[str, dict[int, int], dict[int, int]]:
    """The prompt folded, and the bytes of it at which a piece begins and ends, by folded character."""
    folded: list[str] = []
    begins, ends, byte, length = {}, {}, 0, 0
    for piece, source in _pieces(prompt):
        begins[length] = byte
        byte += len(source.encode())
        length += len(piece)
        ends[length] = byte
        folded.append(piece)
    return "".join(folded), begins, ends


def _pieces(text: str) -> list[tuple[str, str]]:
    """(folded, source) of the smallest pieces that fold by themselves: NFC, a run of white space to one space."""
    sources: list[str] = []
    for character in text:
        joins = sources and (
            (character.isspace() and sources[-1][-1].isspace())
            or (unicodedata.combining(character) or character in _second_characters())
        )
        if joins:
            sources[-1] += character
        else:
            sources.append(character)
    return [(" " if source.isspace() else unicodedata.normalize("NFC", source), source) for source in sources]


@lru_cache(maxsize=1)
def _second_characters() -> frozenset[str]:
    """Characters that may compose with the one before them although they are no combining marks (Hangul vowels, ...)."""
    hangul = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    others = set()
    for code in range(0x10FFFF):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<") and not unicodedata.combining(chr(int(parts[1], 16))):
            others.add(chr(int(parts[1], 16)))
    return frozenset(hangul | others)
