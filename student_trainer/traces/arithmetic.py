"""Equations in the text of a step, evaluated again.

In: text such as "so 12 * 3 + 4 = 40"; out: the first equation that is false. Numbers, + - * / and parentheses only:
what it cannot read it leaves alone.
"""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = r"\d{1,15}(?:\.\d{1,15})?"
_OPERATORS = {"×": "*", "·": "*", "÷": "/", "−": "-"}
_RIGHT = re.compile(rf"\s*([-−]?{_NUMBER})(?![\w^%(]|[.,]\d|\s\d{{3}}(?!\d)|\s*[-+*/×·÷−^(]\s*[\w(])")
_MIXED = re.compile(r"\s(\d{1,15})\s?/\s?(\d{1,15})(?![.,]?\d)")  # 7 / 2 = 3 1/2
_REMAINDER = re.compile(
    r",?\s*(?:and |with )?(?:an? )?(?:remainder|rem\.?|rest|r)(?:\s+is|\s+of)?\s*[:=]?\s*(\d{1,15})(?!\w)", re.I
)
# What follows says that the right side is not the value itself.
_NOT_EXACT = re.compile(
    r"[^.\n=]{0,20}?\b(?:remainder|rem|remaining|left(?: ?over)?|rounded|rounding|integer|truncated|floor)\b", re.I
)
_DIVISION = re.compile(r"(.*)[/÷]\s*(\d{1,15})\s*\Z", re.S)
_IN_A_SIDE = frozenset("0123456789. \t+-*/×·÷−()")
_MAX_SIDE_CHARS = 200
# What may stand before an equation. After other words ("half of 20 + 4 = 12") it may mean something else.
_BEFORE = re.compile(
    r"(?:\n|[:;,!?]\s|=\s?|\b(?:so|then|thus|hence|therefore|since|because|is|and|get|gives|have|compute)\s)\Z", re.I
)
_LONGEST_BEFORE = len("therefore ") + 1
_TOKEN = re.compile(rf"\s*({_NUMBER}|[-+*/()])")
_MAX_CHARS = 4096


def false_equation(text: str) -> str:
    """The first equation in `text` that does not hold, or "".

    A right side with decimals may be rounded in its last digit.
    """
    text = text[:_MAX_CHARS]
    for sign in re.finditer("=", text):
        right = _RIGHT.match(text, sign.end())
        begin = _begin_of_side(text, sign.start())
        side = text[begin : sign.start()]
        if right is None or not any(operator in side for operator in "+-*/×·÷−"):
            continue
        if begin and not _BEFORE.search(text[max(0, begin - _LONGEST_BEFORE) : begin]):
            continue
        try:
            value = _evaluate(side)
        except (ValueError, ZeroDivisionError):
            continue
        end = _end_of_false(side, value, right, text)
        if end:
            return text[begin:end].strip()
    return ""


def _end_of_false(side: str, value: Fraction, right: re.Match[str], text: str) -> int:
    """Where an equation ends that does not hold; 0 if it holds, or cannot be read."""
    number, end = right.group(1).replace("−", "-"), right.end()
    stated = Fraction(number)
    if remainder := _REMAINDER.match(text, end):
        division = _DIVISION.match(side)
        if division is None or stated.denominator != 1:
            return 0
        divisor, left = int(division[2]), int(remainder[1])
        holds = _evaluate(division[1]) == stated * divisor + left and left < divisor
        return 0 if holds else remainder.end()
    if (mixed := _MIXED.match(text, end)) and int(mixed[2]):
        part = Fraction(int(mixed[1]), int(mixed[2]))
        return 0 if value == (stated - part if stated < 0 else stated + part) else mixed.end()
    decimals = len(number.partition(".")[2])
    slack = Fraction(1, 2 * 10**decimals) if decimals else 0
    if abs(value - stated) <= slack or _NOT_EXACT.match(text, end):
        return 0
    if re.fullmatch(r"-?\d{1,3}\.\d{3}", number) and value == Fraction(number.replace(".", "")):
        return 0  # a point between thousands
    return end


def _begin_of_side(text: str, end: int) -> int:
    """Where the run of arithmetic before `end` begins; `end` itself if it is too long to be one."""
    begin = end
    while begin and text[begin - 1] in _IN_A_SIDE:
        begin -= 1
    while begin < end and text[begin].isspace():
        begin += 1
    return begin if end - begin <= _MAX_SIDE_CHARS else end


def _evaluate(expression: str) -> Fraction:
    for sign, operator in _OPERATORS.items():
        expression = expression.replace(sign, operator)
    tokens = _TOKEN.findall(expression)
    if sum(map(len, tokens)) != len("".join(expression.split())):
        raise ValueError("something else between the numbers")
    value, rest = _sum(tokens)
    if rest:
        raise ValueError("unbalanced")
    return value


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, rest = _product(tokens)
    while rest and rest[0] in "+-":
        term, after = _product(rest[1:])
        value, rest = (value + term if rest[0] == "+" else value - term), after
    return value, rest


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, rest = _atom(tokens)
    while rest and rest[0] in "*/":
        factor, after = _atom(rest[1:])
        value, rest = (value * factor if rest[0] == "*" else value / factor), after
    return value, rest


def _atom(tokens: list[str]) -> tuple[Fraction, list[str]]:
    if not tokens:
        raise ValueError("ends too early")
    if tokens[0] == "-":
        value, rest = _atom(tokens[1:])
        return -value, rest
    if tokens[0] == "(":
        value, rest = _sum(tokens[1:])
        if not rest or rest[0] != ")":
            raise ValueError("unbalanced")
        return value, rest[1:]
    return Fraction(tokens[0]), tokens[1:]
