"""`student-trainer plan`: config, findings and coverage of a run that is not made; nothing on disk but the cache changes."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from student_trainer.cli.main import app
from student_trainer.config.run import dump_config, parse_config
from student_trainer.errors import ConfigError
from student_trainer.planning.budget import candidates, changed
from student_trainer.planning.memory import Card, parse_size
from student_trainer.planning.plan import Asked, plan
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
    odd = CliRunner().invoke(app, ["plan", str(path), "data.system_prompt='[INST] be [/b] nice'"])
    assert odd.exit_code == 0 and "system_prompt: '[INST] be [/b] nice'" in odd.stdout, odd.output
    assert "reason_prefix: '[reason] '" in odd.stdout, "the config as it is, not as markup"
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


def test_rows_are_shown_with_what_is_learned_of_them_and_traffic_is_weighed(config_of, tmp_path):
    config = config_of(data={"max_tokens": 100})
    before = set(files(tmp_path))
    made = plan(config, quiet(), Asked(samples=3))
    assert {name for name in set(files(tmp_path)) - before if not name.startswith("cache/")} == set()
    assert len(made.samples) == 3 and all(sample.reader == "student" for sample in made.samples)
    for sample in made.samples:
        assert 0 < sample.supervised < sample.tokens
        assert "‹<|im_start|>›" in sample.plain() and "⟦" in sample.plain() and "<|im_end|>⟧" in sample.plain()
    (weighed,) = made.traffic
    assert weighed.kinds == ("hidden",) and weighed.measured is not None and weighed.measured.requests == 3
    per_row = 24 * 2  # width and bytes of a number, of the fake teacher
    assert (
        weighed.targets * per_row
        <= weighed.epoch_bytes
        <= weighed.targets * (per_row * 2 + 16) + 5 * weighed.tokens + 4096
    )
    assert weighed.disk_bytes > weighed.targets * per_row
    teachers, student = made.hours
    assert teachers is not None and student is None
    assert made.rows is not None and made.rows.micro_batches == 12
    assert made.memory is not None and made.memory.parts["teachers' heads"] == 300 * 24 * 4


def test_rows_left_out_are_counted_and_named(config_of, rows_file, tmp_path):
    bad = tmp_path / "some.jsonl"
    good = rows_file.read_text().splitlines()[:4]
    long = json.dumps({"instruction": "say", "output": "the cat " * 300})
    bad.write_text("\n".join([*good, json.dumps({"nothing": 1}), long]) + "\n")
    made = plan(config_of(data={"train": [str(bad)], "eval": [], "bad_rows": "skip", "overlong": "drop"}), quiet())
    assert made.rows is not None
    assert (made.rows.refused, made.rows.overlong) == (1, 1)
    assert "some.jsonl:5" in made.rows.refused_first[0] and "some.jsonl:6" in made.rows.overlong_first[0]


def test_a_teacher_that_is_told_more_has_its_own_samples(config_of, rows_file, tmp_path):
    rows = tmp_path / "hints.jsonl"
    rows.write_text(
        "".join(
            json.dumps(json.loads(line) | {"hint": "look left"}) + "\n" for line in rows_file.read_text().splitlines()
        )
    )
    made = plan(
        config_of(data={"train": [str(rows)], "eval": []}, teacher={"context": {"field": "hint"}}),
        quiet(),
        Asked(samples=1),
    )
    student, teacher = made.samples
    assert "look left" in teacher.plain() and "look left" not in student.plain()
    assert teacher.supervised == student.supervised and teacher.tokens > student.tokens


def test_above_the_budget_the_first_settings_that_fit_are_named(config_of, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config_of(model={"lora": None})))
    runner = CliRunner()
    fits = runner.invoke(app, ["plan", str(path), "--budget", "24GiB", "--json"])
    assert fits.exit_code == 0, fits.output
    told = json.loads(fits.stdout)
    assert told["can_start"] and not told["over_budget"] and told["memory"]["on_card"] < 24 << 30
    assert told["hours"]["student"] is None and len(told["samples"]) == 5 and told["teachers"]
    needed = told["memory"]["on_card"] / 2**20
    above = runner.invoke(app, ["plan", str(path), "--budget", f"{needed - 0.1:.3f}MiB", "--json"])
    assert above.exit_code == 1 and "above the budget" in above.stderr
    way = json.loads(above.stdout)["way_out"]
    assert way is not None and way["on_card"] <= (needed - 0.1) * 2**20 + 1
    nothing = runner.invoke(app, ["plan", str(path), "--budget", "1MiB", "--json"])
    assert nothing.exit_code == 1 and json.loads(nothing.stdout)["way_out"] is None
    assert any("no change of chunks" in found["fix"] for found in json.loads(nothing.stdout)["findings"])


def test_candidates_come_by_their_cost_and_are_whole_configs(config_of):
    config = config_of(train={"batch_size": 8, "accumulation": 2}, loss={"chunk_mb": 1024})
    found = list(candidates(config))
    assert found[0] == {"loss.chunk_mb": 512}
    other = changed(config, {"train.batch_size": 2, "train.accumulation": 8, "model.gradient_checkpointing": True})
    assert other.train.batch_size * other.train.accumulation == 16 and other.model.gradient_checkpointing
    assert {"train.batch_size": 4, "train.accumulation": 4} in found
    assert config.train.batch_size == 8, "a config is never written to"
    learned_otherwise = [changes for changes in candidates(config_of(model={"lora": None})) if "model.lora" in changes]
    assert learned_otherwise and "model.lora" not in next(iter(candidates(config_of(model={"lora": None}))))


def test_sizes_are_read_or_refused():
    assert parse_size("24GiB", "--card") == parse_size("24", "--card") == parse_size("24 gb", "--card") == 24 << 30
    for wrong in ("24 apples", "", "0", "-3GiB", "nan"):
        with pytest.raises(ConfigError, match="--budget"):
            parse_size(wrong, "--budget")
    assert Card.of("8GiB", None).is_gpu and Card.of("8GiB", None).bytes == 8 << 30


def test_a_run_that_is_there_is_compared_with_the_config(config_of, tmp_path, server):
    from student_trainer.training.run import train

    config = config_of(train={"max_steps": 2, "save_steps": 2})
    train(config, console=quiet())
    before = files(tmp_path / "run")
    same = plan(config, quiet(), Asked(resume=True, samples=0))
    assert same.can_start, [found.what for found in same.findings if not found.ok]
    assert any("its weights were not read" in found.what for found in same.findings)
    other = plan(
        config_of(train={"max_steps": 2, "save_steps": 2, "learning_rate": 3e-3}),
        quiet(),
        Asked(resume=True, samples=0),
    )
    assert [found.what for found in other.findings if not found.ok and "other settings" in found.what]
    assert files(tmp_path / "run") == before
