"""Trackers: what they are told, that a resumed run goes on in them, that no secret reaches them, and that their trouble is theirs."""

import importlib.machinery
import importlib.util
import io
import json
import os
import sqlite3
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from student_trainer.errors import ConfigError, RunError
from student_trainer.training.run import train
from student_trainer.training.tracking.own import TRACKERS_NAME, public_config
from student_trainer.training.tracking.trackers import make_trackers

SECRET = "hf_verysecret0123456789"


def quiet():
    return Console(file=io.StringIO(), width=300)


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_trackio_is_told_the_run_and_a_resumed_one_goes_on_there(config_of, tmp_path, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("LYCEUM_TOKEN", SECRET)
    config = config_of(
        train={"max_steps": 4, "report_to": "auto", "project": "of-a-test", "save_steps": 2, "eval_steps": 2}
    )
    folder = train(config, console=quiet()).output_dir
    name = json.loads((folder / TRACKERS_NAME).read_text())["trackio"]
    assert name.startswith("run-")
    (folder / "result.json").unlink()
    for step in ("checkpoint-4",):
        (folder / step / "COMPLETE").write_text("")  # damaged
    train(config, resume=True, console=quiet())
    runs = {run.name: run for run in trackio.Api().runs("of-a-test")}
    assert set(runs) == {name}
    database = Path(os.environ["TRACKIO_DIR"]) / "of-a-test.db"
    with sqlite3.connect(database) as connection:
        found = connection.execute("select step, metrics from metrics order by id").fetchall()
    rows = [(step, figures if isinstance(figures, str) else bytes(figures).decode()) for step, figures in found]
    logged = {step: json.loads(figures) for step, figures in rows if "train/loss" in figures}
    assert (
        set(logged) == {1, 2, 3, 4} and {"train/kd_loss", "train/tokens_per_s", "train/wait_share"} <= logged[1].keys()
    )
    assert any("eval/kl_to_teacher" in figures for _, figures in rows)
    assert runs[name].config["train"]["max_steps"] == 4, "our settings, not those of transformers"
    assert SECRET.encode() not in everything_in(folder) + database.read_bytes()
    assert capsys.readouterr().out == "", "standard output is a program's"


def test_auto_without_trackio_is_one_note_and_the_run_goes_on(config_of, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "trackio" else found(name, *rest)
    )
    told = []
    assert make_trackers(config_of(train={"report_to": "auto"}), told.append) == []
    assert len(told) == 1 and "trackio is not installed" in told[0] and "train.report_to=none" in told[0]
    assert make_trackers(config_of(train={"report_to": ["none"]}), told.append) == [] and len(told) == 1
    with pytest.raises(ConfigError, match="'trackio' cannot be used: it is not installed: pip install trackio"):
        make_trackers(config_of(train={"report_to": "trackio"}), told.append)


@pytest.mark.parametrize("named", [False, True])
def test_trackio_that_does_not_begin_ends_only_a_run_that_named_it(config_of, monkeypatch, named):
    trackio = pytest.importorskip("trackio")

    def fails(**_):
        raise OSError("the database is locked")

    monkeypatch.setattr(trackio, "init", fails)
    shown = quiet()
    config = config_of(train={"max_steps": 2, "report_to": "trackio" if named else "auto"})
    if named:
        with pytest.raises(RunError, match="'trackio' does not begin: OSError: the database is locked"):
            train(config, console=shown)
        assert not config.run.output_dir.exists()
    else:
        assert train(config, console=shown).steps == 2
        assert shown.file.getvalue().count("is told nothing more: OSError: the database is locked") == 1


class FakeWandb(types.ModuleType):
    """Records calls; the real package in offline mode was tried by hand (docs/train/tracking.md)."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls, self.id = [], "abc"

    def init(self, **settings):
        self.calls.append(("init", settings))
        return self

    def log(self, figures, step):
        self.calls.append(("log", step))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


def test_wandb_is_told_the_same_and_a_run_that_breaks_off_is_ended(config_of, monkeypatch):
    with_it = {"report_to": "wandb", "max_steps": 4, "save_steps": 2, "project": "ours"}
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ConfigError, match="'wandb' cannot be used: it is not installed: pip install wandb"):
            train(config_of(train=with_it), console=quiet())
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    from student_trainer.training.trainer import DistillationTrainer

    plain = DistillationTrainer.compute_loss

    def dying(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(train=with_it), console=quiet())
    begun = dict(wandb.calls)["init"]
    assert begun["project"] == "ours" and begun["id"] is None and begun["config"]["train"]["max_steps"] == 4
    assert [call for call in wandb.calls if call[0] == "log"] == [("log", 1), ("log", 2), ("log", 3)]
    assert wandb.calls[-1] == ("finish", 1)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", plain)
    train(config_of(train=with_it), resume=True, console=quiet())
    again = [settings for name, settings in wandb.calls if name == "init"][-1]
    assert again["id"] == "abc" and again["resume"] == "allow" and wandb.calls[-1] == ("finish", 0)


def test_what_looks_like_a_secret_is_masked(config_of):
    config = config_of(
        data={
            "template_kwargs": {
                "api_key": SECRET,
                "tools": [{"url": f"https://me:{SECRET}@host/x"}],
                "enable_thinking": True,
            }
        }
    )
    shown = json.dumps(public_config(config))
    assert SECRET not in shown and '"api_key": "***"' in shown and "https://***@host/x" in shown
    assert '"enable_thinking": true' in shown and '"max_tokens": 100' in shown and "LYCEUM_TOKEN" in shown
