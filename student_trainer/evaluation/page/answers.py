"""Sample answers and evaluations for a report: evaluation.json of `evaluate`, and the files of answers that `infer` writes.

In: a file; out: `Sample`s and `Evaluated` models. Reads only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from student_trainer.errors import DataError
from student_trainer.evaluation.outcome import Evaluated, Sample, first_of

EVALUATION_NAME = "evaluation.json"
ANSWER = "answer"  # what a file of one model's answers calls it


class _Evaluation(BaseModel):
    model_config = ConfigDict(extra="ignore")

    models: list[Evaluated]
    samples: list[Sample] = []


def read_evaluation(file: Path) -> tuple[list[Evaluated], list[Sample]]:
    """The models and sample answers of an evaluation.json, or the answers of a `.jsonl` file of `infer`.

    Raises:
        DataError: it cannot be read, or is neither; names line and entry.
    """
    file = file.expanduser()
    file = file / EVALUATION_NAME if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=str(file)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: {error.reason} at byte {error.start}", file=str(file)) from error
    if file.suffix == ".jsonl":
        return [], [_row(line, file, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    try:
        found = _Evaluation.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"is no {EVALUATION_NAME}: {first_of(error)}", file=str(file)) from error
    return found.models, found.samples


def _row(line: str, file: Path, number: int) -> Sample:
    """A row of `infer`: `messages` with the answer last, or `messages` and the `answers` of several models by name."""
    try:
        row = json.loads(line)
        messages = list(row["messages"])
        if "answers" in row:
            answers = {
                str(name): str(said["text"] if isinstance(said, Mapping) else said)
                for name, said in row["answers"].items()
            }
        else:
            answers = {ANSWER: str(messages.pop()["content"])}
        return Sample(prompt=_prompt(messages), answers=answers)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"is no row of answers as `infer` writes them (messages, and answers where several models were asked): {type(error).__name__} {error}",
            file=str(file),
            line=number,
        ) from error


def _prompt(messages: Sequence[Any]) -> str:
    """The conversation before the answer; one user's turn is its text alone."""
    turns = [(str(message["role"]), str(message.get("content") or "")) for message in messages]
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in turns)
