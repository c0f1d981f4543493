"""Simple questions with known answers, made from templates, for measuring what a small teacher's traces are worth.

In: how many, and a seed; out: `{"prompt", "answer"}` rows, the same for ever. Half of them need a small sum, half a word or number that stands in
the text. Run as a program it writes them to a file:

    python -m tests.bench.trace_questions --count 200 --out questions.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack")
THINGS = ("apples", "books", "pencils", "stamps", "marbles", "cards", "shells", "coins")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown")
CITIES = ("Oslo", "Rome", "Paris", "Madrid", "Berlin", "London", "Vienna", "Lisbon")
ANIMALS = ("cat", "dog", "horse", "rabbit", "parrot", "goat")
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

Pair = tuple[str, str]


def questions(count: int, seed: int = 18) -> list[Pair]:
    """`count` different (prompt, answer), the kinds in turn."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    number = 0
    while len(found) < count:
        prompt, answer = KINDS[number % len(KINDS)](draw)
        number += prompt not in found
        found.setdefault(prompt, answer)
    return list(found.items())


def _sum(draw: random.Random) -> Pair:
    name, thing, a, b = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, 20), draw.randint(2, 20)
    return f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?", str(a + b)


def _lives(draw: random.Random) -> Pair:
    one, other = draw.sample(NAMES, 2)
    here, there = draw.sample(CITIES, 2)
    return f"{one} lives in {here} and {other} lives in {there}. In which city does {other} live?", there


def _difference(draw: random.Random) -> Pair:
    name, thing, a = draw.choice(NAMES), draw.choice(THINGS), draw.randint(8, 30)
    b = draw.randint(2, a - 2)
    return f"{name} had {a} {thing} and gave away {b} of them. How many {thing} are left?", str(a - b)


def _colour(draw: random.Random) -> Pair:
    one, other = draw.sample(NAMES, 2)
    mine, yours = draw.sample(COLOURS, 2)
    asked, colour = draw.choice([(one, mine), (other, yours)])
    return f"{one} has a {mine} bicycle. {other} has a {yours} bicycle. What colour is {asked}'s bicycle?", colour


def _product(draw: random.Random) -> Pair:
    boxes, each, thing = draw.randint(2, 9), draw.randint(2, 9), draw.choice(THINGS)
    return f"There are {boxes} boxes with {each} {thing} in each box. How many {thing} are there in all?", str(
        boxes * each
    )


def _animal(draw: random.Random) -> Pair:
    name, animal, colour, age = draw.choice(NAMES), draw.choice(ANIMALS), draw.choice(COLOURS), draw.randint(2, 15)
    return f"{name} has a {colour} {animal}. It is {age} years old. Which animal does {name} have?", animal


def _price(draw: random.Random) -> Pair:
    name, thing, price, count = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, 12), draw.randint(2, 6)
    return f"{name} buys {count} {thing} for {price} dollars each. How many dollars does {name} pay?", str(
        price * count
    )


def _day(draw: random.Random) -> Pair:
    name, one, other = draw.choice(NAMES), *draw.sample(WEEK, 2)
    return f"{name} swims on {one} and plays chess on {other}. On which day does {name} play chess?", other


KINDS: tuple[Callable[[random.Random], Pair], ...] = (
    _sum, _lives, _difference, _colour, _product, _animal, _price, _day,
)  # fmt: skip


def write(path: Path, count: int, seed: int = 18) -> Path:
    """The questions as a file of format `question`."""
    rows = (json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in questions(count, seed))
    path.write_text("".join(rows))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    write(given.out, given.count, given.seed)
