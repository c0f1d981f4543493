from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from student_trainer.data.dataset import IndexedExample, build_dataset, collate
from student_trainer.data.rows.sources import DataSource
from student_trainer.errors import DataError
from tests.student_trainer.data.tiny_tokenizers import tokenizer


def write(path: Path, outputs: list[str]) -> DataSource:
    lines = [json.dumps({"instruction": "Complete.", "input": "def f():\n", "output": o}) + "\n" for o in outputs]
    path.write_text("".join(lines))
    return DataSource(str(path))


def test_examples_carry_mask_bytes_and_key(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["    return 1", "你好😀", "x\r\n"])
    tok = tokenizer("chatml")
    data = build_dataset([source], tok, max_tokens=64)
    assert len(data) == 3 and data.dropped == ()
    for item, text in zip(data, ["    return 1", "你好😀", "x\r\n"], strict=True):
        index, example = item.index, item.example
        assert data[index].example is example and example.key == f"{source.path}:{index + 1}"
        assert (example.token_ids.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)
        assert example.token_ids.shape == example.loss_mask.shape
        assert tok.decode(example.token_ids[example.loss_mask]) == text + "<|im_end|>"
        assert example.target_bytes == len(text.encode())  # the end of turn counts no byte
    assert data.target_bytes == 12 + 10 + 3
    assert data.tokens == sum(i.example.token_ids.size for i in data) and data.target_tokens < data.tokens


def test_negative_index_names_the_real_one_and_iteration_ends(tmp_path: Path) -> None:
    data = build_dataset([write(tmp_path / "a.jsonl", ["a", "b"])], tokenizer("chatml"), max_tokens=64)
    assert data[-1].index == 1
    with pytest.raises(IndexError):
        data[2]


def test_sources_follow_one_another_and_batched_equals_single(tmp_path: Path) -> None:
    outputs = [f"    return {i} * 'é'" for i in range(1500)]  # more than one tokeniser call
    many = build_dataset(
        [write(tmp_path / "a.jsonl", outputs), DataSource(str(tmp_path / "a.jsonl"), 3)],
        tokenizer("chatml"),
        max_tokens=64,
    )
    assert len(many) == 1503
    single = build_dataset([write(tmp_path / "b.jsonl", outputs[1200:1201])], tokenizer("chatml"), max_tokens=64)
    assert np.array_equal(many[1200].example.token_ids, single[0].example.token_ids)


def test_overlong_rows_are_refused_by_name_or_dropped_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["a", "bb " * 50, "c"])
    with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens are above the limit of 60"):
        build_dataset([source], tokenizer("chatml"), max_tokens=60)
    data = build_dataset([source], tokenizer("chatml"), max_tokens=60, overlong="drop")
    assert [i.example.key.rsplit(":")[-1] for i in data] == ["1", "3"]
    assert [d.key for d in data.dropped] == [f"{source.path}:2"] and data.dropped[0].tokens > 60
    exact = data.longest
    assert len(build_dataset([source], tokenizer("chatml"), max_tokens=exact, overlong="drop")) == 2
    with pytest.raises(DataError, match=r"all 3 rows are above 3 tokens; the shortest has \d+"):
        build_dataset([source], tokenizer("chatml"), max_tokens=3, overlong="drop")


def test_errors_name_the_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["zz"])
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template does not show"):
        build_dataset([source], tokenizer("silent"), max_tokens=64)
    with pytest.raises(DataError, match="there is no source"):
        build_dataset([], tokenizer("chatml"), max_tokens=64)
    with pytest.raises(DataError, match="refuse, drop"):
        build_dataset([source], tokenizer("chatml"), max_tokens=64, overlong="cut")  # type: ignore[arg-type]
    first = {"messages": [{"role": r, "content": r} for r in ("assistant", "user", "assistant")]}
    (tmp_path / "m.jsonl").write_text(json.dumps(first))
    with pytest.raises(DataError, match=r"m\.jsonl:1: the answer has no token before it"):
        build_dataset([DataSource(str(tmp_path / "m.jsonl"))], tokenizer("plain"), max_tokens=64)


def test_collate_pads_right(tmp_path: Path) -> None:
    data = build_dataset([write(tmp_path / "a.jsonl", ["a", "b" * 30, "cc"])], tokenizer("chatml"), max_tokens=64)
    batch = collate([data[2], data[1]], pad_id=7)
    lengths = [data[2].example.token_ids.size, data[1].example.token_ids.size]
    assert batch["input_ids"].shape == batch["loss_mask"].shape == (2, max(lengths))
    assert batch["indices"] == (2, 1)
    assert collate([data[2], data[1]], 7, lambda longest: longest + 3)["input_ids"].shape == (2, max(lengths) + 3)
    for b, example in enumerate([data[2].example, data[1].example]):
        n = lengths[b]
        assert batch["input_ids"][b, :n].tolist() == example.token_ids.tolist()
        assert batch["loss_mask"][b, :n].tolist() == example.loss_mask.tolist()
        assert batch["input_ids"][b, n:].eq(7).all() and not batch["loss_mask"][b, n:].any()
    assert isinstance(data[0], IndexedExample)
