"""`check` asks nobody: not the hub either."""

import json
import socket

import pytest

from student_trainer.cli.configs.check import _model, _of_run
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


def test_rows_are_read_as_training_reads_them(model_factory, tmp_path):
    """Fields too, but for what the template says of them: a first row without a question and a third without an answer."""
    path = tmp_path / "rows.jsonl"
    good = {"instruction": "Say it.", "output": "It."}
    lines = {"empty": {"instruction": "", "output": "x"}, "half": {"instruction": "x"}, "good": good}
    tree = {"run": {"output_dir": str(tmp_path / "run")}, "model": {"path": str(model_factory("qwen2"))}, "teacher": {"address": "127.0.0.1:1"}}  # fmt: skip
    for rows, policy, bad in (
        (["good", "good"], "refuse", ""),
        (["empty", "good"], "refuse", "rows.jsonl:1"),
        (["good", "half"], "refuse", "rows.jsonl:2"),
        (["good", "half"], "skip", ""),
    ):
        path.write_text("".join(json.dumps(lines[name]) + "\n" for name in rows))
        config = parse_config(tree | {"data": {"train": [str(path)], "bad_rows": policy}}, "check")
        (told,) = [one for one in _of_run(config, False) if one.setting == "data.train[0]" and not one.ok] or [None]
        assert (told is None) == (not bad) and (told is None or bad in told.what), (rows, policy, told)
