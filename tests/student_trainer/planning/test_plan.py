"""`student-trainer plan`: config, findings and coverage of a run that is not made; nothing on disk but the cache changes."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from student_trainer.cli.main import app
from student_trainer.config.run import dump_config, parse_config
from student_trainer.planning.plan import plan
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.fake_tokenizer import FakeTokenizer
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import run_config

READER = FakeTokenizer((b"the", b" cat", b" sat", b"on ", b" a", b"ma", b"t\n"))


def quiet():
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def stranger():
    """A teacher with another tokenizer than the student."""
    with serve(FakeTeacher(vocab_rows=300, hidden_size=24, reader=READER)) as running:
        yield running


@pytest.fixture
def bridged(tmp_path, model_factory, rows_file, stranger):
    """Sections -> a config whose teacher has another tokenizer."""

    def build(**sections):
        tree = run_config(tmp_path, model_factory("qwen2"), rows_file, stranger.address, **sections)
        return parse_config(tree, "test")

    return build


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_run_of_one_tokenizer_is_planned_without_coverage(config_of, tmp_path):
    config = config_of()
    made = plan(config, quiet())
    assert made.can_start and made.coverage == () and made.config == dump_config(config)
    assert not (tmp_path / "run").exists()


def test_every_bad_finding_is_in_the_plan(config_of):
    made = plan(config_of(data={"max_tokens": 5}, labels={"transport": "given"}), quiet())
    assert not made.can_start
    assert len([found for found in made.findings if not found.ok]) >= 2


def test_a_teacher_with_another_tokenizer_has_its_coverage(bridged, tmp_path, rows_file):
    config = bridged()
    made = plan(config, quiet())
    assert made.can_start, [found for found in made.findings if not found.ok]
    (taught,) = made.coverage
    rows = taught.rows
    assert rows.rows == len(rows_file.read_text().splitlines()) and rows.refused == 0
    assert rows.student_tokens > rows.one_to_one > 0 and 0 < rows.one_to_one_groups <= 1
    assert sum(rows.kind_shares().values()) == pytest.approx(1)
    figures = taught.figures()
    assert figures["masked student tokens"] == rows.student_masked
    assert taught.classes.classes > 200 and 0 < taught.classes.pairs <= 1
    assert not (tmp_path / "run").exists(), "a plan makes no run folder"
    assert all(name.startswith("cache/") for name in files(tmp_path))
    again = plan(config, quiet())
    assert again.coverage[0].figures() == figures


def test_rows_of_which_too_little_is_one_to_one_are_counted(bridged, tmp_path):
    rows = tmp_path / "mixed.jsonl"
    alike, apart = "z q z q", "dog dog dog"  # bytes are tokens of both; " dog" is a token of the student alone
    rows.write_text(
        "".join(json.dumps({"instruction": "say", "output": text}) + "\n" for text in (alike, apart, alike))
    )
    config = bridged(
        data={"train": [str(rows)], "eval": []},
        teacher={"cross_tokenizer": {"min_coverage": 0.8}},
        loss={"sft_weight": 0.5},
    )
    made = plan(config, quiet())
    assert made.can_start and any("1 of 3 rows have no teacher" in found.what for found in made.findings)
    (taught,) = made.coverage
    assert (taught.rows.rows, taught.rows.below, taught.rows.refused) == (3, 1, 0)
    assert taught.rows.student_masked > 0 and taught.rows.teacher_masked == 0


def test_the_command_shows_the_coverage_and_says_by_its_exit_code_whether_the_run_can_start(bridged, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(bridged()))
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    for said in ("max_steps: 6", "ok   ", "1-1 of student tokens", "numbers kept", "groups of", "this run can start"):
        assert said in shown.stdout
    wrong = CliRunner().invoke(app, ["plan", str(path), "data.max_tokens=5"])
    assert wrong.exit_code == 2 and "this run cannot start" in wrong.stdout and "bad  " in wrong.stdout


@pytest.fixture
def two(tmp_path, model_factory, rows_file, server, stranger):
    """Changes of the second teacher -> a config of two, of which the second has another tokenizer and is called otherwise than by its server."""

    def build(**second):
        far = {"alias": "far", "address": stranger.address, "wait_s": 0, "cross_tokenizer": {"min_coverage": 0}}
        teachers = [{"alias": "near", "address": server.address, "tags": ["t"]}, far | second]
        sources = [{"path": str(rows_file), "tags": ["t"]}, {"path": f"{rows_file}#2", "tags": ["u"]}]
        tree = run_config(tmp_path, model_factory("qwen2"), rows_file, teachers=teachers, data={"train": sources})
        return parse_config(tree, "test")

    return build


def test_each_of_several_teachers_is_told_by_what_the_run_calls_it(two):
    console = quiet()
    made = plan(two(), console)
    assert made.can_start, [found for found in made.findings if not found.ok]
    assert {"teachers.near", "teachers.far"} <= {found.setting for found in made.findings}
    assert "note: far has another tokenizer than the student" in console.file.getvalue()


def test_rows_of_a_teacher_that_does_not_answer_are_not_told_as_without_one(two, server):
    for second in ({"address": "127.0.0.1:1"}, {"address": server.address, "name": "nobody"}):
        made = plan(two(**second, tags=["u"]), quiet())
        (bad,) = (found for found in made.findings if not found.ok)
        assert bad.setting == "teachers.far" and bad.what.startswith("teacher 'far': ")
        assert not [found for found in made.findings if "have no teacher" in found.what]


def test_advice_is_shown_once(two, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(two()))
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    (line,) = (line for line in shown.stdout.splitlines() if "nothing is measured with it" in line)
    assert line.count("teacher 'near' is asked about") == 1
