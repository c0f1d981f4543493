"""A file of questions with four choices, in the format of C-Eval, as a task of lm-evaluation-harness.

In: a .csv, .tsv, .jsonl, .json or .parquet file whose rows have question, A, B, C, D and answer; out: the config of a task that scores the letters
by their likelihood behind the question, with C-Eval's prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from student_trainer.data.rows.files import read_file
from student_trainer.data.rows.formats import Row
from student_trainer.data.rows.intake import Intake
from student_trainer.errors import DataError

LETTERS = ("A", "B", "C", "D")
_FIELDS = ("question", *LETTERS, "answer")
# C-Eval's own prompt (lm_eval/tasks/ceval), and the same for questions that have no Chinese in them.
_TEXT = "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n"
_CHINESE, _ENGLISH = "答案：", "Answer:"


@dataclass(frozen=True)
class ChoiceFile:
    """A read file.

    Attributes:
        name: of the task: the file's stem.
        rows: texts of question, A, B, C, D and the letter of the answer.
        unused: fields that are in no prompt.
    """

    name: str
    rows: tuple[dict[str, str], ...]
    unused: tuple[str, ...]

    @property
    def asks_by(self) -> str:
        """What stands behind the choices: in Chinese where any question has a Chinese character."""
        return _CHINESE if any(_is_chinese(letter) for row in self.rows for letter in row["question"]) else _ENGLISH

    def prompt(self, row: dict[str, str]) -> str:
        """What is asked of one row, as the task renders it."""
        choices = "".join(f"{letter}. {row[letter]}\n" for letter in LETTERS)
        return f"{row['question'].strip()}\n{choices}{self.asks_by}"

    def task(self) -> dict[str, Any]:
        """The config of the task; the rows go with it, so that nothing is loaded by name."""
        return {
            "task": self.name,
            "custom_dataset": partial(_dataset, self.rows),
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": _TEXT + self.asks_by,
            "doc_to_choice": list(LETTERS),
            "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }


def read_choices(path: Path) -> ChoiceFile:
    """Reads and checks all rows.

    Raises:
        DataError: a file that cannot be read, a missing or empty field, or an answer that is none of the letters; with file and line.
    """
    rows = read_file(str(path), path, Intake())
    if not rows:
        raise DataError("holds no question", file=str(path))
    read = [_read(row) for row in rows]
    unused = sorted({name for row in rows for name in row.fields if _known(name) is None})
    return ChoiceFile(path.name.split(".")[0], tuple(read), tuple(unused))


def _read(row: Row) -> dict[str, str]:
    given = {known: value for name, value in row.fields.items() if (known := _known(name)) is not None}
    found = {}
    for field in _FIELDS:
        value = given.get(field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise row.error(f"a question has {', '.join(_FIELDS)}, each a text that is not empty", field, value)
        found[field] = value
    found["answer"] = found["answer"].strip().upper()
    if found["answer"] not in LETTERS:
        raise row.error("must be the letter of the right choice: A, B, C or D", "answer", given["answer"])
    return found


def _known(name: str) -> str | None:
    """The field of ours that a column is: CMMLU writes Question and Answer."""
    if name in LETTERS:
        return name
    return name.lower() if name.lower() in ("question", "answer") else None


def _is_chinese(letter: str) -> bool:
    return "\u4e00" <= letter <= "\u9fff"


def _dataset(rows: tuple[dict[str, str], ...], **metadata: Any) -> Any:
    """What lm-eval takes for a data set; it hands over the task's metadata."""
    import datasets

    return datasets.DatasetDict({"test": datasets.Dataset.from_list(list(rows))})
