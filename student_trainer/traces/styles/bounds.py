"""How long each part of a draft may be.

Counts of a grammar's lists, and characters of its strings (Unicode code points, as JSON Schema counts them).
"""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.config.traces import Style


@dataclass(frozen=True)
class Bounds:
    """The longest draft.

    Attributes:
        style: one of those in JSON.
        steps, step_chars: how many, and how long each text is.
        evidence: quotes in the list of style `offsets`; other styles have none beside those of the steps.
        references: quotes of a step, or ids of quotes and of earlier steps; style `steps` has none.
        quote_chars, answer_chars: of one quote, and of the answer.
        offset: the largest offset, in bytes.
        needed_tokens: the longest draft, in tokens of text like the questions, the margin included; 0 if nobody has counted.
    """

    style: Style
    steps: int
    step_chars: int
    evidence: int
    references: int
    quote_chars: int
    answer_chars: int
    offset: int
    needed_tokens: int = 0

    def describe(self) -> str:
        """One clause."""
        quotes = f"quotes of {self.quote_chars} ({self.references} per step), " * (self.style != "steps")
        return f"at most {self.steps} steps of {self.step_chars} characters, {quotes}an answer of {self.answer_chars}"
