"""A tokenizer.json as text to a `ByteTable`: the vocabulary read as it is written, without loading the tokenizer.

In: the JSON of a fast tokenizer (`backend_tokenizer.to_str()`), and which of its tokens begin a text and end a turn; out: its byte table.
Byte-level vocabularies are read through the inverse of GPT-2's bytes_to_unicode, those of SentencePiece with "▁" for a space and <0xNN>
for a byte. Anything else is refused by name: a WordPiece token does not say which bytes it stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from teacher_wire.core.errors import CapabilityError
from teacher_wire.vocabulary.byte_table import BOS, CONTROL, END, TEXT, THINK_CLOSE, THINK_OPEN, UNUSED, ByteTable

# Tags around reasoning that a tokenizer may have as special tokens; tags that are not special are text and have bytes.
_THINK = {f"{before}{name}{after}": role for name in ("think", "thinking", "thought", "reasoning", "seed:think") for before, after, role in (("<", ">", THINK_OPEN), ("</", ">", THINK_CLOSE))}  # fmt: skip
_THINK |= {"[THINK]": THINK_OPEN, "<|begin_of_thought|>": THINK_OPEN, "◁think▷": THINK_OPEN}
_THINK |= {"[/THINK]": THINK_CLOSE, "<|end_of_thought|>": THINK_CLOSE, "◁/think▷": THINK_CLOSE}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MODELS = ("BPE", "Unigram")


def byte_table(tokenizer_json: str, *, bos: str = "", ends: Sequence[str] = (), rows: int = 0) -> ByteTable:
    """The bytes of every id, and the roles of those that have none.

    An added token has bytes if it is not special, and a role if it is: that of its name among those below, THINK_OPEN or THINK_CLOSE for the
    usual tags, else CONTROL. Tokens named below have their role whether they are special or not.

    Args:
        tokenizer_json: of a byte-level BPE, or of a SentencePiece BPE or Unigram.
        bos: the token that begins a text; "" for none.
        ends: the tokens that end a turn or a text, such as "<|im_end|>" and "<|endoftext|>"; those the tokenizer lacks are passed over.
        rows: entries of the table at least, such as the rows of the model's head; ids without a token are UNUSED.

    Raises:
        CapabilityError: the tokenizer's tokens do not say which bytes they stand for (WordPiece, WordLevel, and others).
    """
    parsed = json.loads(tokenizer_json)
    vocabulary = _vocabulary(parsed["model"])
    bytes_of = _bytes_of(parsed)
    added = {int(entry["id"]): entry for entry in parsed.get("added_tokens") or ()}
    size = max([rows, *(token_id + 1 for token_id in vocabulary.values()), *(token_id + 1 for token_id in added)])
    held: list[bytes] = [b""] * size
    role_V = np.full(size, UNUSED, np.uint8)
    named = {**dict.fromkeys(ends, END), **({bos: BOS} if bos and bos not in ends else {})}
    unknown = parsed["model"].get("unk_token")
    for content, token_id in vocabulary.items():
        if token_id in added:
            continue
        role = named.get(content, CONTROL if content == unknown else TEXT)
        data = bytes_of(content) if role == TEXT else b""
        held[token_id], role_V[token_id] = data, role if data or role != TEXT else CONTROL
    pieces = set(vocabulary.values())
    for token_id, entry in added.items():
        content = str(entry["content"])
        role = named.get(content, _role(content) if entry.get("special") else TEXT)
        if (
            role == TEXT
        ):  # an added token that is also a piece of SentencePiece is reached as that piece, with its spaces
            data = bytes_of(content) if token_id in pieces and "▁" in content else content.encode()
            role = TEXT if data else CONTROL
            held[token_id] = data
        role_V[token_id] = role
    ends_V1 = np.zeros(size + 1, np.int64)
    np.cumsum(np.fromiter(map(len, held), np.int64, size), out=ends_V1[1:])
    return ByteTable(np.frombuffer(b"".join(held), np.uint8), ends_V1, role_V)


def control_contents(tokenizer_json: str, table: ByteTable) -> dict[str, int]:
    """The tokens of the tokenizer that stand for no bytes, by what they are written as, with their ids."""
    parsed = json.loads(tokenizer_json)
    listed = {str(entry["content"]): int(entry["id"]) for entry in parsed.get("added_tokens") or ()}
    return {content: token_id for content, token_id in listed.items() if table.role_V[token_id] != TEXT}


def _role(content: str) -> int:
    return _THINK.get(content, CONTROL)


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token."""
    if model.get("type") not in _MODELS:
        raise CapabilityError(
            "the bytes of its tokens are not known", field="tokenizer.model.type", value=model.get("type"),
            limit="|".join(_MODELS),
        )  # fmt: skip
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        return {str(content): int(token_id) for content, token_id in vocabulary.items()}
    return {str(content): token_id for token_id, (content, _score) in enumerate(vocabulary)}


def _bytes_of(parsed: Mapping[str, Any]) -> Callable[[str], bytes]:
    """What a token of the vocabulary stands for, by how the tokenizer writes its vocabulary."""
    parts = list(_parts([parsed.get("pre_tokenizer"), parsed.get("decoder")]))
    kinds = {str(part["type"]) for part in parts}
    if "ByteLevel" in kinds:
        return _of_byte_level
    replaced = any(
        part["type"] == "Replace" and (part.get("pattern") or {}).get("String") == "▁" and part.get("content") == " "
        for part in parts
    )
    if "Metaspace" not in kinds and not replaced:
        raise CapabilityError(
            "the bytes of its tokens are not known", field="tokenizer.decoder", value="|".join(sorted(kinds)) or "none",
            limit="ByteLevel, Metaspace, or Replace of ▁",
        )  # fmt: skip
    fallback = bool(parsed["model"].get("byte_fallback")) or "ByteFallback" in kinds
    return _of_pieces_with_bytes if fallback else _of_pieces


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every component of a pipeline, however deep it stands."""
    if isinstance(value, Mapping):
        if "type" in value:
            yield value
        for inner in value.values():
            yield from _parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner)


def _byte_letters() -> dict[int, str]:
    """For str.translate: from the letters of bytes_to_unicode (GPT-2, encoder.py) to latin-1; what is no such letter leaves latin-1."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(0x10000 + byte) for byte in hidden}
    letters |= {byte: chr(byte) for byte in shown}
    return letters | {256 + place: chr(byte) for place, byte in enumerate(hidden)}


_LETTERS = _byte_letters()


def _of_byte_level(content: str) -> bytes:
    try:
        return content.translate(_LETTERS).encode("latin-1")
    except UnicodeEncodeError:  # no text becomes this token; decoders show it as it is written
        return content.encode()


def _of_pieces(content: str) -> bytes:
    return content.replace("▁", " ").encode()


def _of_pieces_with_bytes(content: str) -> bytes:
    byte = _BYTE.fullmatch(content)
    return bytes([int(byte[1], 16)]) if byte else _of_pieces(content)
