"""What every command of `teacher-server` has in common, and what `up` says of itself."""

from __future__ import annotations

import json
import re
import sys

import pytest
import yaml
from typer.testing import CliRunner

from teacher_server.cli.frame.habits import positional
from teacher_server.cli.journal import Journal
from teacher_server.cli.main import COMMANDS, app, main
from teacher_server.control import preflight
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve

runner = CliRunner()
FAKE = {"edge": {"port": 50999}, "teachers": [{"name": "fake", "backend": {"kind": "fake"}}]}


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["teacher-server", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump(FAKE))
    return path


def test_forms_of_arguments():
    typed = ["--set", "a=1", "--config", "c.yaml", "b=2", "--set=c=3", "--json"]
    assert positional(typed, has_config=True, has_overrides=True) == ["c.yaml", "a=1", "b=2", "c=3", "--json"]
    assert positional(["--config", "x"], has_config=False, has_overrides=False) == ["--config", "x"]


@pytest.mark.parametrize(
    "command", [found for found in COMMANDS if not found.is_hidden], ids=lambda command: command.name
)
def test_help_of_every_command_has_examples_and_a_short_form(command):
    assert command.examples
    assert all(f"{example} ".startswith(f"teacher-server {command.name} ") for example in command.examples)
    shown = runner.invoke(app, [command.name, "-h"])
    assert shown.exit_code == 0
    assert "Examples:" in shown.output


def test_the_root_shows_no_hidden_command_and_the_version():
    assert "guard" not in runner.invoke(app, ["--help"]).output
    assert runner.invoke(app, ["--version"]).output == "teacher-server 0.1.0 (protocol 2)\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["check", "CONFIG", "edge.prot=1"], 2, "edge.prot: unknown key; did you mean port?"),
        (["check", "CONFIG", "teachers.0.nam=x"], 2, "did you mean name?"),
        (["chek", "CONFIG"], 2, "Did you mean 'check'?"),
        (["up", "none.yaml"], 2, "none.yaml: No such file or directory"),
        (["describe", "--address", "127.0.0.1:9"], 75, "127.0.0.1:9"),
        (["status", "--address", "127.0.0.1:9"], 75, "127.0.0.1:9"),
        (["describe", "--address", "nowhere"], 2, "HOST:PORT"),
    ],
)
def test_what_must_be_changed_is_2_and_what_may_be_tried_again_is_75(
    config_file, arguments, code, said, monkeypatch, capsys
):
    found, _, told = call(monkeypatch, capsys, *(config_file if word == "CONFIG" else word for word in arguments))
    assert found == code, told
    assert said in " ".join(told.split())
    assert "Traceback" not in told


def test_check_and_config_as_json(config_file, monkeypatch, capsys):
    code, said, _ = call(monkeypatch, capsys, "check", "--config", config_file, "--set", "edge.port=50998", "--json")
    assert code == 0, said
    assert json.loads(said)["address"] == "127.0.0.1:50998"
    code, said, _ = call(monkeypatch, capsys, "check", config_file, "edge.port=0", "--json")
    assert code == 2
    assert "edge.port" in json.loads(said)["error"]
    _, said, _ = call(monkeypatch, capsys, "config", "show", config_file, "edge.drain_s=7")
    assert yaml.safe_load(said)["edge"]["drain_s"] == 7


def test_describe_as_json(monkeypatch, capsys):
    with serve(FakeTeacher(vocab_rows=64)) as server:
        code, said, _ = call(monkeypatch, capsys, "describe", "--address", server.address, "--json")
    found = json.loads(said)
    assert code == 0
    assert (found["teachers"][0]["name"], found["teachers"][0]["vocab_rows"]) == ("fake", 64)


@pytest.mark.parametrize(
    ("changes", "named"), [({"num_gpus": 1}, "num_gpus=1"), ({"backend": {"kind": "transformers", "model": "m/m", "device": "cuda:0"}}, "backend.device=cuda:0")]
)  # fmt: skip
def test_check_names_a_gpu_that_is_not_there(config_file, changes, named, monkeypatch, capsys):
    config_file.write_text(yaml.safe_dump({**FAKE, "teachers": [{**FAKE["teachers"][0], **changes}]}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, said = call(monkeypatch, capsys, "check", config_file)
    assert code == 2
    assert f"teachers.fake.{named}: asks for a GPU, and CUDA_VISIBLE_DEVICES is empty" in said
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(preflight, "_GPU_DEVICES", ("null",))  # as if there were one
    assert call(monkeypatch, capsys, "check", config_file)[0] == 0
    config_file.write_text(yaml.safe_dump({**FAKE, "ray": {"address": "10.0.0.1:6379"}}))
    assert call(monkeypatch, capsys, "check", config_file)[0] == 0


def test_what_the_server_says_has_time_and_level(capsys):
    Journal("text").say("ready on 127.0.0.1:1")
    Journal("text").say("demo: cannot come up: no memory; taken away")
    ready, trouble = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO    teacher-server ready on 127\.0\.0\.1:1", ready)
    assert " WARNING teacher-server demo: cannot" in trouble
    Journal("json").error("the “end”\nof it")
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["source"], line["message"]) == ("error", "teacher-server", "the “end”\nof it")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
