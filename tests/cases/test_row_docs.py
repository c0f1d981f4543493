"""docs/data/rows.md says what is accepted: its examples are rows of the formats it names, and its tables name what the code knows."""

from __future__ import annotations

import json
import re

import pytest

from student_trainer.data.rows.files import READERS
from student_trainer.data.rows.formats import ANSWERS, FORMATS, Row, detect, parse_rows
from student_trainer.data.rows.messages import CALL_ROLES, FLAG_FIELDS, ROLE_NAMES
from tests.cases.material import ROOT

PAGE = (ROOT / "docs" / "data" / "rows.md").read_text()
EXAMPLES = [
    (name, line)
    for name, block in re.findall(r"```jsonl (\w+)\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_every_example_is_a_row_of_its_format(name: str, line: str) -> None:
    row = Row(json.loads(line), "rows.md", 1)
    assert detect(row) == name
    [conversation] = parse_rows([row])
    assert conversation.turns[-1].role == "assistant"


def test_every_name_is_on_the_page() -> None:
    assert {name for name, _ in EXAMPLES} | {"trace"} == set(FORMATS)
    suffixes = [suffix for suffix in READERS if not suffix.endswith(".gz")]
    for word in (*ANSWERS, *ROLE_NAMES, *CALL_ROLES, *FLAG_FIELDS, *suffixes):
        assert re.search(rf"(?<![\w]){re.escape(word)}(?!\w)", PAGE), word
