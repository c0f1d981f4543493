"""Kinds 09, 11, 23: templates that print the date, templates by name or in a file, and a teacher with other added tokens."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from student_trainer.config.run import TrainConfig
from student_trainer.data.inputs import load_data
from student_trainer.data.text import clock, templates
from student_trainer.errors import ConfigError, DataError
from student_trainer.training.run import train
from teacher_wire.core.errors import MismatchError
from teacher_wire.core.identity import added_tokens, base_tokenizer_sha256, template_sha256, tokenizer_sha256
from teacher_wire.testing.loopback import serve
from tests.cases.material import INPUTS, MODELS, case_config
from tests.student_trainer.conftest import fake_for


class Day(date):
    """A calendar that stands still."""

    now = date(2026, 3, 1)

    @classmethod
    def today(cls) -> date:
        return cls.now


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> type[Day]:
    monkeypatch.setattr(Day, "now", date(2026, 3, 1))
    monkeypatch.setattr(clock, "date", Day)
    return Day


def ran(config: TrainConfig, *, resume: bool = False) -> str:
    """What a run says."""
    console = Console(width=1000, record=True, file=(config.run.output_dir.parent / "said").open("w"))
    train(config, resume=resume, console=console)
    return console.export_text()


def loaded(config: TrainConfig, model: str, pinned: date | None = None):
    console = Console(width=1000, record=True, file=(config.run.output_dir.parent / "said").open("w"))
    tokenizer = AutoTokenizer.from_pretrained(MODELS / model)
    return load_data(config.data, tokenizer, console, pinned)[0], console.export_text(), tokenizer


def test_a_run_keeps_the_day_it_began_and_finds_its_labels(tmp_path: Path, calendar: type[Day]) -> None:
    fake = fake_for(MODELS / "dated")
    with serve(fake) as server:
        settings = (
            f"model.path={MODELS}/dated", f"teacher.address={server.address}", "loss.output.divergence=forward_kl",
            "train.max_steps=2", "train.save_steps=1", "train.accumulation=1",
        )  # fmt: skip
        config = case_config(tmp_path, *settings)
        said = ran(config)
        assert "prints the date: 2026-03-01" in said and "data.date=2026-03-01" in said
        asked = fake.calls
        (config.run.output_dir / "result.json").unlink()  # as if it had been killed at the end
        shutil.rmtree(config.run.output_dir / "checkpoint-2")
        calendar.now = date(2026, 3, 2)
        ran(config, resume=True)
        assert fake.calls == asked, "every label of yesterday is found"
        assert json.loads((config.run.output_dir / "run.json").read_text())["date"] == "2026-03-01"
        tomorrow = case_config(tmp_path, *settings, f"run.output_dir={tmp_path}/new", "data.date=2026-03-01")
        assert "prints the date" not in ran(tomorrow)
        assert fake.calls == asked, "a new run with the old day finds them too"


@pytest.mark.parametrize("model", ["dated", "gptoss"])
def test_the_day_is_a_setting(tmp_path: Path, calendar: type[Day], model: str) -> None:
    shown = {"dated": "09 Nov 2025", "gptoss": "2025-11-09"}[model]
    data, said, tok = loaded(case_config(tmp_path, "data.date=2025-11-09"), model)
    assert shown in tok.decode(data[0].example.token_ids) and "prints" not in said
    pinned, said, _ = loaded(case_config(tmp_path), model, date(2025, 11, 9))
    assert pinned.sha256 == data.sha256 and "2025-11-09" in said
    assert loaded(case_config(tmp_path), model)[0].sha256 != data.sha256
    assert data.rendering is not None and data.rendering.day == "2025-11-09"


def test_a_day_that_nobody_prints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prints no date"):
        loaded(case_config(tmp_path, "data.date=2025-11-09"), "qwen2")
    with pytest.raises(ConfigError, match=r"data\.date"):
        case_config(tmp_path, "data.date=yesterday")


def test_templates_by_name_and_from_a_file(tmp_path: Path) -> None:
    tok = AutoTokenizer.from_pretrained(MODELS / "dicttemplate")
    assert isinstance(tok.chat_template, dict) and template_sha256(tok.chat_template) == template_sha256(tok.chat_template["default"])  # fmt: skip
    default, _, _ = loaded(case_config(tmp_path), "dicttemplate")
    (tmp_path / "shouting.jinja").write_text("{% for m in messages %}{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}")  # fmt: skip
    for setting, text in (("tool_use", "<|im_start|>user"), ("default", "<|im_start|>user"), (f"{tmp_path}/shouting.jinja", "USER: Name a pet.<|im_end|>ASSISTANT: ")):  # fmt: skip
        data, _, _ = loaded(case_config(tmp_path, f"data.template={setting}"), "dicttemplate")
        assert tok.decode(data[0].example.token_ids).startswith(text)
        assert (data.sha256 == default.sha256) == ("jinja" not in setting)
    for setting, said in (("nix", "default, tool_use"), ("./nix.jinja", "cannot be read")):
        with pytest.raises(DataError, match=said):
            loaded(case_config(tmp_path, f"data.template={setting}"), "dicttemplate")
    tok.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(DataError, match=r"none is called default; choose one: rag, tool_use"):
        templates.choose("auto", tok)


def test_named_templates_in_both_houses(tmp_path: Path) -> None:
    from teacher_server.backends.tokenizer import load_tokenizer, tokenizer_identity

    told = tokenizer_identity(load_tokenizer(MODELS / "dicttemplate"))
    plain = tokenizer_identity(load_tokenizer(MODELS / "qwen2"))
    assert told["chat_template_sha256"] == plain["chat_template_sha256"] != ""
    fake = fake_for(MODELS / "dicttemplate")
    with serve(fake) as server:
        base = (
            f"model.path={MODELS}/dicttemplate",
            f"teacher.address={server.address}",
            "loss.output.divergence=forward_kl",
        )
        ran(case_config(tmp_path, *base))
        (tmp_path / "own.jinja").write_text(AutoTokenizer.from_pretrained(MODELS / "gptoss").chat_template)
        other = (*base, f"data.template={tmp_path}/own.jinja", f"run.output_dir={tmp_path}/other")
        with pytest.raises(MismatchError, match="allow_template_mismatch"):
            ran(case_config(tmp_path, *other))
        ran(case_config(tmp_path, *other, "teacher.allow_template_mismatch=true"))


# ------------------------------------------------------------------ a teacher with other added tokens


def with_tokens(fake, folder: Path, **changes: object):
    """The fake teacher with a tokenizer that has more added tokens."""
    tok = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        tok.add_special_tokens({name: value}) if name.endswith("_token") else tok.add_tokens(value)
    written = tok.backend_tokenizer.to_str()
    fake.tokenizer_sha256, fake.base_tokenizer_sha256 = tokenizer_sha256(written), base_tokenizer_sha256(written)
    fake.added_tokens = added_tokens(written)
    return fake


@pytest.mark.parametrize("changes", [{"pad_token": "<|pad|>"}, {"tokens": ["<tool>", "<obj>"]}, {"pad_token": "[PAD]", "bos_token": "<s>"}])  # fmt: skip
def test_a_teacher_with_more_added_tokens_teaches_if_no_row_has_them(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    fake = with_tokens(fake_for(MODELS / "qwen2"), MODELS / "qwen2", **changes)
    with serve(fake) as server:
        said = ran(case_config(tmp_path, f"teacher.address={server.address}", "loss.output.divergence=forward_kl"))
    assert "differs from the student's in added tokens alone" in said and "all ids are equal" in said


def test_a_row_that_holds_one_of_them_is_another_matter(tmp_path: Path) -> None:
    fake = with_tokens(fake_for(MODELS / "qwen2"), MODELS / "qwen2", tokens=["<tool>"])
    with serve(fake) as server:
        config = case_config(tmp_path, f"teacher.address={server.address}", "loss.output.divergence=forward_kl", f"data.train=[{INPUTS}/tool.jsonl]")  # fmt: skip
        with pytest.raises(MismatchError, match="another tokenizer"):
            ran(config)
        fake.base_tokenizer_sha256 = ""  # an older server does not tell
        with pytest.raises(MismatchError, match="another tokenizer"):
            ran(case_config(tmp_path, f"teacher.address={server.address}", "loss.output.divergence=forward_kl"))


def test_a_student_with_more_added_tokens_learns_if_no_row_has_them(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(MODELS / "qwen2", student)
    tok = AutoTokenizer.from_pretrained(student)
    vocabulary = len(tok)
    tok.add_special_tokens({"mask_token": "<mask>"})
    tok.save_pretrained(student)
    assert len(tok) == vocabulary + 1
    fake = fake_for(MODELS / "qwen2")
    with serve(fake) as server:
        config = case_config(tmp_path, f"model.path={student}", f"teacher.address={server.address}", "loss.output.divergence=forward_kl")  # fmt: skip
        assert "added tokens alone" in ran(config)
