"""`check` asks nobody: not the hub either."""

import socket

import pytest

from student_trainer.cli.configs.check import _model
from student_trainer.config.run import parse_config
from student_trainer.findings import Findings


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def found(path):
    tree = {"run": {"output_dir": "x"}, "model": {"path": str(path)}, "data": {"train": ["x"]}, "teacher": {"address": "127.0.0.1:1"}}  # fmt: skip
    findings = Findings(stops=False)
    _model(findings, parse_config(tree, "check"))
    (one,) = findings.all
    return one


def test_a_hub_id_that_was_never_fetched_is_left_to_plan(no_network):
    one = found("nobody/has-this-model")
    assert one.ok and "`plan` and `train` ask the hub" in one.fix and "nobody/has-this-model" in one.fix


def test_an_adapter_that_was_fetched_is_read(no_network, monkeypatch):
    import huggingface_hub

    kept = {"adapter_config.json"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _id, name, **_: "x" if name in kept else None)
    assert "has not been fetched" not in found("nobody/has-this-adapter").what
    kept.clear()
    assert "has not been fetched" in found("nobody/has-this-adapter").what


def test_a_mistyped_folder_is_bad_at_once(no_network, tmp_path):
    for path in ("smal", tmp_path / "none", "./none"):
        one = found(path)
        assert not one.ok and str(path).removeprefix("./") in one.what


def test_a_folder_is_read(no_network, model_factory):
    assert found(model_factory("qwen2")).ok
