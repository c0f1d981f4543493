"""The examples of `student_trainer.api`, run as they are on a tiny student, against a teacher behind the real wire."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for
from tests.tiny import WORDS

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples" / "api"


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    rows = [
        {"prompt": " ".join(WORDS[i % 7 : i % 7 + 3]), "completion": " " + " ".join(WORDS[i % 5 : 2 + i % 5 + i % 4])}
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(model_factory, pairs_file, tmp_path, monkeypatch, capsys):
    """Runs an example by its name; what it printed, and the teacher that it asked."""
    model = model_factory("qwen2")

    def start(name: str):
        fake = fake_for(model)
        monkeypatch.setenv("HOME", str(tmp_path))  # where labels are kept
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        with serve(fake) as server:
            monkeypatch.setattr(sys, "argv", [name, str(model), str(pairs_file), server.address, str(tmp_path / "out")])
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, fake

    return start


def figures(printed: str, name: str) -> list[float]:
    """The numbers that were logged under a name."""
    return [float(found) for found in re.findall(rf"'{name}': '?([-\d.e]+)'?", printed)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_they_are_run(path):
    assert len(path.read_text().splitlines()) < 40
    assert f"python {path.name} " in ast.get_docstring(ast.parse(path.read_text()))


def test_plain_loop(run):
    printed, fake = run("plain_loop")
    first, second = (float(found) for found in re.findall(r"kd ([\d.]+)", printed))
    assert second < first
    assert "asked 16 sequences" in printed.splitlines()[-1]  # the second epoch's were on disk
    assert fake.calls == 4


def test_transformers_trainer(run):
    printed, _ = run("transformers_trainer")
    losses = figures(printed, "loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_trl_sft(run):
    pytest.importorskip("trl")
    printed, _ = run("trl_sft")
    kd = figures(printed, "kd")
    assert len(kd) == 4
    assert kd[-1] < kd[0]


def test_kl_callback(run):
    pytest.importorskip("trl")
    printed, fake = run("kl_callback")
    assert len(figures(printed, "kl_to_teacher")) == 2
    assert fake.calls == 1
