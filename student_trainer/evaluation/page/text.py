"""Text of strangers on a page: what would not be seen is written out, and what is too long is cut where it says so.

In: any text; out: text that a browser and Markdown show as it is. HTML is escaped by the template, Markdown by `markdown_cell`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# Characters that change what stands around them or cannot be seen: bidi controls, zero widths, C0 and C1 controls, lone surrogates.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn")
_KEPT = "\n\t\u200d\ufe0f"  # the joiner and the selector hold emoji together
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


@dataclass(frozen=True)
class Clipped:
    """Text for a page.

    Attributes:
        text: what is shown.
        left_out: characters that are not.
    """

    text: str
    left_out: int = 0

    @property
    def told(self) -> str:
        """What is missing, in words; empty if nothing is."""
        return f"… {self.left_out:,} more characters are not shown" if self.left_out else ""


def clipped(text: str, limit: int) -> Clipped:
    """The first `limit` characters, seen."""
    return Clipped(seen(text[:limit]), max(0, len(text) - limit))


def seen(text: str) -> str:
    """The same with unseen characters as `[U+202E]`."""
    if text.isascii() and text.isprintable():
        return text
    plain = text.replace("\r\n", "\n")
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _UNSEEN else f"[U+{ord(c):04X}]" for c in plain)


def short(text: object, limit: int = 80) -> str:
    """One line for a cell or a title."""
    line = seen(" ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return (
        _MARKDOWN.sub(r"\\\1", seen(" ".join(text.split())))
        .replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
        .replace("\\&", "&amp;")
    )


def markdown_block(text: str, language: str = "") -> str:
    """Text as a fenced block, whose fence is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{seen(text)}\n{fence}"
