from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from student_trainer.data.rows.sources import DataSource, parse_source, read_source
from student_trainer.errors import DataError


def write(path: Path, data: bytes | str) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_jsonl_keeps_order_lines_and_text(tmp_path: Path) -> None:
    texts = ["a\u2028b", "line\r\nline", "你好 😀", "\x85"]
    data = "\n\n".join(json.dumps({"t": t}, ensure_ascii=False) for t in texts) + "\r\n"
    rows = read_source(DataSource(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + data.encode())))
    assert [row.fields["t"] for row in rows] == texts
    assert [row.line for row in rows] == [1, 3, 5, 7]
    assert rows[1].key == f"{tmp_path / 'a.jsonl'}:3"


def test_json_list(tmp_path: Path) -> None:
    rows = read_source(DataSource(write(tmp_path / "a.json", '[{"t": 1}, {"t": 2}]')))
    assert [(row.fields["t"], row.line) for row in rows] == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("name", "data", "line", "says"),
    [
        ("a.jsonl", "", 0, "empty"),
        ("a.jsonl", "\n \n", 0, "empty"),
        ("a.json", "[]", 0, "empty"),
        ("a.json", "", 0, "empty"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', 2, "invalid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', 2, "must be an object, not list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', 2, "not UTF-8"),
        ("a.jsonl", "[" * 200_000, 1, "nested too deeply"),
        ("a.json", '[{"a": 1},\n {"a": }]', 2, "invalid JSON"),
        ("a.json", '{"a": 1}', 0, "list of objects"),
        ("a.json", '[{"a": 1}, 7]', 2, "must be an object, not int"),
        ("a.txt", "a,b", 0, "unknown file type"),
        ("a.csv", "a,b", 0, "empty"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, data: bytes | str, line: int, says: str) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=says) as caught:
        read_source(DataSource(path))
    assert (caught.value.file, caught.value.line) == (path, line) and path in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for path in (str(tmp_path / "no.jsonl"), "data/no.jsonl", str(tmp_path / "no")):
        with pytest.raises(DataError, match="no such file") as caught:
            read_source(DataSource(path))
        assert path in str(caught.value)


def test_samples_are_stable_nested_and_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(f'{{"t": {i}}}\n' for i in range(500)))
    small, large = ([r.line for r in read_source(DataSource(path, n))] for n in (20, 100))
    assert small == [r.line for r in read_source(DataSource(path, 20))] == sorted(small)
    assert len(large) == 100 and set(small) < set(large)
    assert 150 < sum(large) / 100 < 350  # spread over the file, not its head
    with pytest.raises(DataError, match="cannot sample 501 of 500 rows"):
        read_source(DataSource(path, 501))


def test_parse_source() -> None:
    assert parse_source("a/b.jsonl") == DataSource("a/b.jsonl")
    assert parse_source("org/name#50", "messages") == DataSource("org/name", 50, "messages")
    for text in ("a.jsonl#", "a.jsonl#0", "a.jsonl#-3", "a.jsonl#x", "a.jsonl#²", "#5", ""):
        with pytest.raises(DataError):
            parse_source(text)


def test_folder_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", '{"instruction": "i", "output": "o"}\n' * 3)
    rows = read_source(DataSource(str(tmp_path / "rows"), sample=2))
    assert len(rows) == 2 and rows[0].fields == {"instruction": "i", "output": "o"}


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, split: str) -> None:
        raise ConnectionError(f"no hub\nfor {path}")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="org/name: neither a local file nor readable") as caught:
        read_source(DataSource("org/name"))
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_asked_for_its_split_and_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **more: object) -> list[dict]:
        asked.append((path, more))
        return [{"question": "q", "answer": "a", "extra": {"x": None}}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    [row] = read_source(DataSource("org/name", 1, split="test", subset="main"))
    assert asked == [("org/name", {"split": "test", "name": "main"})]
    assert (row.key, row.fields) == ("org/name:1", {"question": "q", "answer": "a", "extra": {}})
