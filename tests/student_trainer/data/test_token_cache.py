"""A dataset from the cache is the dataset that building gives, or there is no entry for it."""

from __future__ import annotations

import copy
import datetime
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from student_trainer.data import token_cache
from student_trainer.data.dataset import build_dataset
from student_trainer.data.rows import sources
from student_trainer.data.rows.formats import Row
from student_trainer.data.rows.intake import Intake
from student_trainer.data.rows.sources import DataSource
from student_trainer.data.text.clock import Clock
from student_trainer.data.token_cache import TokenCache
from student_trainer.errors import DataError
from tests.student_trainer.data.tiny_tokenizers import tokenizer

PLAIN = dict(template="auto", template_kwargs=None, max_tokens=64)
DATED = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def write(path: Path, *outputs: str) -> DataSource:
    path.write_text(
        "".join(json.dumps({"instruction": "Go on.", "input": "a", "output": o, "id": 1}) + "\n" for o in outputs)
    )
    return DataSource(str(path))


@pytest.fixture
def built(monkeypatch):
    """How many datasets were built, not read."""
    calls = []

    def counted(*arguments, **settings):
        calls.append(arguments)
        return build_dataset(*arguments, **settings)

    monkeypatch.setattr(token_cache, "build_dataset", counted)
    return calls


def load(folder: Path, given: list[DataSource], tok=None, clock=None, policy="refuse", told=None, **settings):
    clock, intake = clock or Clock(datetime.date(2026, 5, 4)), Intake(policy)
    cache = TokenCache(folder / "tokens", (told if told is not None else []).append)
    data = cache.dataset(given, tok or tokenizer("chatml"), clock=clock, intake=intake, **(PLAIN | settings))
    return data, intake, clock


def same(one, other) -> bool:
    """Whether two loads gave the same in every particular."""
    (a, seen, day), (b, seen_too, day_too) = one, other
    assert a.sha256 == b.sha256 and a.rendering == b.rendering and a.dropped == b.dropped and a.bad_rows == b.bad_rows
    assert seen.sources == seen_too.sources and seen.bad == seen_too.bad and day.asked == day_too.asked
    for x, y in zip(a, b, strict=True):
        for name, value in asdict(x.example).items():
            kept = getattr(y.example, name)
            if isinstance(value, np.ndarray):
                assert kept.dtype == value.dtype and kept.tobytes() == value.tobytes()
            else:
                assert kept == value and type(kept) is type(value)
    return True


def test_a_second_start_reads_what_the_first_has_made(tmp_path, built):
    source = write(tmp_path / "a.jsonl", "x", "你好😀", "    return 1")
    assert same(load(tmp_path, [source]), load(tmp_path, [source]))
    assert len(built) == 1


def test_weights_long_rows_bad_rows_and_facts_come_back(tmp_path, built):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "c"},
                      {"role": "assistant", "content": "d"}], "id": 3},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long " * 99}]},
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + "no JSON \ud800\n".encode("utf-8", "replace").decode()
    )
    once = load(tmp_path, [DataSource(str(tmp_path / "m.jsonl"))], policy="skip", overlong="drop")
    assert same(once, load(tmp_path, [DataSource(str(tmp_path / "m.jsonl"))], policy="skip", overlong="drop"))
    data, intake, _ = once
    assert (
        len(built) == 1
        and len(data) == 1
        and len(data.dropped) == 1
        and len(intake.bad) == 2
        and intake.sources[0].unused == ("id",)
    )


def test_traces_come_back_with_their_weights(tmp_path, built):
    from tests.student_trainer.data.test_trace_rows import row

    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    loads = [load(tmp_path, [DataSource(str(path))], max_tokens=999) for _ in range(2)]
    assert same(*loads) and len(built) == 1
    assert loads[1][0][0].example.weights is not None


CHANGES = {
    "a byte of a row": lambda folder: dict(rows=("x", "z")),
    "a row more": lambda folder: dict(rows=("x", "y", "z")),
    "another name": lambda folder: dict(name="b.jsonl"),
    "a sample": lambda folder: dict(source=dict(sample=1)),
    "columns": lambda folder: dict(source=dict(columns={"id": None})),
    "format": lambda folder: dict(source=dict(format="instruction")),
    "max_tokens": lambda folder: dict(max_tokens=65),
    "overlong": lambda folder: dict(overlong="drop"),
    "turns": lambda folder: dict(turns="each"),
    "system prompt": lambda folder: dict(system_prompt="Be short."),
    "bad rows": lambda folder: dict(policy="skip"),
    "template": lambda folder: dict(template="plain"),
    "tokenizer": lambda folder: dict(tok=tokenizer("llama")),
    "twice": lambda folder: dict(twice=True),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_the_dataset_is_part_of_its_name(tmp_path, built, what):
    load(tmp_path, [write(tmp_path / "a.jsonl", "x", "y")])
    change = CHANGES[what](tmp_path)
    source = write(tmp_path / change.pop("name", "a.jsonl"), *change.pop("rows", ("x", "y")))
    source = DataSource(source.path, **change.pop("source", {}))
    again = load(tmp_path, [source] * (1 + change.pop("twice", False)), **change)
    assert len(built) == 2
    assert same(again, load(tmp_path / "elsewhere", list(built[1][0]), **change))


def test_code_and_libraries_are_part_of_the_name(tmp_path, built, monkeypatch):
    source = write(tmp_path / "a.jsonl", "x")
    load(tmp_path, [source])
    monkeypatch.setattr(token_cache, "_code", lambda: "another")
    load(tmp_path, [source])
    assert len(built) == 2


def test_the_day_counts_where_the_template_prints_it_alone(tmp_path, built):
    days = [Clock(datetime.date(2026, 5, day)) for day in (4, 5, 4)]
    source = write(tmp_path / "a.jsonl", "x")
    assert same(load(tmp_path, [source], clock=days[0]), load(tmp_path, [source], clock=days[1])) and len(built) == 1
    tok = copy.deepcopy(tokenizer("chatml"))
    tok.chat_template = DATED
    days = [Clock(day.day) for day in days]
    loads = [load(tmp_path, [source], tok, clock=day) for day in days]
    assert len(built) == 3 and same(loads[0], loads[2]) and days[2].asked
    assert loads[0][0].sha256 != loads[1][0].sha256


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-200] + b"!" + path.read_bytes()[-199:]),
    "empty": lambda path: path.write_bytes(b""),
    "blank": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "another's": lambda path: path.write_bytes(next(p for p in path.parent.glob("*.safetensors") if p != path).read_bytes()),
    "other form": lambda path: token_cache.save_file({"facts": np.zeros(3, np.uint8)}, path, {"key": path.stem, "sha256": token_cache._digest({"facts": np.zeros(3, np.uint8)})}),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_entry_is_told_of_and_made_again(tmp_path, built, how):
    source = write(tmp_path / "a.jsonl", "x", "y")
    once = load(tmp_path, [source])
    [path] = (tmp_path / "tokens").iterdir()
    load(tmp_path, [write(tmp_path / "b.jsonl", "z")])
    DAMAGES[how](path)
    told: list[str] = []
    assert same(once, load(tmp_path, [source], told=told))
    assert len(told) == 1 and "damaged, and made anew" in told[0] and str(path) in told[0] and len(built) == 3
    assert same(once, load(tmp_path, [source])) and len(built) == 3


def test_errors_are_those_of_building_and_nothing_is_kept_of_them(tmp_path, built):
    source = write(tmp_path / "a.jsonl", "x", "y " * 99)
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens are above the limit of 64"):
            load(tmp_path, [source])
    for wrong, settings, error in (
        ([DataSource(str(tmp_path / "none.jsonl"))], {}, "no such file"),
        ([], {}, "no source of data"),
        ([source], {"template": "odd"}, "unknown template"),
        ([source], {"turns": "first"}, "must be one of"),
    ):
        with pytest.raises(DataError, match=error):
            load(tmp_path, wrong, **settings)
    assert not (tmp_path / "tokens").exists()


def test_a_folder_is_named_by_all_its_files_and_a_hub_id_not_at_all(tmp_path, built, monkeypatch):
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "rows" / f"{name}.jsonl", name)
    folder = DataSource(str(tmp_path / "rows"))
    assert same(load(tmp_path, [folder]), load(tmp_path, [folder])) and len(built) == 1
    (tmp_path / "rows" / "a.jsonl").rename(tmp_path / "rows" / "c.jsonl")
    assert [item.example.key[-9:] for item in load(tmp_path, [folder])[0]] == ["b.jsonl:1", "c.jsonl:1"]
    rows = [Row({"instruction": "Go on.", "output": "x"}, "somewhere", 1)]
    monkeypatch.setattr(sources, "_read_datasets", lambda source: rows)
    (tmp_path / "rows" / "README.md").write_text("---\nconfigs:\n- config_name: x\n---\n")
    before = len(built), len(list((tmp_path / "tokens").iterdir()))
    for source in (folder, DataSource("somebody/rows")):
        for _ in range(2):
            load(tmp_path, [source])
    assert (len(built), len(list((tmp_path / "tokens").iterdir()))) == (before[0] + 4, before[1])


def test_rows_that_change_while_they_are_read_are_not_kept(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", "x")

    def meanwhile(*arguments, **settings):
        made = build_dataset(*arguments, **settings)
        write(tmp_path / "a.jsonl", "y")
        return made

    monkeypatch.setattr(token_cache, "build_dataset", meanwhile)
    load(tmp_path, [source])
    assert not (tmp_path / "tokens").exists()


def test_a_disk_that_takes_nothing_is_told_of_and_stops_nobody(tmp_path, built):
    (tmp_path / "tokens").write_text("a file where the folder should be")
    told: list[str] = []
    assert len(load(tmp_path, [write(tmp_path / "a.jsonl", "x")], told=told)[0]) == 1
    assert len(told) == 1 and "cannot be kept" in told[0]


def test_the_longest_unused_entries_go_first(tmp_path, built, monkeypatch):
    three = [write(tmp_path / f"{name}.jsonl", name) for name in "abc"]
    load(tmp_path, three[:1])
    [first] = (tmp_path / "tokens").iterdir()
    monkeypatch.setattr(token_cache, "MAX_BYTES", int(first.stat().st_size * 2.5))
    load(tmp_path, three[1:2])
    for age, path in enumerate(sorted((tmp_path / "tokens").iterdir(), key=lambda path: path != first)):
        token_cache.os.utime(path, (1000 + age, 1000 + age))
    load(tmp_path, three[:1])  # read again: the other one is now the older
    load(tmp_path, three[2:])
    assert first.exists() and len(list((tmp_path / "tokens").iterdir())) == 2
    assert len(built) == 3
