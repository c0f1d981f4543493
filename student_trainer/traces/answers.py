"""Short final answers in one spelling, and whether two of them are certainly the same.

In: what a teacher or a data set wrote, such as `**$1,234.50**`, `\\boxed{\\frac{1}{2}}`, `x = −3`; out: a canonical text. Values are exact
fractions: nothing is rounded, converted between units or computed. What is not certainly equal is different.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_MAX_CHARS = 1_000  # longer answers are prose: only case and white space are folded
_MAX_DIGITS = 60
_CHARACTERS = str.maketrans(
    {"−": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-", "⁄": "/", "∕": "/", "＝": "=", "，": ",", "．": ".", "％": "%", "×": "*", "⋅": "*",
     "∼": "~", "≃": "≈", "≅": "≈", "＄": "$", "µ": "μ", "º": "°"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_VULGAR = {c: unicodedata.normalize("NFKC", c).replace("\u2044", "/") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_GROUPS = re.compile(r"(?<=\d)(?:[\u00a0\u2009\u202f\u2007'’_]|\\,|\\!|\{,\}|\\ )(?=\d{3}(?!\d))")
_WORDY = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"(?P<whole>\d\s*)?\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_LATEX = [
    (re.compile(r"\\(?:left|right|displaystyle|!|,|;|:|>|quad)(?![a-zA-Z])\s*"), " "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\^\s*\{\s*([-+]?\w+)\s*\}"), r"^\1"),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\approx(?![a-zA-Z])"), "≈"),
    (re.compile(r"\\pi(?![a-zA-Z])"), "π"),
    (re.compile(r"\\infty(?![a-zA-Z])"), "∞"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
]  # fmt: skip
_WRAPPED = [("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"),
            ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»")]  # fmt: skip
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is:?|:) (?=\S)|(?:≈|~|approx\.?|approximately) ?(?=[-+$€£¥₹]*\.?\d)"
)
_NAMED = re.compile(r"([^\W\d_][\w']{0,11}) ?= ?(?=\S)([^=<>]+)\Z")
_NUMBER = re.compile(r"((?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d{3}){2,}|\d*))(?:\.(\d*))?")
_CURRENCIES = {"$": "$", "us$": "$", "usd": "$", "€": "€", "eur": "€", "£": "£", "gbp": "£", "¥": "¥", "₹": "₹"}
_UNITS = _CURRENCIES | {"%": "%", "°": "°", "dollar": "$", "dollars": "$", "euro": "€", "euros": "€", "percent": "%", "per cent": "%", "pct": "%",
                        "degree": "°", "degrees": "°"}  # fmt: skip
_MONEY = re.compile(r"(us\$|[$€£¥₹]|(?:usd|eur|gbp)(?= ?[-+.\d])) ?")
_UNIT = re.compile(r"[%°$€£¥₹μ]|(?:(?:°|μ)?[^\W\d_]+(?:\^-?\d)?[./ ]?(?:per )?){1,3}")
# After a number these change its value, or say more than a unit does.
_NO_UNITS = frozenset(
    ["hundred", "thousand", "million", "billion", "trillion", "k", "m", "mio", "mn", "bn", "dozen", "score", "gross", "half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth", "fifths", "tenth", "tenths", "hundredth", "hundredths", "thousandth", "thousandths", "squared", "cubed", "minus", "plus", "times", "divided", "pi", "i", "e", "x", "y", "z", "n", "a", "b", "c", "or", "and", "to", "over", "root", "factorial", "sqrt", "mod", "below", "above", "under", "less", "fewer", "more", "negative", "not", "except", "about", "nor", "remainder", "rem", "r", "than", "zero", "one", "two", "three", "point"]
)  # fmt: skip
_LETTER_UNITS = frozenset(["m", "g", "s", "h", "l", "v", "w", "j", "n"])  # after a space; "5m" may be algebra


@dataclass(frozen=True)
class _Quantity:
    """A number, its unit ("" if it has none), and what it is the value of."""

    value: Fraction
    unit: str = ""


def normalize_answer(text: str) -> str:
    """What answers are compared by: composition, case, white space and markup folded, numbers and units in one spelling."""
    name, body = _named(_folded(text))
    quantity = _quantity(body)
    if quantity is not None:
        body = _decimal(quantity.value) + (f" {quantity.unit}" if quantity.unit else "")
    return (f"{name} = {body}" if name else body) or text


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are certainly the same.

    One of two may leave out the name (`x = 4` and `4`) or the unit (`18 eggs` and `18`; `50%` and `0.5`, or `50`, which can be no share). Two
    names or two units must be the same.
    """
    first, second = normalize_answer(one), normalize_answer(other)
    if first == second:
        return True
    (name, first), (other_name, second) = _named(first), _named(second)
    if name and other_name and name != other_name:
        return False
    a, b = _quantity(first), _quantity(second)
    if a is None or b is None:
        return first == second
    if a.unit and b.unit:
        return a.value == b.value and a.unit.removesuffix("s") == b.unit.removesuffix("s")
    if "%" in (a.unit, b.unit):
        share, bare = (a.value, b.value) if a.unit else (b.value, a.value)
        return share / 100 == bare or (share == bare and abs(bare) > 1)
    return a.value == b.value


def majority_answer(answers: Sequence[str]) -> tuple[str, int] | None:
    """The normalised answer that most agree with, and how many; None if there is none, or two share the first place."""
    counts = Counter(answers)
    support = {answer: sum(count for other, count in counts.items() if same_answer(answer, other)) for answer in counts}
    ranked = sorted(counts, key=lambda answer: (-support[answer], -counts[answer]))
    rivals = [answer for answer in ranked[1:] if support[answer] == support[ranked[0]]]
    if not ranked or any(not same_answer(ranked[0], rival) for rival in rivals):
        return None
    return ranked[0], support[ranked[0]]


def _folded(text: str) -> str:
    """Composition, case, white space and markup folded; a last full stop off."""
    text = unicodedata.normalize("NFC", text)
    if len(text) <= _MAX_CHARS:
        text = _GROUPS.sub("", text).translate(_CHARACTERS)
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
        text = re.sub(f"(\\d?) ?([{''.join(_VULGAR)}])", lambda found: f"{found[1]} {_VULGAR[found[2]]}".strip(), text)
        text = _without_latex(text)
    before, folded = None, " ".join(text.casefold().split())
    while before != folded and len(folded) <= _MAX_CHARS:
        before = folded
        folded = _unwrapped(folded.removesuffix(".").strip() or folded)
        folded = folded[found.end() :] if (found := _LEAD_IN.match(folded)) else folded
    return folded if len(folded) <= _MAX_CHARS else folded.removesuffix(".").strip() or folded


def _without_latex(text: str) -> str:
    text = _boxed(text)
    for _ in range(8):  # nested as deep as anybody writes an answer
        before = text
        text = _WORDY.sub(r" \1 ", text)
        text = _FRACTION.sub(
            lambda found: (
                f"{found['whole'] or ''} {_in_brackets(found[2] or found[3] or '')}/{_in_brackets(found[4] or found[5] or '')}"
            ),
            text,
        )
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
        if text == before:
            break
    return text


def _in_brackets(part: str) -> str:
    part = part.strip()
    return part if re.fullmatch(r"-?[\w.]*", part) else f"({part})"


def _boxed(text: str) -> str:
    """The inside of the only `\\boxed{...}` in a text; the text as it is if there is none, or another number of them."""
    if len(re.findall(r"\\f?box(?:ed)?\s*\{", text)) != 1:
        return text
    start = re.search(r"\\f?box(?:ed)?\s*\{", text)
    assert start is not None
    depth, at = 1, start.end()
    while at < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return text[start.end() : at - 1] if not depth else text


def _unwrapped(text: str) -> str:
    for left, right in _WRAPPED:
        inner = text[len(left) : len(text) - len(right)]
        if (
            text.startswith(left)
            and text.endswith(right)
            and inner.strip()
            and left not in inner
            and right not in inner
        ):
            return inner.strip()
    found = re.fullmatch(r"\(([a-z])\)", text)  # a choice
    return found[1] if found else text


def _named(text: str) -> tuple[str, str]:
    """`x` and `4` of `x = 4`; no name for anything else."""
    found = _NAMED.match(text) if len(text) <= _MAX_CHARS else None
    return (found[1], found[2].strip()) if found else ("", text)


def _quantity(text: str) -> _Quantity | None:
    """The number with its unit that a text is; None if it is anything else."""
    if len(text) > _MAX_CHARS:
        return None
    sign, rest = _sign(text)
    money = _MONEY.match(rest)
    rest = rest[money.end() :] if money else rest
    if money and not sign:
        sign, rest = _sign(rest)
    value, rest = _value(rest)
    if value is None:
        return None
    spaced, unit = rest[:1] == " ", rest.strip()
    if unit and not money and not _is_unit(unit, spaced):
        return None
    if money and unit and _UNITS.get(unit) != _CURRENCIES[money[1]]:
        return None
    unit = _CURRENCIES[money[1]] if money else _UNITS.get(unit, unit)
    return _Quantity(-value if sign == "-" else value, unit)


def _sign(text: str) -> tuple[str, str]:
    return (text[0], text[1:].lstrip()) if text[:1] in ("-", "+") else ("", text)


def _is_unit(unit: str, spaced: bool) -> bool:
    if unit in _UNITS:
        return True
    words = re.split(r"[ /.^]", unit)
    if len(unit) == 1:
        return spaced and unit in _LETTER_UNITS
    return (
        bool(_UNIT.fullmatch(unit))
        and not _NO_UNITS.intersection(words[:1])
        and not _NO_UNITS.intersection(word for word in words[1:] if len(word) > 1)
    )


def _value(text: str) -> tuple[Fraction | None, str]:
    """The number that a text begins with (`1,234.5`, `.5`, `1/2`, `2 1/2`), and what follows it."""
    found = _NUMBER.match(text)
    if found is None or not any(c.isascii() and c.isdigit() for c in found[0]) or len(found[0]) > _MAX_DIGITS:
        return None, text
    if any(c.isdigit() and not c.isascii() for c in found[0]):
        return None, text
    whole = found[1].replace(",", "")
    whole = whole.replace(".", "") if whole.count(".") > 1 else whole
    value, rest = Fraction(f"{whole or '0'}.{found[2] or '0'}"), text[found.end() :]
    if found[2] is None and (over := re.match(r" ?/ ?(\d{1,15})(?![.,]?\d)", rest)) and int(over[1]):
        return value / int(over[1]), rest[over.end() :]
    if (
        found[2] is None
        and (more := re.match(r" (\d{1,15}) ?/ ?(\d{1,15})(?![.,]?\d)", rest))
        and int(more[2]) > int(more[1])
    ):
        return value + Fraction(int(more[1]), int(more[2])), rest[more.end() :]
    return value, rest


def _decimal(value: Fraction) -> str:
    """Digits if they end, else p/q."""
    if value.denominator == 1:
        return str(value.numerator)
    places, left = 0, value.denominator
    for prime in (2, 5):
        count = 0
        while left % prime == 0:
            left, count = left // prime, count + 1
        places = max(places, count)
    if left != 1 or places > _MAX_DIGITS:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
