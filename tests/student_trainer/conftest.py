"""Runs against a teacher behind the real wire in this process."""

from __future__ import annotations

import pytest

from student_trainer.config.run import parse_config
from teacher_wire.core.identity import added_tokens, base_tokenizer_sha256, template_sha256, tokenizer_sha256
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve


def fake_for(folder, **changes) -> FakeTeacher:
    """A fake teacher that speaks the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = tokenizer.backend_tokenizer.to_str()
    shape = {"vocab_rows": 300, "hidden_size": 24} | changes
    return FakeTeacher(
        tokenizer_sha256=tokenizer_sha256(written),
        base_tokenizer_sha256=base_tokenizer_sha256(written),
        added_tokens=added_tokens(written),
        chat_template_sha256=template_sha256(tokenizer.chat_template),
        **shape,
    )


def run_config(folder, model, rows, address=None, /, **sections):
    """A small run; sections are merged into the defaults."""
    tree = {
        "run": {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"path": str(model), "dtype": "float32", "lora": {"rank": 4, "dropout": 0.1}},
        "data": {"train": [str(rows)], "eval": [f"{rows}#6"], "max_tokens": 100},
        "teacher": {"address": address} if address else None,
        "labels": {"transport": "hidden"},
        "train": {
            "batch_size": 2, "accumulation": 2, "max_steps": 6, "learning_rate": 1e-2, "log_steps": 1, "save_steps": 2,
            "report_to": [],
        },
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = {**(tree.get(name) or {}), **section} if isinstance(section, dict) else section
    return tree


@pytest.fixture
def fake(model_factory):
    return fake_for(model_factory("qwen2"))


@pytest.fixture
def server(fake):
    with serve(fake) as running:
        yield running


@pytest.fixture
def config_of(tmp_path, model_factory, rows_file, server):
    """Sections -> a config against the fake teacher, in a fresh folder."""

    def build(**sections):
        tree = run_config(tmp_path, model_factory("qwen2"), rows_file, server.address, **sections)
        return parse_config(tree, "test")

    return build
