"""What every command of `student-trainer` has in common: forms of its arguments, help, completion, exit codes, JSON."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from student_trainer.cli.frame.habits import positional
from student_trainer.cli.main import COMMANDS, app, main
from student_trainer.config.run import parse_config
from student_trainer.errors import RunError
from student_trainer.training.run import train
from tests.student_trainer.conftest import run_config

runner = CliRunner()


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["student-trainer", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.fixture
def config_file(tmp_path, model_factory, rows_file):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(run_config(tmp_path, model_factory("qwen2"), rows_file, "127.0.0.1:9", teacher={"wait_s": 0}))
    )
    return path


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        (["c.yaml", "a=1"], ["c.yaml", "a=1"]),
        (["--config", "c.yaml", "--set", "a=1", "b=2", "--set=a=3"], ["c.yaml", "a=1", "b=2", "a=3"]),
        (["a=1", "--resume", "--config=c.yaml"], ["c.yaml", "a=1", "--resume"]),
        (["c.yaml", "--resume", "auto", "a=1"], ["c.yaml", "--resume", "a=1"]),
        (["c.yaml", "--resume=auto"], ["c.yaml", "--resume"]),
        (["c.yaml", "--resume", "no"], ["c.yaml"]),
        (["c.yaml", "--resume=maybe"], ["c.yaml", "--resume=maybe"]),
        (["c.yaml", "--set"], ["c.yaml", "--set"]),
        (["--", "--config"], ["--", "--config"]),
    ],
)
def test_forms_of_arguments(typed, plain):
    assert positional(typed, has_config=True, has_overrides=True, resume_is_flag=True) == plain


def test_a_command_whose_resume_takes_a_word_gets_one():
    typed = ["c.yaml", "--resume", "a=1"]
    assert positional(typed, has_config=True, has_overrides=True, resume_is_flag=False) == [
        "c.yaml",
        "--resume=auto",
        "a=1",
    ]
    assert positional(["--config", "x"], has_config=False, has_overrides=False, resume_is_flag=None) == [
        "--config",
        "x",
    ]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_every_command_has_examples_and_a_short_form(command):
    assert command.examples, "a line of COMMANDS without examples"
    assert all(f"{example} ".startswith(f"student-trainer {command.name} ") for example in command.examples)
    shown = runner.invoke(app, [command.name, "-h"])
    assert shown.exit_code == 0
    assert "Examples:" in shown.output


def test_the_version_is_the_packages():
    assert runner.invoke(app, ["--version"]).output == "student-trainer 0.1.0 (protocol 2)\n"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("student-trainer tr", ["train", "traces"]),
        ("student-trainer train --res", ["--resume", "--resume-from"]),
        ("student-trainer cache pr", ["prune"]),
        ("student-trainer plan --se", ["--set"]),
    ],
)
def test_completion_knows_commands_and_options_of_commands_that_are_not_loaded(words, found):
    asked = {
        "_STUDENT_TRAINER_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    shown = runner.invoke(app, [], env=asked, prog_name="student-trainer")
    assert shown.output.split() == found


def test_a_config_in_every_form_is_the_same(config_file, monkeypatch, capsys):
    _, one, _ = call(monkeypatch, capsys, "config", "show", config_file, "train.epochs=2", "train.epochs=3")
    _, other, _ = call(
        monkeypatch,
        capsys,
        "config",
        "show",
        "--set",
        "train.epochs=2",
        "--config",
        config_file,
        "--set",
        "train.epochs=3",
    )
    assert one == other
    assert yaml.safe_load(one)["train"]["epochs"] == 3
    _, as_json, _ = call(monkeypatch, capsys, "config", "show", config_file, "--json")
    assert json.loads(as_json)["model"]["lora"]["rank"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "RUN", "train.learning_rat=1"], 2, "train.learning_rat: unknown key; did you mean learning_rate?"),
        (["train", "RUN", "trian.epochs=1"], 2, "trian: unknown key; did you mean train?"),
        (["train", "RUN", "other.yaml"], 2, "override 'other.yaml': expected section.field=value"),
        (["trian", "RUN"], 2, "Did you mean 'train'?"),
        (["train", "RUN", "--resum"], 2, "--resume"),
        (["train", "none.yaml"], 2, "none.yaml: No such file or directory"),
        (["train", "RUN", "--resume=maybe"], 2, "does not take a value"),
        (["train", "RUN", "--resume-from", "checkpoint-3"], 2, "--resume-from checkpoint-3: no such folder"),
        (["train", "RUN", "--allow-other-teachers"], 2, "add --resume"),
        (["train", "RUN"], 75, "127.0.0.1:9"),  # nobody listens there: the same line works once somebody does
        (["label", "RUN"], 75, "127.0.0.1:9"),
    ],
)
def test_what_must_be_changed_is_2_and_what_may_be_tried_again_is_75(
    config_file, arguments, code, said, monkeypatch, capsys
):
    found, _, told = call(monkeypatch, capsys, *(config_file if word == "RUN" else word for word in arguments))
    assert found == code, told
    assert said in " ".join(told.split())
    assert "Traceback" not in told


def test_check_asks_nobody_and_names_what_is_wrong(config_file, monkeypatch, capsys):
    code, said, _ = call(monkeypatch, capsys, "check", config_file)
    assert code == 0, said
    assert "fine" in said
    wrong = [
        "data.train=[none.jsonl]",
        "model.path=nowhere",
        "train.report_to=[nothing]",
        f"run.output_dir={config_file}",
    ]
    code, said, _ = call(monkeypatch, capsys, "check", config_file, "--json", *wrong)
    found = json.loads(said)
    assert code == 2
    assert not found["ok"]
    bad = {finding["setting"] for finding in found["findings"] if not finding["ok"]}
    assert bad == {"data.train[0]", "model.path", "train.report_to", "run.output_dir"}


def test_check_says_that_a_config_is_meant_for_a_gpu(config_file, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said, _ = call(monkeypatch, capsys, "check", config_file, "model.dtype=bfloat16", "train.bf16=true")
    assert code == 0
    assert "this machine has no GPU" in said
    code, said, _ = call(monkeypatch, capsys, "check", config_file, "model.attention=flash_attention_2")
    assert code == 2
    assert "model.attention=flash_attention_2" in said


def test_train_goes_on_from_a_checkpoint_that_is_named(config_of, monkeypatch, capsys, tmp_path):
    from tests.student_trainer.training.test_train import adapter_hash

    config = config_of(train={"max_steps": 6, "keep_checkpoints": 5}, data={"eval": []})
    folder = config.run.output_dir
    train(config)
    undisturbed = adapter_hash(folder)
    (folder / "result.json").unlink()  # as if it had been killed behind the last checkpoint
    shutil.rmtree(folder / "final")
    with pytest.raises(
        RunError, match=r"is no checkpoint of the run.*there are: checkpoint-2, checkpoint-4, checkpoint-6"
    ):
        train(config, resume=tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    code, out, said = call(monkeypatch, capsys, "train", file, "--resume-from", folder / "checkpoint-2", "--json")
    assert code == 0, said
    assert "resuming at step 2" in said
    assert "checkpoint-6 is newer than checkpoint-2" in " ".join(said.split())
    assert {path.name for path in folder.glob("before-*")} == {"before-checkpoint-4", "before-checkpoint-6"}
    assert adapter_hash(folder) == undisturbed
    assert json.loads(out)["steps"] == 6
    steps = [json.loads(line)["step"] for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert sorted(steps) == steps


def test_importing_the_api_and_help_load_nothing_heavy():
    code = "import sys, student_trainer.api; sys.exit(bool({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_loads_no_config_and_no_arrays(command):
    """Typer's own pages take a third of a second; the models of a config, or numpy, would double that."""
    code = (
        "import contextlib, io, sys\n"
        f"sys.argv = ['student-trainer', {command!r}, '--help']\n"
        "from student_trainer.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'grpc', 'yaml', 'student_trainer.config'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--learning_rate", "train.learning_rate=..."), ("--max-steps", "train.max_steps=..."), ("--frobnicate", None)],
)
def test_an_option_that_is_a_setting_is_told_as_one(command, typed, meant):
    """As they are typed after other trainers."""
    told = " ".join(runner.invoke(app, [command, "run.yaml", typed, "1"]).output.replace("│", " ").split())
    assert f"No such option: {typed}" in told
    assert (f"settings are written behind the config: {meant}" in told) if meant else "settings" not in told


@pytest.mark.parametrize("house", ["student", "teacher"])
def test_an_interrupt_is_one_line_wherever_it_comes(monkeypatch, capsys, house):
    """While a command is imported, and before there is a table of commands."""
    package, name = (
        ("student_trainer", "student-trainer") if house == "student" else ("teacher_server", "teacher-server")
    )
    start = importlib.import_module(f"{package}.cli.__main__").start

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [name, "doctor"])
    table = importlib.import_module(f"{package}.cli.frame.table")
    monkeypatch.setattr(table, "adopt", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            start()
        assert end.value.code == 130 and capsys.readouterr().err == f"{name}: interrupted\n"
        monkeypatch.setattr(f"{package}.cli.main.main", interrupted)


def test_plain_data_is_parsed_alike(config_file):
    tree = yaml.safe_load(config_file.read_text())
    assert parse_config(tree, "x").train.max_steps == 6
