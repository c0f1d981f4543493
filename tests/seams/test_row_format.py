"""A row format of one's own: one parser, and one line in `formats.FORMATS`; recognised, mapped, named and refused as all others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows import formats
from student_trainer.data.rows.conversations import Conversation, Row, Turn
from student_trainer.data.rows.formats import FORMATS, Format
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.messages import checked_text
from student_trainer.data.rows.sources import DataSource
from student_trainer.errors import DataError
from tests.student_trainer.data.tiny_tokenizers import tokenizer

# ---------------------------------------------------------------- the plug-in


def parse_script(row: Row, system_prompt: str) -> Conversation:
    """`{script: "Q: ...\\nA: ..."}`: lines of a dialogue, each behind the letter of who speaks."""
    turns = [Turn("system", system_prompt)] if system_prompt else []
    for line in checked_text(row, row.fields["script"], "script").splitlines():
        who, _, said = line.partition(": ")
        if who not in ("Q", "A"):
            raise row.error("every line must begin with 'Q: ' or 'A: '", "script", line)
        turns.append(Turn("user" if who == "Q" else "assistant", said))
    if turns[-1].role != "assistant":
        raise row.error("the last line must be an answer", "script", turns[-1].content)
    return Conversation(tuple(turns))


SCRIPT = Format(lambda fields: "script" in fields, "'script'", parse_script, frozenset({"script"}))

# ---------------------------------------------------------------- the proof


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "script", SCRIPT)


def write(folder: Path, *rows: dict) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_its_rows_are_learned_from(tmp_path, registered):
    path = write(tmp_path, {"script": "Q: a cat\nA: sat\nQ: on\nA: a mat"}, {"script": "Q: x\nA: y", "page": 7})
    tok, intake = tokenizer("chatml"), Intake()
    data = build_dataset([DataSource(path)], tok, max_tokens=99, system_prompt="Go on.", intake=intake)
    shown = [tok.decode(item.example.token_ids[item.example.loss_mask]) for item in data]
    assert shown == ["sat<|im_end|>a mat<|im_end|>", "y<|im_end|>"]
    assert tok.decode(data[1].example.token_ids).startswith("<|im_start|>system\nGo on.<|im_end|>")
    assert intake.sources[0].told.endswith("2 rows, script; not used: page")


def test_another_name_of_its_field_is_mapped(tmp_path, registered):
    path = write(tmp_path, {"dialogue": "Q: x\nA: y"})
    assert (
        len(build_dataset([DataSource(path, columns={"dialogue": "script"})], tokenizer("chatml"), max_tokens=99)) == 1
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"script": "Q: x\nB: y"}, r"rows\.jsonl:1: every line must begin with 'Q: ' or 'A: ' \(field=script"),
        ({"script": "Q: x"}, r"rows\.jsonl:1: the last line must be an answer"),
        ({"script": 3}, r"rows\.jsonl:1: .*field=script"),
        ({"script": "Q: x\nA: y", "images": ["a.png"]}, "is not used: rows of text alone"),
        ({"script": "Q: x\nA: y", "messages": []}, r"fits more than one format \(messages, script\)"),
        (
            {"script": "Q: x\nA: y", "instruction": "x", "output": "y"},
            r"fits more than one format \(instruction, script\)",
        ),
        ({"text": "x"}, "plain text"),
    ],
)
def test_what_it_does_not_understand_is_refused_by_name(tmp_path, registered, row, said):
    with pytest.raises(DataError, match=said):
        build_dataset([DataSource(write(tmp_path, row))], tokenizer("chatml"), max_tokens=99)


def test_without_the_line_nobody_knows_it(tmp_path):
    with pytest.raises(DataError, match="fits no format"):
        build_dataset([DataSource(write(tmp_path, {"script": "Q: x\nA: y"}))], tokenizer("chatml"), max_tokens=99)
    assert "script" not in formats.known_fields()
