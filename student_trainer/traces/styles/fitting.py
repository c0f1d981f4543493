"""Bounds of a draft from the tokens there are for it.

In: `max_new_tokens`, the teacher's tokenizer, the questions and the caps; out: `Bounds` whose longest document takes no more tokens than there are,
measured by that tokenizer on text as dense as the densest tenth of the questions. What is denser still (a teacher that writes digits without end)
may run out of tokens and is then rejected as `unfinished`. Nothing here looks at a teacher.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from student_trainer.config.traces import Style
from student_trainer.data.trace_schema import Caps
from student_trainer.errors import ConfigError
from student_trainer.traces.questions import Question
from student_trainer.traces.styles.bounds import Bounds
from student_trainer.traces.styles.json_text import longest_document

# Teachers split words otherwise than their tokenizer would: so many tokens more than it counts are set aside.
MARGIN = 0.15
# (steps, characters of each): the first pair that fits decides how long a step is; then come as many as fit.
_WANTED = ((6, 160), (4, 120), (3, 80), (2, 48), (2, 24))
_LEAST_CHARS = 12  # of a step or a quote
_SAMPLE_QUESTIONS = 256
_FILLING_CHARS = 2_000
_LEAST_ANSWER_CHARS, _UNKNOWN_ANSWER_CHARS = 24, 64
_MANY_STEPS = 6  # from here on each step may have two quotes
_LONGEST_QUOTE_CHARS = 120


def fit_bounds(style: Style, max_new_tokens: int, tokenizer: Any, questions: Sequence[Question], caps: Caps) -> Bounds:
    """The bounds of a style in JSON for a budget: as many steps as leave each a good length, then as long as fits.

    Args:
        max_new_tokens: of one sample, its end included.
        tokenizer: the teacher's.
        questions: at least one.
        caps: nothing is longer than these.

    Raises:
        ConfigError: not even one short step fits; says how many tokens would do.
    """
    filling = _filling(tokenizer, questions)

    def cost(bounds: Bounds) -> int:
        text = json.dumps(longest_document(bounds, filling), ensure_ascii=False, separators=(",", ":"))
        return int((1 + MARGIN) * len(_ids(tokenizer, text))) + 1

    first = _smallest(style, questions, caps, max_new_tokens, cost)
    found = _most_steps(first, caps, max_new_tokens, cost)
    if found is None:
        raise ConfigError(
            f"sampling.max_new_tokens={max_new_tokens} is too few for the shortest draft of style {style}: {cost(first)} tokens hold one step of "
            f"{first.step_chars} characters and an answer of {first.answer_chars}; raise it, or choose style=free"
        )
    steps = found.steps
    step_chars = _largest(
        lambda chars: cost(_with_steps(first, steps, chars, caps)) <= max_new_tokens, found.step_chars, caps.step_bytes
    )
    found = _with_steps(first, steps, step_chars, caps)
    return replace(found, needed_tokens=cost(found))


def caps_as_bounds(style: Style, questions: Sequence[Question], caps: Caps) -> Bounds:
    """The caps themselves, for a teacher that is known to keep short by itself."""
    return Bounds(
        style, caps.steps, caps.step_bytes, caps.evidence, min(caps.evidence, caps.steps), caps.evidence_bytes,
        caps.answer_bytes, _last_offset(questions),
    )  # fmt: skip


def too_long_answers(questions: Sequence[Question], bounds: Bounds) -> int:
    """Questions whose known answer is longer than any that a draft may hold."""
    return sum(question.gold is not None and len(question.gold) > bounds.answer_chars for question in questions)


def _smallest(
    style: Style, questions: Sequence[Question], caps: Caps, budget: int, cost: Callable[[Bounds], int]
) -> Bounds:
    """One short step, and an answer as long as the longest known one, if that leaves half of the tokens."""
    least = min(_LEAST_CHARS, caps.step_bytes)
    known = [len(question.gold) for question in questions if question.gold is not None]
    wanted = max(_LEAST_ANSWER_CHARS, max(known)) if known else _UNKNOWN_ANSWER_CHARS
    bounds = Bounds(style, 1, least, 1, 1, least, 1, _last_offset(questions))
    bare = cost(bounds)
    room = max(_LEAST_ANSWER_CHARS, _largest(
        lambda chars: cost(replace(bounds, answer_chars=chars)) - bare <= budget // 2, 1, max(wanted, 1)
    ))  # fmt: skip
    return replace(bounds, answer_chars=min(wanted, room, caps.answer_bytes))


def _most_steps(first: Bounds, caps: Caps, budget: int, cost: Callable[[Bounds], int]) -> Bounds | None:
    for fewest, wanted in _WANTED:
        fewest, chars = min(fewest, caps.steps), min(wanted, caps.step_bytes)
        fits = lambda count, chars=chars: cost(_with_steps(first, count, chars, caps)) <= budget  # noqa: E731
        if fits(fewest):
            return _with_steps(first, _largest(fits, fewest, caps.steps), chars, caps)
    return first if cost(first) <= budget else None


def _with_steps(bounds: Bounds, steps: int, step_chars: int, caps: Caps) -> Bounds:
    """The bounds for so many steps of so many characters, quotes in proportion."""
    if bounds.style == "steps":
        return replace(bounds, steps=steps, step_chars=step_chars, references=0, evidence=0)
    references = 2 if steps >= (2 if bounds.style == "offsets" else _MANY_STEPS) else 1
    quote_chars = min(max(_LEAST_CHARS, step_chars // 2), _LONGEST_QUOTE_CHARS, caps.evidence_bytes)
    evidence = min(caps.evidence, steps * references)
    return replace(
        bounds, steps=steps, step_chars=step_chars, references=references, quote_chars=quote_chars, evidence=evidence
    )


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from `low` on, which fits or is the least there is, that fits, at most `high`; fitting ends once."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _last_offset(questions: Sequence[Question]) -> int:
    return max(len(question.prompt.encode()) for question in questions)


def _filling(tokenizer: Any, questions: Sequence[Question]) -> str:
    """Text of the densest tenth of the questions (most tokens per character), without what a bounded JSON string cannot hold."""
    stride = max(1, len(questions) // _SAMPLE_QUESTIONS)
    texts = {" ".join(question.prompt.translate(_PLAIN).split())[:_FILLING_CHARS] for question in questions[::stride]}
    ranked = sorted(
        (text for text in texts if text), key=lambda text: (-len(_ids(tokenizer, text)) / len(text), text)
    ) or ["7"]
    return " ".join(ranked[: max(1, len(ranked) // 10)])[:_FILLING_CHARS] + " "


_PLAIN = {ord('"'): " ", ord("\\"): " "} | dict.fromkeys(range(32), " ")


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
