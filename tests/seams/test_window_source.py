"""New sources of windows, plugged in by one line in `SOURCES`: a curriculum, and samples that are only made while the run goes on."""

import inspect
import io
import shutil
import threading

import numpy as np
import pytest
from rich.console import Console

from student_trainer.config.run import parse_config
from student_trainer.data.dataset import Example, IndexedExample
from student_trainer.training.run import train
from student_trainer.training.trainer import DistillationTrainer
from student_trainer.training.windows import SOURCES, FixedOrder, MicroBatch, Window
from teacher_wire.core.errors import CancelledRequestError
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config
from tests.student_trainer.training.test_train import adapter_hash, losses

QUIET = Console(file=io.StringIO())


class ShortestFirst(FixedOrder):
    """A curriculum: the rows in order of length, over and over."""

    def __init__(self, data, order):
        super().__init__(data, order)
        self._rows = sorted(data, key=lambda row: (row.example.token_ids.size, row.index))

    def _batch(self, number):
        first = number * self.batch_size
        return MicroBatch.of(number, [self._rows[(first + i) % len(self._rows)] for i in range(self.batch_size)])


class MadeMeanwhile:
    """Samples that do not exist before step `s - 1` is asked for; the teacher is asked about them as soon as they do."""

    def __init__(self, data, order):
        self.steps, self.accumulation, self.batch_size = order.steps, order.accumulation, order.batch_size
        self.batches = order.batches
        self._made, self._changed, self._closed = {}, threading.Condition(), False
        self._make(0)

    def _make(self, step):
        for number in range(step * self.accumulation, (step + 1) * self.accumulation):
            rng = np.random.default_rng(number)
            ids = [rng.integers(3, 300, 6 + number % 5).astype(np.int32) for _ in range(self.batch_size)]
            rows = [Example(ids_L, np.arange(ids_L.size) > 2, 0, f"sample {number}") for ids_L in ids]
            with self._changed:
                self._made[number] = MicroBatch.of(number, [IndexedExample(i, row) for i, row in enumerate(rows)])
                self._changed.notify_all()

    def window(self, step):
        self._make(step)
        self._make(step + 1)  # while this step trains
        return Window(step, tuple(self._made[step * self.accumulation + i] for i in range(self.accumulation)))

    def request(self, number):
        with self._changed:
            self._changed.wait_for(lambda: self._closed or number in self._made)
            if self._closed:
                raise CancelledRequestError("the source was closed")
            return self._made[number].request

    def epoch_at(self, step):
        return float(step)

    def close(self):
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@pytest.fixture
def fake(model_factory):
    return fake_for(model_factory("qwen2"))


@pytest.fixture
def run(tmp_path, model_factory, rows_file, fake, monkeypatch):
    """source, name -> the folder of a run of 6 steps, and the names of the samples that each micro-batch has learned from."""
    seen = []
    plain = DistillationTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(inputs["batch"].request.names)
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    with serve(fake) as server:

        def go(source, name, *, resume=False, **sections):
            monkeypatch.setitem(SOURCES, "data", source)
            where = {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}
            tree = run_config(tmp_path, model_factory("qwen2"), rows_file, server.address, run=where, **sections)
            seen.clear()
            return train(parse_config(tree, "test"), resume=resume, console=QUIET).output_dir, list(seen)

        yield go


@pytest.mark.parametrize("source", [ShortestFirst, MadeMeanwhile])
def test_they_are_short(source):
    assert len(inspect.getsource(source).splitlines()) < 40


def test_a_curriculum_is_learned_in_its_order(run, rows_file):
    _, usual = run(FixedOrder, "usual")
    _, seen = run(ShortestFirst, "curriculum")
    rows = [name for names in seen for name in names]
    assert len(rows) == 24 and len(set(rows)) == 24 and seen != usual
    tokens = [len(rows_file.read_text().splitlines()[int(name.rsplit(":")[-1]) - 1]) for name in rows]
    assert sum(tokens[:8]) < sum(tokens[8:16]) < sum(tokens[16:])


def test_samples_made_meanwhile_are_labelled_and_learned_from(run, fake):
    folder, seen = run(MadeMeanwhile, "made", data={"eval": []})
    assert seen == [(f"sample {number}",) * 2 for number in range(12)]
    log = [entry for entry in losses(folder) if "loss" in entry]
    assert len(log) == 6 and all(0 < entry["kd_loss"] < 20 for entry in log) and log[-1]["epoch"] == 6.0
    assert fake.calls >= 12


def test_a_run_that_fails_does_not_wait_for_samples_that_will_not_come(run, monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "_get_grad_norm", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(MadeMeanwhile, "failed", data={"eval": []})


def test_the_students_own_ids_are_named_for_any_source(run):
    _, seen = run(MadeMeanwhile, "named", data={"eval": []}, labels={"transport": "top_k", "k": 8, "extra_ids": 4})
    assert len(seen) == 12


@pytest.mark.parametrize("source", [ShortestFirst, MadeMeanwhile])
def test_a_resumed_run_is_the_uninterrupted_one(run, source):
    (straight, seen), (broken, _) = run(source, "straight"), run(source, "broken")
    shutil.rmtree(broken / "checkpoint-6")
    shutil.rmtree(broken / "final")
    (broken / "result.json").unlink()
    _, again = run(source, "broken", resume=True)
    assert again == seen[8:]
    assert adapter_hash(broken) == adapter_hash(straight) and losses(broken) == losses(straight)
