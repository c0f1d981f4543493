"""Runs that are interrupted, by a signal as the commands take it: what is kept, what is not, and that the end is the uninterrupted one's."""

import asyncio
import io
import json
import os
import signal
import time

import pytest
from rich.console import Console
from transformers import TrainerCallback

from student_trainer.config.run import parse_config
from student_trainer.errors import RunError
from student_trainer.interruption import interrupted_in_order
from student_trainer.rollout.engines.hf_sampler import HfSampler
from student_trainer.training.checkpoints import checkpoint
from student_trainer.training.run import train
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import run_config
from tests.student_trainer.training.test_train import adapter_hash, losses

UNINTERRUPTED = {}
HALF = {"share": 0.5, "max_new_tokens": 5}


class Words(TrainerCallback):
    """Says so many words in the middle of a step."""

    def __init__(self, step, words=1):
        self.step, self.words = step, words

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.words):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def go(tmp_path, model_factory, rows_file, fake):
    """(name, sections) -> the config of a run of 6 steps without checkpoints, and the run."""
    with serve(fake) as server:

        def run(name, *, resume=False, callbacks=(), console=None, **sections):
            where = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / f"{name}-cache")}
            sections = {"data": {"eval": []}, "model": {"compiled": False}, "train": {"save_steps": 0}} | sections
            tree = run_config(tmp_path, model_factory("qwen2"), rows_file, server.address, run=where, **sections)
            config, console = parse_config(tree, "test"), console or Console(file=io.StringIO(), width=400)
            with interrupted_in_order(lambda: None):
                train(config, resume=resume, console=console, callbacks=callbacks)
            return config.run.output_dir

        def straight(**more):
            """Losses and weights of the uninterrupted run, made once for all tests."""
            if str(more) not in UNINTERRUPTED:
                folder = run("straight", **more)
                UNINTERRUPTED[str(more)] = losses(folder), adapter_hash(folder)
            return UNINTERRUPTED[str(more)]

        run.folder, run.straight = tmp_path, straight
        yield run


def kept(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def silent_after(answers, go, fake, **more):
    """The folder of a run that is interrupted when its teacher has stopped answering."""
    score, calls, told = fake.score, fake.calls, []

    async def silent(call):
        if fake.calls - calls < answers:
            return await score(call)
        if not told:
            told.append(os.kill(os.getpid(), signal.SIGINT))
        return await asyncio.sleep(3600)

    fake.score = silent
    with pytest.raises(KeyboardInterrupt):
        go("broken", **more)
    fake.score = score
    return go.folder / "broken"


RELATIVES = [
    {},
    *({"on_policy": HALF | {"max_staleness": old}} for old in (0, 2)),
    {"labels": {"transport": "top_k", "k": 12, "extra_ids": 4}},
    {"train": {"save_steps": 0, "packing": True}},
]


@pytest.mark.parametrize("more", RELATIVES, ids=str)
def test_a_step_that_is_being_computed_is_finished_and_kept(go, more):
    straight, shown = go.straight(**more), Console(file=io.StringIO(), width=400)
    with pytest.raises(KeyboardInterrupt):
        go("broken", callbacks=[Words(3)], console=shown, **more)
    broken = go.folder / "broken"
    assert kept(broken) == ["checkpoint-4"] and not (broken / "final").exists()
    assert "checkpoint-4 is kept" in shown.file.getvalue()
    go("broken", resume=True, **more)
    assert (losses(broken), adapter_hash(broken)) == straight


@pytest.mark.parametrize("more", [{}, {"on_policy": HALF | {"max_staleness": 2}}], ids=str)
def test_while_labels_are_waited_for_nothing_more_is_waited_for(go, fake, monkeypatch, more):
    """The last whole step is kept, with the rollouts of later ones, which are still being written."""
    sample = HfSampler.sample
    monkeypatch.setattr(HfSampler, "sample", lambda self, prompts: time.sleep(0.3) or sample(self, prompts))
    more = more | {"feed": {"max_batches": 1}}
    straight = go.straight(**more)
    broken = silent_after(7, go, fake, **more)
    (name,) = kept(broken)
    assert 0 < checkpoint.step_of(broken / name) < 6
    go("broken", resume=True, **more)
    assert (losses(broken), adapter_hash(broken)) == straight


@pytest.mark.parametrize("of", ["loss", "eval_nll_per_token"])
def test_an_entry_of_the_log_that_is_being_made_is_made(go, rows_file, of):
    """The word comes while trackers are told: of the step, or of the held-out figures."""

    class WhileLogged(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step == 4 and of in logs:
                os.kill(os.getpid(), signal.SIGINT)

    more = {"data": {"eval": [str(rows_file)]}, "train": {"save_steps": 0, "eval_steps": 2}}
    with pytest.raises(KeyboardInterrupt):
        go("broken", callbacks=[WhileLogged()], **more)
    broken = go.folder / "broken"
    assert kept(broken) == ["checkpoint-4"]
    go("broken", resume=True, **more)
    assert (losses(broken), adapter_hash(broken)) == go.straight(**more)


def test_steps_since_the_last_entry_are_in_one(go, fake):
    """Interrupted while labels are waited for, between two entries: what the next one would have been a mean of."""
    more = {"train": {"save_steps": 0, "log_steps": 3}, "feed": {"max_batches": 1}}
    straight, weights = go.straight(**more)
    broken = silent_after(12, go, fake, **more)  # two to see that it works; 5 steps of 2
    (name,) = kept(broken)
    at = checkpoint.step_of(broken / name)
    assert 3 < at < 6
    go("broken", resume=True, **more)
    means = {entry["step"]: entry["loss"] for entry in losses(broken) if "loss" in entry}
    assert list(means) == [3, at, 6] and adapter_hash(broken) == weights
    whole = {entry["step"]: entry["loss"] for entry in straight if "loss" in entry}
    assert means[3] == whole[3] and (at - 3) * means[at] + (6 - at) * means[6] == pytest.approx(3 * whole[6], rel=1e-5)


def test_figures_are_made_up_for_once(go, rows_file):
    """However often the run is taken up from the same checkpoint before it comes further."""
    more = {"data": {"eval": [str(rows_file)]}, "train": {"save_steps": 0, "eval_steps": 2}}
    for word in (Words(3), Words(4, words=2), Words(4, words=2)):
        with pytest.raises(KeyboardInterrupt):
            go("broken", resume=True, callbacks=[word], **more)
    go("broken", resume=True, **more)
    assert losses(go.folder / "broken") == go.straight(**more)[0]


@pytest.mark.parametrize(
    ("divergence", "recorded", "goes_on"), [("forward_kl", 0.5, True), ("jsd", 0.5, True), ("jsd", 0.3, False)]
)
def test_a_run_begun_when_every_divergence_had_every_parameter_goes_on(go, divergence, recorded, goes_on):
    more = {"loss": {"output": {"divergence": divergence}}}
    with pytest.raises(KeyboardInterrupt):
        go("broken", callbacks=[Words(3)], **more)
    file = go.folder / "broken" / "run.json"
    identity = json.loads(file.read_text())
    identity["settings"] |= {
        "loss.output.beta": recorded,
        "loss.output.normalization": "paper",
        "loss.output.alpha": None,
    }
    file.write_text(json.dumps(identity))
    if not goes_on:
        with pytest.raises(RunError, match=r"loss\.output\.beta: 0\.3 -> 0\.5"):
            go("broken", resume=True, **more)
        return
    go("broken", resume=True, **more)
    assert (losses(go.folder / "broken"), adapter_hash(go.folder / "broken")) == go.straight(**more)


def test_who_asks_twice_waits_for_nothing(go):
    with pytest.raises(KeyboardInterrupt):
        go("broken", callbacks=[Words(3, words=2)])
    assert not kept(go.folder / "broken")
    assert adapter_hash(go("broken", resume=True)) == go.straight()[1]


def test_an_interruption_before_the_first_step_leaves_no_folder(go):
    class AtOnce(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        go("broken", callbacks=[AtOnce()])
    assert not (go.folder / "broken" / "run.json").exists()


def test_the_last_step_may_be_the_one(go):
    with pytest.raises(KeyboardInterrupt):
        go("broken", callbacks=[Words(5)])
    broken = go.folder / "broken"
    assert kept(broken) == ["checkpoint-6"] and not (broken / "final").exists()
    assert adapter_hash(go("broken", resume=True)) == go.straight()[1]


def test_a_checkpoint_that_cannot_be_written_is_the_word_of_the_run(go, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    class Full(Words):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            if state.global_step == self.step:
                monkeypatch.setattr(checkpoint, "save_state", full)

    with pytest.raises(Exception, match="No space left"):
        go("broken", callbacks=[Full(2)])
    assert not kept(go.folder / "broken")


def test_figures_that_were_due_are_made_up_for(go, rows_file):
    """Interrupted in the step after which held-out rows are measured: the log is that of the uninterrupted run."""
    more = {"data": {"eval": [str(rows_file)]}, "train": {"save_steps": 0, "eval_steps": 2}}
    straight = go("straight", **more)
    with pytest.raises(KeyboardInterrupt):
        go("broken", callbacks=[Words(3)], **more)
    go("broken", resume=True, **more)
    assert losses(go.folder / "broken") == losses(straight)
