"""Kind: rows that cannot be learned from among many that can (LLaMA-Factory#5521, OpenRLHF#134): named, or skipped, counted and kept."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from student_trainer.data.dataset import build_dataset
from student_trainer.data.inputs import load_data
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.sources import DataSource
from student_trainer.errors import DataError
from student_trainer.training.run import train
from tests.cases.material import INPUTS, case_config
from tests.student_trainer.data.tiny_tokenizers import tokenizer

GOOD = [{"instruction": f"Name pet {i}.", "output": "a cat"} for i in range(4)]
BAD = [
    ('{"instruction": "cut o', "ends in the middle"),
    ('["instruction", "hi"]', "must be an object, not list"),
    (json.dumps({"instruction": "no answer"}), "missing field (field=output)"),
    (json.dumps({"instruction": "hi", "output": "a", "images": ["x.png"]}), "is not used"),
    (json.dumps({"instruction": "hi", "output": "\ud800"}), "surrogate"),
    (json.dumps({"instruction": "hi", "output": "a", "weight": 0}), "nothing to train"),
    (json.dumps({"messages": [{"role": "user", "content": "q"}]}), "a row of format messages in a source of format instruction"),
    ('{"instruction": "hi", "instruction": "ho", "output": "a"}', "stands twice"),
]  # fmt: skip


def mixed(path: Path) -> Path:
    """Bad rows on the odd lines, the first row among them; good ones on the even."""
    lines = [line for i, (bad, _) in enumerate(BAD) for line in (bad, json.dumps(GOOD[i % len(GOOD)]))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_rows_end_the_reading_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*ends in the middle"):
        build_dataset([DataSource(str(mixed(tmp_path / "rows.jsonl")))], tokenizer("chatml"), max_tokens=99)


def test_skipped_rows_are_counted_and_kept_with_their_reasons(tmp_path: Path) -> None:
    path, intake = mixed(tmp_path / "rows.jsonl"), Intake("skip")
    data = build_dataset([DataSource(str(path))], tokenizer("chatml"), max_tokens=99, intake=intake)
    assert [item.example.key for item in data] == [f"{path}:{2 * i + 2}" for i in range(len(BAD))]
    found = {row.line: row.reason for row in data.bad_rows}
    assert sorted(found) == [2 * i + 1 for i in range(len(BAD))]
    for i, (_, says) in enumerate(BAD):
        assert says in found[2 * i + 1] and str(path) not in found[2 * i + 1]
    assert [facts.rows for facts in intake.sources] == [len(BAD)]


def test_the_run_keeps_them_in_its_folder_and_says_so(tmp_path: Path) -> None:
    path = mixed(tmp_path / "rows.jsonl")
    shown = Console(file=io.StringIO(), width=80)
    config = case_config(tmp_path, f"data.train={path}", f"data.eval={path}", "data.bad_rows=skip", "train.max_steps=1")
    result = train(config, console=shown)
    told = shown.file.getvalue()  # type: ignore[attr-defined]
    assert f"data.train[0] {path}: 8 rows, instruction\n" in told
    assert f"note: data.train: 8 bad rows skipped, the first {path}:1: invalid JSON" in told
    assert f"the 16 bad rows are in {result.output_dir / 'bad_rows.jsonl'}" in told
    kept = [json.loads(line) for line in (result.output_dir / "bad_rows.jsonl").read_text().splitlines()]
    assert len(kept) == 16 and {tuple(row) for row in kept} == {("file", "line", "reason", "row")}
    assert {row["file"] for row in kept} == {str(path)}
    texts = {row["line"]: row["row"] for row in kept}
    assert texts[1] == BAD[0][0] and texts[5] == {"instruction": "no answer"} and texts[9]["output"] == "\ud800"


def test_a_run_without_bad_rows_has_no_such_file(tmp_path: Path) -> None:
    result = train(
        case_config(tmp_path, "data.bad_rows=skip", "train.max_steps=1"), console=Console(file=io.StringIO())
    )
    assert not (result.output_dir / "bad_rows.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense\nmore of it\n", r"rows\.jsonl: all 2 rows are bad; line 1: invalid JSON"),
        ('{"instruction": "x"}\n', r"rows\.jsonl: all 1 rows are bad; line 1: missing field"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b"}\n', "a preference row"),
    ],
)
def test_nothing_left_is_an_error(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        build_dataset([DataSource(str(path))], tokenizer("chatml"), max_tokens=99, intake=Intake("skip"))


def test_what_the_template_refuses_is_a_bad_row_as_well(tmp_path: Path) -> None:
    picky = tokenizer("chatml")
    before = picky.chat_template
    picky.chat_template = "{% if 'no' in messages[0]['content'] %}{{ raise_exception('not that') }}{% endif %}" + before
    try:
        path = tmp_path / "rows.jsonl"
        rows = [{"instruction": said, "output": "a"} for said in ("yes", "no", "yes", "no")]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = build_dataset([DataSource(str(path))], picky, max_tokens=99, intake=Intake("skip"))
        assert len(data) == 2 and [(row.line, row.row) for row in data.bad_rows] == [(2, rows[1]), (4, rows[3])]
        path.write_text(json.dumps(rows[1]))
        with pytest.raises(DataError, match=r"all 1 rows are bad; line 1: .*not that"):
            build_dataset([DataSource(str(path))], picky, max_tokens=99, intake=Intake("skip"))
    finally:
        picky.chat_template = before


def test_a_trace_that_lies_is_a_bad_row(tmp_path: Path) -> None:
    [good] = (INPUTS / "traces.jsonl").read_text().splitlines()
    row = json.loads(good)
    row["conversation"][0]["content"] += "!"
    path = tmp_path / "traces.jsonl"
    path.write_text(f"{json.dumps(row)}\n{good}\n")
    data = build_dataset([DataSource(str(path))], tokenizer("chatml"), max_tokens=400, intake=Intake("skip"))
    assert [row.line for row in data.bad_rows] == [1] and "another prompt" in data.bad_rows[0].reason
    assert len(data) == 2


def test_one_line_tells_what_each_source_holds(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q", "turn_id": 1}, {"role": "assistant", "content": "a", "lang": "en"}]
    files = {
        "a.jsonl": [{**GOOD[0], "id": 7, "source": "web", "text": "rendered", "empty": ""}] * 1234,
        "b.jsonl": [{"messages": talk, "split": "train"}],
        "c[bold].jsonl": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d.json").write_text((INPUTS / "lines.json").read_text())
    shown = Console(file=io.StringIO(), width=60)
    sources = ", ".join(f"'{tmp_path / name}'" for name in (*files, "d.json"))
    load_data(case_config(tmp_path, f"data.train=[{sources}]").data, tokenizer("chatml"), shown)
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[:4] == [
        f"data.train[0] {tmp_path}/a.jsonl: 1,234 rows, instruction; not used: id, source, text",
        f"data.train[1] {tmp_path}/b.jsonl: 1 row, messages; not used: messages[].lang, messages[].turn_id, split",
        f"data.train[2] {tmp_path}/c[bold].jsonl: 1 row, sharegpt",
        f"data.train[3] {tmp_path}/d.json: 2 rows, instruction; it holds JSON Lines, which its name does not say, and is read as that",
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [("weight.jsonl", "nothing to train"), ("twokeys.jsonl", "stands twice")],
)
def test_cases_04_and_19_are_one_line_that_names_the_field(tmp_path: Path, name: str, says: str) -> None:
    """Tools reach the conversation (test_row_shapes); a template that cannot show them is the templates' to refuse."""
    with pytest.raises(DataError, match=rf"{name}:1: .*{says}"):
        build_dataset([DataSource(str(INPUTS / name))], tokenizer("chatml"), max_tokens=400)
