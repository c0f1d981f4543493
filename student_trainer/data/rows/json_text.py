"""Strict JSON: what two readers could understand differently is refused, and what is no JSON is called by its name.

In: text or bytes; out: plain data. Must never lose anything: no duplicate keys, no NaN, no number that Python cannot hold.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# First bytes of what people hand over as rows and what is not text, or not theirs to be read.
_LOOKS_LIKE: dict[bytes, str] = {
    b"\x1f\x8b": "gzip; let its name end in .gz",
    b"PAR1": "Parquet; let its name end in .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"ARROW1": "an Arrow file; name the save_to_disk folder that it is from, or write Parquet",
    b"version https://git-lfs": "a Git LFS pointer in place of the file; fetch it with git lfs pull",
    b"<!DOCTYPE": "a web page, not the file that was to be downloaded",
    b"<html": "a web page, not the file that was to be downloaded",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
_WORDS = {"True": "true", "False": "false", "None": "null", "nan": "null", "NaN": "null", "undefined": "null"}


class JsonError(ValueError):
    """The text is not JSON, or not JSON that everybody reads alike.

    Args:
        message: what it looks like, in one line.
        line: of the text, from 1.
    """

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


def foreign(data: bytes) -> str | None:
    """What else than UTF-8 text the bytes of a file look like, or None."""
    for start, name in _LOOKS_LIKE.items():
        if data.startswith(start):
            return name
    if b"\x00" in data[:4]:
        return "UTF-16 or UTF-32 without a byte order mark; save it as UTF-8"
    return None


def parse(text: str) -> Any:
    """The value that `text` writes.

    Raises:
        JsonError: it is none, or an object has a key twice, or a number is NaN, infinite or of thousands of digits.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise JsonError(_diagnosis(text, error), error.lineno) from error
    except RecursionError as error:
        raise JsonError("JSON nested too deeply") from error


def parse_list(text: str) -> list[tuple[Any, int]]:
    """The items of a JSON list, each with the line at which it begins.

    Raises:
        JsonError: as `parse`, with the line of the item at fault; or the value is no list.
    """
    items: list[tuple[Any, int]] = []
    at, line, counted = _skip(text, 0), 1, 0
    if text[at : at + 1] != "[":
        parse(text)
        raise JsonError("not a list")
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise JsonError(_diagnosis(text, error), error.lineno) from error
        except RecursionError as error:
            raise JsonError("JSON nested too deeply", line) from error
        except JsonError as error:
            raise JsonError(str(error), line) from error
        items.append((value, line))
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] == "]":
                raise JsonError("invalid JSON: a comma before ]", 1 + text.count("\n", 0, at))
        elif text[at : at + 1] != "]":
            between = json.JSONDecodeError("Expecting ',' delimiter", text, at)
            raise JsonError(_diagnosis(text, between), between.lineno)
    if (after := _skip(text, at + 1)) < len(text):
        raise JsonError("invalid JSON: something follows the list", 1 + text.count("\n", 0, after))
    return items


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _diagnosis(text: str, error: json.JSONDecodeError) -> str:
    """What broken JSON looks like, most often."""
    at, rest = error.pos, text[error.pos :].lstrip()
    place = f"invalid JSON at column {error.colno}"
    if re.match(r"\s*[\[{]\s*'", text) or rest.startswith("'"):
        return f"{place}: single quotes: it looks like a Python object printed with str(); write it with json.dumps"
    for word, right in _WORDS.items():
        if rest.startswith(word):
            return f"{place}: {word} is no JSON; write {right}"
    if rest.startswith(("//", "/*", "#")):
        return f"{place}: a comment; JSON has none"
    before = text[:at].rstrip()
    if rest[:1] in ("}", "]") and before.endswith(","):
        return f"{place}: a comma before {rest[0]}"
    if "trailing comma" in error.msg:  # Python 3.13 points at the comma itself
        return f"{place}: a comma before the closing bracket"
    if error.msg == "Extra data":
        if rest[:1] == ",":
            return f"{place}: a comma behind the object; the rows of a JSON list without its brackets, perhaps"
        return f"{place}: more than one value" + (" on the line" if "\n" not in text.strip() else "")
    if not rest or error.msg.startswith("Unterminated string"):
        return f"{place}: ends in the middle of a value: cut off, or written over several lines"
    if "Invalid control character" in error.msg:
        return f"{place}: a line break or another control character inside a string; write it as \\n"
    return f"{place}: {error.msg}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {twice!r} stands twice in one object, and only one of its values could be used")
    return made


def _constant(word: str) -> Any:
    raise JsonError(f"{word} is no JSON number; write null, or leave the field out")


def _integer(digits: str) -> int:
    if len(digits) > 4_000:  # Python's own limit is 4,300
        raise JsonError(f"a number of {len(digits):,} digits; write it as a string")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"the number {digits[:40]} is above what a float can hold; write it as a string")
    return value


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_real, strict=True
)
