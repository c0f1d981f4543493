"""`best` and `last`: what they stand for, over rotation, resumption, and file systems without links."""

import io
import json
import os

import pytest
from rich.console import Console

from student_trainer.errors import ConfigError
from student_trainer.training.checkpoints import checkpoint, links
from student_trainer.training.run import train


def made(folder, *steps):
    for step in steps:
        place = folder / f"checkpoint-{step}"
        place.mkdir()
        (place / checkpoint.MARKER).write_text("{}")
    return folder


def history(**figures):
    return [{"step": int(step[1:]), "eval_nll_per_byte": value} for step, value in figures.items()]


def test_best_is_the_lowest_or_of_accuracies_the_highest_and_the_earliest_of_equals(tmp_path):
    folder = made(tmp_path, 2, 4, 6, 8)
    best = links.best_of(folder, history(s2=2.0, s4=1.0, s6=1.0, s8=float("nan"), s99=0.1), "nll_per_byte")
    assert best == folder / "checkpoint-4"
    accuracies = [{"step": 2, "eval_acc1": 0.5}, {"step": 4, "eval_acc1": 0.7}, {"step": 6, "eval_acc1": None}]
    assert links.best_of(folder, accuracies, "acc1") == folder / "checkpoint-4"
    assert links.best_of(folder, accuracies, "nll_per_byte") is None


@pytest.mark.parametrize("has_links", [True, False])
def test_a_link_is_relative_and_moves_with_its_folder(tmp_path, monkeypatch, has_links):
    (tmp_path / "run").mkdir()
    folder = made(tmp_path / "run", 2, 4)
    if not has_links:
        monkeypatch.setattr(os, "symlink", lambda *a, **k: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    for step in (2, 4, 4):
        links.point(folder, "best", folder / f"checkpoint-{step}")
        assert links.resolve(folder, "best") == folder / f"checkpoint-{step}"
    assert (folder / "best").is_symlink() == has_links
    assert not list(folder.glob(".best*")), "nothing half-made stays"
    moved = folder.rename(tmp_path / "moved")
    assert links.resolve(moved, "best") == moved / "checkpoint-4"
    links.point(moved, "best", None)
    assert not os.path.lexists(moved / "best")


def test_what_somebody_else_called_best_stays(tmp_path):
    folder, told = made(tmp_path, 2), []
    (folder / "best").write_text("my notes\n")
    (folder / "last").mkdir()
    for name in ("best", "last"):
        links.point(folder, name, folder / "checkpoint-2", told.append)
    assert (folder / "best").read_text() == "my notes\n" and (folder / "last").is_dir() and len(told) == 2
    assert links.resolve(folder, "best") is None


def test_the_best_checkpoint_is_kept_and_found_again(config_of, tmp_path, monkeypatch):
    """The figures are made worse from step 4 on; with one checkpoint kept, the best one is kept beside it."""
    from student_trainer.training import run
    from student_trainer.training.trainer import DistillationTrainer

    measured, running = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}, []

    class Watched(DistillationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            running[:] = [self]

    monkeypatch.setattr(run, "DistillationTrainer", Watched)
    monkeypatch.setattr(run, "measuring", lambda *_: lambda: {"nll_per_byte": measured[running[0].state.global_step]})
    config = config_of(train={"max_steps": 8, "eval_steps": 2, "save_steps": 2, "keep_checkpoints": 1})
    folder = train(config, console=Console(file=io.StringIO())).output_dir
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert os.readlink(folder / "best") == "checkpoint-4" and os.readlink(folder / "last") == "checkpoint-8"
    # The end is lost, and the newest checkpoint damaged: the run goes on from the best one and finds it again.
    (folder / "result.json").unlink()
    (folder / "checkpoint-8" / "optimizer.safetensors").unlink()
    train(config, resume=True, console=Console(file=io.StringIO()))
    assert os.readlink(folder / "best") == "checkpoint-4" and os.readlink(folder / "last") == "checkpoint-8"
    assert json.loads((folder / "result.json").read_text())["steps"] == 8


def test_a_figure_that_is_not_measured_is_told_of_once(config_of):
    shown = Console(file=io.StringIO(), width=300)
    config = config_of(train={"max_steps": 4, "eval_steps": 2, "save_steps": 2, "best_metric": "kl_to_nobody"})
    folder = train(config, console=shown).output_dir
    assert (
        shown.file.getvalue().count("train.best_metric=kl_to_nobody is not among the held-out figures (nll_per_byte")
        == 1
    )
    assert not os.path.lexists(folder / "best") and os.readlink(folder / "last") == "checkpoint-4"
    with pytest.raises(ConfigError, match="best_metric: is no held-out figure"):
        config_of(train={"best_metric": "loss"})
