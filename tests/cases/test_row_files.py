"""Kinds: files that break (helm#1381, ChatGLM-6B#1196), paths with # and ~ (robomimic#36), folders, tables, and what is one source.

Each refusal is one line that says what the file looks like.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from student_trainer.config.files import read_tree
from student_trainer.config.run import parse_config
from student_trainer.config.traces import load_traces_config
from student_trainer.data.inputs import source_of
from student_trainer.data.rows.formats import parse_rows
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.sources import DataSource, parse_source, read_source
from student_trainer.errors import ConfigError, DataError
from tests.cases.material import INPUTS, base_file, case_config

ROW = {"instruction": "Name a pet.", "output": "a cat"}
LINE = json.dumps(ROW)


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path: object, **more: object) -> list[dict]:
    return [dict(row.fields) for row in read_source(DataSource(str(path), **more))]  # type: ignore[arg-type]


BROKEN = [
    ("a.jsonl", '{"a": 1, "b": 2, "a": 3}', 1, "the key 'a' stands twice"),
    ("a.jsonl", '{"a": {"x": 1, "x": 1}}', 1, "the key 'x' stands twice"),
    ("a.json", '[{"a": 1},\n\n {"a": 1,\n "a": 2}]', 3, "the key 'a' stands twice"),
    ("a.jsonl", LINE + '\n{"id": ' + "7" * 5_000 + "}", 2, "a number of 5,000 digits"),
    ("a.json", '[{"id": -' + "7" * 5_000 + "}]", 1, "digits; write it as a string"),
    ("a.jsonl", '{"id": 1e999}', 1, "above what a float can hold"),
    ("a.jsonl", '{"score": NaN}', 1, "NaN is no JSON number"),
    ("a.jsonl", '{"score": -Infinity}', 1, "-Infinity is no JSON number"),
    ("a.jsonl", "{'instruction': 'hi', 'output': 'a'}", 1, "looks like a Python object"),
    ("a.jsonl", '{"a": True}', 1, "True is no JSON; write true"),
    ("a.json", '[{"a": None}]', 1, "None is no JSON; write null"),
    ("a.jsonl", '{"a": 1,}', 1, "comma before"),
    ("a.json", '[{"a": 1},\n]', 2, "a comma before ]"),
    ("a.json", '[{"a": 1}', 1, "ends in the middle"),
    ("a.json", '[{"a": 1}\n {"a": 2}]', 2, "Expecting ','"),
    ("a.json", '[{"a": 1}] {}', 1, "something follows the list"),
    ("a.jsonl", f'{LINE}\n{{"instruction": "Name', 2, "ends in the middle of a value: cut off"),
    ("a.jsonl", '{\n  "a": 1\n}\n', 1, "written over several lines"),
    ("a.jsonl", f"{LINE},\n{LINE}\n", 1, "a comma behind the object"),
    ("a.jsonl", f"{LINE}{LINE}\n", 1, "more than one value on the line"),
    ("a.jsonl", f"// rows\n{LINE}\n", 1, "a comment"),
    ("a.jsonl", '{"a": "x\ty"}', 1, "control character"),
    ("a.jsonl", LINE.encode("utf-16"), 0, "looks like UTF-16"),
    ("a.json", LINE.encode("utf-16-le"), 0, "looks like UTF-16"),
    ("a.csv", "a,b\n1,2\n".encode("utf-16-be"), 0, "looks like UTF-16"),
    ("a.jsonl", '{"a": "é"}'.encode("latin-1"), 1, "not UTF-8 at byte 7"),
    ("a.jsonl", gzip.compress(LINE.encode(), mtime=0), 0, "looks like gzip"),
    ("a.jsonl", b"PAR1....", 0, "looks like Parquet"),
    ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", 0, "a Git LFS pointer"),
    ("a.jsonl", "<!DOCTYPE html><html>", 0, "a web page"),
    ("a.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)[:-9], 0, "no whole gzip file"),
    ("a.jsonl.gz", LINE, 0, "no whole gzip file"),
    ("a.json", json.dumps({"data": [ROW]}), 0, "the list under its key 'data'"),
    ("a.json", json.dumps({"instruction": {"0": "x"}, "output": {"0": "y"}}), 0, "pandas' to_json"),
    ("a.json", LINE, 0, "one object"),
    ("a.csv", "instruction;output\nhi;a\n", 1, "looks separated by semicolons"),
    ("a.tsv", "instruction,output\nhi,a\n", 1, "looks separated by commas"),
    ("a.csv", "instruction,instruction\nhi,a\n", 1, "stands twice in the header"),
    ("a.csv", ",output\nhi,a\n", 1, "has no name in the header"),
    ("a.csv", 'instruction,output\n"x\ny",a\nhi, a, b\n', 4, "3 cells, and the header 2"),
    ("a.csv", 'instruction,output\nhi,"a\n', 2, "invalid CSV"),
    ("a.parquet", "PAR1 and nothing more", 0, "cannot be read as Parquet"),
]


@pytest.mark.parametrize(("name", "data", "line", "says"), BROKEN)
def test_what_breaks_is_called_what_it_looks_like(
    tmp_path: Path, name: str, data: bytes | str, line: int, says: str
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        read(path)
    error = caught.value
    assert says in str(error) and (error.file, error.line) == (str(path), line) and "\n" not in str(error)


def test_case_19_two_keys_and_json_lines_in_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"twokeys\.jsonl:1: the key 'output' stands twice"):
        read(INPUTS / "twokeys.jsonl")
    for name, text in (
        ("x.json", f"{LINE}\n\n{LINE}\n"),
        ("x.json", (INPUTS / "lines.json").read_text()),
        ("x.jsonl", f"[{LINE},\n {LINE}]"),
        ("x.jsonl", json.dumps([ROW, ROW], indent=1)),
    ):
        intake = Intake()
        rows = read_source(DataSource(str(write(tmp_path / name, text))), intake)
        assert len(rows) == 2
        parse_rows(rows)
        assert ("JSON Lines" in intake.read_as) == (name == "x.json") and intake.read_as
    with pytest.raises(DataError, match=r"lines\.json:3: "):
        read(write(tmp_path / "lines.json", f"{LINE}\n{LINE}\nnot json\n"))


def test_the_same_rows_in_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = [{"instruction": 'say "a, b"', "output": f"line 1\nline 2\u2028 {i} 😀"} for i in range(3)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    cells = "\r\n".join(",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows)
    table = "\ufeffinstruction,output\r\n" + cells
    paths = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "a.NDJSON", lines),
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "a.csv", table),
        write(tmp_path / "a.csv.gz", gzip.compress(table.encode())),
        write(tmp_path / "a.tsv", table.replace('","', '"\t"').replace("instruction,output", "instruction\toutput")),
        tmp_path / "a.parquet",
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[-1])
    for path in paths:
        assert read(path) == rows, path.name
    assert [row.line for row in read_source(DataSource(str(paths[4])))] == [2, 4, 6], (
        "where rows begin, by lines of the file"
    )


def test_tables_hold_conversations_as_json_text_and_arrow_fills_up_with_nulls(tmp_path: Path) -> None:
    import pyarrow.parquet

    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    calling = [
        messages[0],
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    ]
    path = write(tmp_path / "a.csv", "id,messages\n1," + '"' + json.dumps(messages).replace('"', '""') + '"\n')
    [first] = parse_rows(read_source(DataSource(str(path))))
    assert [turn.content for turn in first.turns] == ["q", "a"]
    with pytest.raises(DataError, match="single quotes"):
        parse_rows(read_source(DataSource(str(write(path, 'id,messages\n1,"' + str(messages) + '"\n')))))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": messages, "weight": None}, {"messages": calling, "weight": 0.5}]),
        tmp_path / "a.parquet",
    )
    first, second = parse_rows(read_source(DataSource(str(tmp_path / "a.parquet"))))
    assert [turn.message for turn in first.turns] == messages
    assert second.turns[1].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert second.turns[1].loss_weight == 0.5


def test_case_20_a_file_whose_name_has_a_hash_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c#" / "rows.jsonl", f"{LINE}\n" * 4)
    write(tmp_path / "rows.jsonl#2", "")
    write(tmp_path / "a#3.jsonl", f"{LINE}\n")
    assert parse_source("c#/rows.jsonl") == DataSource("c#/rows.jsonl")
    assert parse_source("c#/rows.jsonl#2") == DataSource("c#/rows.jsonl", 2)
    assert parse_source("c#") == DataSource("c#")
    assert parse_source("rows.jsonl#2") == DataSource("rows.jsonl#2")
    assert parse_source("a#3.jsonl#1") == DataSource("a#3.jsonl", 1)
    config = case_config(tmp_path, "data.train=[{path: 'c#/rows.jsonl', sample: 3}]")
    assert len(read_source(source_of(config.data.train[0]))) == 3
    with pytest.raises(DataError, match="no such file or folder, and the sample after #"):
        parse_source("d#/rows.jsonl")


def test_case_14_home_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", f"{LINE}\n" * 3)
    write(tmp_path / "d" / "more.csv", "instruction,output\nq,a\n")
    for path, count in (("~/rows.jsonl", 3), ("~/rows.jsonl#2", 2), ("~/d", 1), ("~/d/more.csv", 1)):
        config = case_config(tmp_path, f"data.train={path}")
        rows = read_source(source_of(config.data.train[0]))
        assert len(rows) == count and not rows[0].file.startswith("~")
    write(tmp_path / "c#" / "x.jsonl", LINE)
    assert parse_source("~/c#/x.jsonl").sample is None
    with pytest.raises(DataError, match="no home folder"):
        parse_source("~nobody-of-this-name/x#")


@pytest.mark.parametrize("written", ["rows.jsonl", "{path: rows.jsonl}", "[rows.jsonl]", "[{path: rows.jsonl}]"])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_case_27_a_scalar_is_a_list_of_one(tmp_path: Path, name: str, written: str) -> None:
    [source] = getattr(case_config(tmp_path, f"data.{name}={written}").data, name)
    assert source.path == "rows.jsonl"


def test_case_27_for_traces_and_what_is_no_source(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.yaml",
        "output_dir: x\ntokenizer: t\ndata: {sources: rows.jsonl#3}\nteacher: {address: 'h:1'}\n",
    )
    assert load_traces_config(path).data.sources[0].path == "rows.jsonl#3"
    for wrong, says in (("3", "not int"), ("[]", "at least 1 item"), ("null", "not NoneType"), ("[3]", "not int")):
        with pytest.raises(ConfigError, match=rf"data\.train: .*{says}"):
            parse_config(read_tree(base_file(tmp_path), [f"data.train={wrong}"]), "case")
    with pytest.raises(DataError, match="several sources are written as a list"):
        read("a.jsonl,b.jsonl")


def test_folders_are_read_file_by_file_and_by_split(tmp_path: Path) -> None:
    plain, split, mixed = tmp_path / "plain", tmp_path / "split", tmp_path / "mixed"
    for name, count in (
        ("b.jsonl", 2),
        ("a.csv", 1),
        ("sub/c.json", 1),
        (".hidden/x.jsonl", 9),
        ("README.md", 0),
        ("dataset_infos.json", 0),
    ):
        text = {".csv": "instruction,output\nq,a\n", ".json": f"[{LINE}]", ".jsonl": f"{LINE}\n" * count}.get(
            Path(name).suffix, "{}"
        )
        write(plain / name, text if name != "dataset_infos.json" else "{}")
    rows = read_source(DataSource(str(plain)))
    assert [(Path(row.file).relative_to(plain).as_posix(), row.line) for row in rows] == [
        ("a.csv", 2),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
        ("sub/c.json", 1),
    ]
    assert len(read(plain, sample=3)) == 3
    for name, count in (
        ("train-00000-of-00002.jsonl", 2),
        ("train-00001-of-00002.jsonl", 1),
        ("test.jsonl", 4),
        ("data/validation/x.jsonl", 5),
    ):
        write(split / name, f"{LINE}\n" * count)
    assert [len(read(split, split=name)) for name in ("train", "test", "validation")] == [3, 4, 5]
    with pytest.raises(DataError, match=r"no such split; there are: test, train, validation .*value='dev2'"):
        read(split, split="dev2")
    write(mixed / "train.jsonl", LINE)
    write(mixed / "more.jsonl", LINE)
    with pytest.raises(DataError, match=r"others are not \(more\.jsonl\)"):
        read(mixed)
    with pytest.raises(DataError, match="no file of rows"):
        read(write(tmp_path / "none" / "a.txt", "x").parent)
    write(plain / "b.jsonl", f"{LINE}\n{{}}\n")
    with pytest.raises(DataError, match=r"b\.jsonl:2: missing field"):
        parse_rows(read_source(DataSource(str(plain))))


def test_save_to_disk_folders_and_folders_that_describe_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{**ROW, "history": [["u", "v"]]}, {**ROW, "history": []}]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == rows and read(tmp_path / "two", split="test") == rows[:1]
    with pytest.raises(DataError, match="there are: train, test"):
        read(tmp_path / "two", split="dev")
    write(
        tmp_path / "card" / "README.md",
        "---\nconfigs:\n- config_name: default\n  data_files: rows/*.jsonl\n---\n# rows\n",
    )
    write(tmp_path / "card" / "rows" / "a.jsonl", LINE)
    write(tmp_path / "card" / "other" / "b.jsonl", '{"no": "rows"}')
    assert read(tmp_path / "card") == [ROW]


def test_pictures_in_a_table_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"instruction": datasets.Value("string"), "output": datasets.Value("string"), "pic": datasets.Image()}
    )
    rows = [{**ROW, "pic": {"bytes": b"no picture", "path": None}}]
    table = datasets.Dataset.from_list(rows, features=features)
    table.save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"holds Image values.*columns: \{pic: null\} \(field=pic\)"):
        read(tmp_path / "d")
    assert read(tmp_path / "d", columns={"pic": None}) == [ROW]
    table.to_parquet(str(tmp_path / "d.parquet"))
    with pytest.raises(DataError, match=r"d\.parquet:1: is not used: rows of text alone"):
        parse_rows(read_source(DataSource(str(tmp_path / "d.parquet"))))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"frage": "instruction"}, r"the row has a instruction already"),
        ({"antwort": "instruction", "frage": "instruction"}, "two columns cannot be mapped to one field"),
        ({"antwort": "outptu"}, "no format has such a field; known: .*output"),
        ({"answr": "output"}, r"no row has this column; the first has: antwort, frage, instruction .*columns\.answr"),
    ],
)
def test_columns_that_cannot_be_meant(tmp_path: Path, columns: dict, says: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"frage": "q", "antwort": "a", "instruction": "i"}))
    with pytest.raises(DataError, match=says):
        read(path, columns=columns)


def test_columns_give_other_names_and_errors_name_the_rows_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"frage": "q", "antwort": "a", "images": ["x"], "instruction": "i"}))
    columns = "{frage: instruction, antwort: output, images: null, instruction: null}"
    config = case_config(tmp_path, f"data.train=[{{path: {path}, columns: {columns}}}]")
    [made] = parse_rows(read_source(source_of(config.data.train[0])))
    assert [turn.content for turn in made.turns] == ["q", "a"]
    talk = write(tmp_path / "b.jsonl", json.dumps({"dialog": [{"role": "user", "content": 3}]}))
    with pytest.raises(DataError, match=r"field=dialog\[0\]\.content"):
        parse_rows(read_source(DataSource(str(talk), columns={"dialog": "messages"})))
    dpo = write(tmp_path / "c.jsonl", json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    [made] = parse_rows(read_source(DataSource(str(dpo), columns={"chosen": "completion", "rejected": None})))
    assert [turn.content for turn in made.turns] == ["q", "a"]
