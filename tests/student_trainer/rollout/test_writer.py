"""The thread that writes ahead, with an engine of ten lines: which weights, when, and what happens when something ends."""

import threading

import numpy as np
import pytest
import torch

from student_trainer.config.on_policy import OnPolicyConfig
from student_trainer.errors import RolloutError, RunError
from student_trainer.rollout.pending import PENDING_NAME, load_pending, save_pending
from student_trainer.rollout.plan import RolloutPlan
from student_trainer.rollout.sample import Rollout, RolloutFailure, RolloutPrompt
from student_trainer.rollout.writer import RolloutWriter
from teacher_wire.core.errors import CancelledRequestError


class Engine:
    """Writes the weight it was given, as a token."""

    def __init__(self):
        self.loads, self.error, self.gate, self.closed = [], None, None, False

    def load(self, weights, version):
        self.loads.append(version)
        self._value, self._version = int(weights["w"]), version

    def sample(self, prompts):
        if self.gate is not None:
            self.gate.wait()
        if self.error is not None:
            raise self.error
        ids = np.array([self._value, 7], np.int32)
        return [Rollout(p, ids, np.zeros(2, np.float32), True, self._version, ids[:, None]) for p in prompts]

    def close(self):
        self.closed = True


class Prompts:
    def __init__(self, plan, refused=()):
        self._plan, self._refused = plan, refused

    def of(self, step):
        return [
            RolloutPrompt(step, p.slot, np.array([5], np.int32), f"{step}.{p.slot}") for p in self._plan.places(step)
        ]

    def hindrances(self, step):
        return ["too long" if (step, p.slot) in self._refused else "" for p in self._plan.places(step)]


def writer_of(steps=6, refused=(), share=1.0, **settings):
    plan = RolloutPlan(OnPolicyConfig(share=share, **settings), seed=0, steps=steps, window=2)
    engine = Engine()
    return RolloutWriter(plan, Prompts(plan, refused), engine), engine, plan


def weights(value):
    return {"w": torch.tensor(float(value))}


@pytest.mark.parametrize(
    "settings",
    [{"max_staleness": 0}, {"max_staleness": 1}, {"max_staleness": 3}, {"max_staleness": 4, "sync_steps": 2}],
)
def test_each_step_is_written_with_its_version(settings):
    writer, engine, plan = writer_of(**settings)
    live = weights(100)
    for step in range(6):
        live["w"].fill_(100 + step)  # as an optimizer does: in place, once the step before is done
        writer.weights_are(step, live)
        assert {(r.version, int(r.token_ids[0])) for r in writer.take(step)} == {
            (plan.version(step), 100 + plan.version(step))
        }
    writer.weights_are(6, live)
    assert engine.loads == sorted({plan.version(step) for step in range(6)})
    assert not writer._weights and not writer._written
    writer.close()
    writer.close()
    assert engine.closed


def test_steps_to_come_are_written_while_an_earlier_one_trains():
    writer, _, _ = writer_of(max_staleness=2)
    writer.weights_are(0, weights(1))
    assert [writer.take(step)[0].version for step in (2, 1, 0)] == [0, 0, 0]
    writer.close()


def test_a_step_without_rollouts_waits_for_nothing():
    writer, engine, _ = writer_of(share=0.0)
    assert writer.take(3) == []
    writer.weights_are(0, weights(1))
    writer.close()
    assert engine.loads == []


def test_what_cannot_be_answered_is_not_asked():
    writer, _, _ = writer_of(refused=[(0, 1)])
    writer.weights_are(0, weights(1))
    good, bad = writer.take(0)
    assert isinstance(good, Rollout) and isinstance(bad, RolloutFailure) and bad.why == "too long"
    writer.close()


def test_whoever_waits_is_told_what_ended_the_thread():
    writer, engine, _ = writer_of(max_staleness=0)
    engine.error = RolloutError("gone")
    writer.weights_are(0, weights(1))
    for step in (0, 1):
        with pytest.raises(RolloutError, match="gone"):
            writer.take(step)
    writer.close()


def test_whoever_waits_is_woken_when_it_is_closed():
    writer, engine, _ = writer_of(max_staleness=0)
    engine.gate = threading.Event()
    writer.weights_are(0, weights(1))
    caught = []

    def wait():
        try:
            writer.take(0)
        except CancelledRequestError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    threading.Timer(0.1, engine.gate.set).start()
    writer.close()
    waiting.join(10)
    assert len(caught) <= 1 and not waiting.is_alive()


@pytest.mark.parametrize(
    "settings", [{"max_staleness": 2}, {"max_staleness": 3}, {"max_staleness": 4, "sync_steps": 2}]
)
@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_what_a_checkpoint_holds_is_enough_to_go_on(settings, start, tmp_path):
    refused = [(step, 1) for step in (2, 4)]
    writer, _, _ = writer_of(refused=refused, **settings)
    straight = {}
    for step in range(6):
        writer.weights_are(step, weights(100 + step))
        if step == start:
            save_pending(tmp_path, writer.pending())
        straight[step] = writer.take(step)
    writer.close()
    again, _, plan = writer_of(refused=refused, **settings)
    again.restore(load_pending(tmp_path, Prompts(plan).of))
    for step in range(start, 6):
        again.weights_are(step, weights(100 + step))
        for one, other in zip(again.take(step), straight[step], strict=True):
            assert type(one) is type(other) and one.prompt.key == other.prompt.key
            if isinstance(one, Rollout):
                assert one.version == other.version and one.finished == other.finished
                for name in ("token_ids", "logp_n", "likeliest_nM"):
                    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    again.close()


def test_pending_rollouts_of_other_rows_or_torn_files_are_refused(tmp_path):
    writer, _, plan = writer_of(max_staleness=1)
    writer.weights_are(0, weights(1))
    writer.weights_are(1, weights(2))
    save_pending(tmp_path, writer.pending())
    writer.close()
    others = [RolloutPrompt(1, slot, np.array([5], np.int32), "another row") for slot in range(2)]
    with pytest.raises(RunError, match=r"step 1 has a rollout of '1.0', the rows have 'another row' there"):
        load_pending(tmp_path, lambda _: others)
    file = tmp_path / PENDING_NAME
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(RunError, match=r"rollouts.safetensors cannot be read"):
        load_pending(tmp_path, Prompts(plan).of)
    file.unlink()
    with pytest.raises(RunError, match=r"rollouts.safetensors cannot be read"):
        load_pending(tmp_path, Prompts(plan).of)


def test_weights_that_are_gone_are_an_error_and_no_wait_for_ever():
    """A run that goes on without what its checkpoint should have held."""
    writer, _, _ = writer_of(max_staleness=1)
    writer.weights_are(3, weights(1))
    with pytest.raises(RolloutError, match="rollouts of step 3 need the weights of step 2, and these are gone"):
        writer.take(3)
    writer.close()
