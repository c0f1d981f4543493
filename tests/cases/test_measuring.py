"""`labels.transport` decides what measuring may put on the card; `auto` asks within the teacher's limits; `label` fetches no head."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from student_trainer.config.run import parse_config
from student_trainer.errors import ConfigError
from student_trainer.teachers import trial
from student_trainer.training.label_ahead import label
from student_trainer.training.run import train
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import fake_for, run_config


class Counting(FakeTeacher):
    """Counts how often its head is fetched, and remembers the largest request."""

    heads = 0
    largest = (0, 0)
    limits: dict[str, int] = {}  # noqa: RUF012

    async def artifact_header(self, *args):
        self.heads += 1
        return await super().artifact_header(*args)

    async def score(self, call):
        self.largest = max(self.largest, (call.batch.sequences, call.batch.tokens))
        return await super().score(call)

    def teacher_info(self):
        info = super().teacher_info()
        return replace(info, limits=replace(info.limits, **self.limits))


@pytest.fixture
def world(tmp_path, model_factory, rows_file):
    model = model_factory("qwen2")
    plain = fake_for(model)
    fake = Counting(
        tokenizer_sha256=plain.tokenizer_sha256,
        chat_template_sha256=plain.chat_template_sha256,
        vocab_rows=300,
        hidden_size=24,
    )
    fake.said = io.StringIO()
    with serve(fake) as server:

        def go(work=train, **sections):
            steps = {"max_steps": 2, "save_steps": 0, "accumulation": 1, "eval_steps": 2} | sections.pop("train", {})
            tree = run_config(tmp_path, model, rows_file, server.address, train=steps, **sections)
            config = parse_config(tree, "test")
            console = Console(file=fake.said, width=10_000)
            return work(config, console=console) if work is train else work(config, console)

        fake.go = go
        yield fake


@pytest.mark.parametrize("transport", ["top_k", "full"])
def test_what_needs_no_head_fetches_none(world, transport):
    result = world.go(labels={"transport": transport, "k": 16} if transport == "top_k" else {"transport": transport})
    assert world.heads == 0 and result.metrics["kl_to_teacher"] >= 0, "measured by all logits, which need no head"


def test_hidden_still_does(world):
    assert world.go(labels={"transport": "hidden"}).metrics["kl_to_teacher"] >= 0
    assert world.heads == 1


def test_auto_that_finds_no_room_puts_no_head_on_the_card(world, monkeypatch):
    monkeypatch.setattr(trial.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    result = world.go(labels={"transport": "auto"})
    assert world.heads == 0 and "labels by top_k" in world.said.getvalue() and "kl_to_teacher" in result.metrics


def test_without_room_for_all_logits_the_measure_is_left_out_and_said(world):
    world.max_reply_bytes = 20_000
    result = world.go(labels={"transport": "top_k", "k": 8}, train={"eval_batch_size": 4})
    assert (
        world.heads == 0
        and "kl_to_teacher" not in result.metrics
        and "kl_to_teacher is not measured" in world.said.getvalue()
    )


def test_labelling_fetches_the_head_that_a_run_without_its_teacher_needs(world):
    filled = world.go(label, labels={"transport": "hidden"})
    assert filled.usage.teacher_tokens > 0 and world.heads == 1
    world.go(label, labels={"transport": "hidden"})
    assert world.heads == 1, "it is on disk"


def test_labelling_by_labels_that_need_no_head_fetches_none(world):
    assert world.go(label, labels={"transport": "top_k", "k": 16}).usage.teacher_tokens > 0 and world.heads == 0


@pytest.mark.parametrize(
    "limits",
    [{"max_request_sequences": 2}, {"max_request_tokens": 60}, {"max_reply_bytes": 2500}],
    ids=lambda limits: next(iter(limits)),
)
def test_auto_probes_within_the_teachers_limits(world, limits):
    """A micro-batch above a limit is refused by the setting that makes it so, not by the probe."""
    world.limits = limits
    with pytest.raises(ConfigError, match=r"train\.batch_size makes a request of"):
        world.go(labels={"transport": "auto"}, train={"batch_size": 40})
    assert 1 <= world.largest[0] < 40 and "labels by hidden" in world.said.getvalue()


def test_auto_goes_without_a_probe_where_no_row_fits(world):
    world.limits = {"max_request_tokens": 5}
    with pytest.raises(Exception, match="tokens"):
        world.go(labels={"transport": "auto"})
    assert world.largest == (0, 0) or world.largest[0] == 1
