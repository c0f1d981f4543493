"""A run has a list of teacher sessions: each with its own handshake, sizes, head and labels; they share one store."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from student_trainer.data.inputs import load_data, order_of
from student_trainer.errors import ConfigError
from student_trainer.findings import Findings
from student_trainer.model.load import load_outline
from student_trainer.teachers.connect import Connection, connections
from student_trainer.teachers.limits import check_sizes
from student_trainer.teachers.session import open_sessions
from student_trainer.training.label_ahead import label
from teacher_wire.core.errors import MismatchError
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve


class Limited(FakeTeacher):
    """Takes two sequences in a request."""

    def teacher_info(self):
        info = super().teacher_info()
        return replace(info, limits=replace(info.limits, max_request_sequences=2))


def limited(plain: FakeTeacher, **changes) -> Limited:
    same = ("tokenizer_sha256", "base_tokenizer_sha256", "added_tokens", "chat_template_sha256", "vocab_rows")
    return Limited(**{name: getattr(plain, name) for name in same} | {"hidden_size": 16} | changes)


@pytest.fixture
def two(config_of, fake, server):
    """A config of two teachers, and the second of them."""
    other = limited(fake)
    with serve(other) as second:
        teachers = [{"alias": "near", "address": server.address}, {"alias": "far", "address": second.address}]
        yield config_of(train={"eval_batch_size": 2}, teacher=None, teachers=teachers), other


def opened(config, findings, console=None, **options):
    console = console or Console(file=io.StringIO(), width=300)
    student = load_outline(config.model)
    data, held_out = load_data(config.data, student.tokenizer, console)
    with connections(config.every_teacher, console) as reached:
        return open_sessions(config, reached, student, data, held_out, console, findings, **options), data, held_out


def test_each_teacher_has_a_session_of_its_own(two):
    config, _ = two
    (first, second), _, _ = opened(config, Findings())
    assert first.info.fingerprint != second.info.fingerprint and first.connection.address != second.connection.address
    assert first.vocab_rows == second.vocab_rows == first.spec.vocab_rows
    assert first.head.weight_VD.shape[1] == 24 and second.head.weight_VD.shape[1] == 16
    assert first.service.store is second.service.store and first.service.usage is not second.service.usage


def test_sizes_are_checked_for_each(two):
    config, _ = two
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 4})})
    sessions, data, held_out = opened(config, Findings())
    order = order_of(config, data)
    assert all(found.ok for found in check_sizes(config, sessions[:1], data, held_out, order))
    with pytest.raises(ConfigError, match=r"train\.batch_size makes a request of 4 sequences .* at most 2"):
        Findings().add(check_sizes(config, sessions, data, held_out, order))


def test_labels_of_both_are_asked_for_and_kept(two, fake):
    config, other = two
    filled = label(config, Console(file=io.StringIO(), width=300))
    assert fake.calls and other.calls and filled.usage.disk_sequences == 0, (
        "the trial request of each is none from before"
    )
    asked = fake.calls, other.calls
    again = label(config, Console(file=io.StringIO(), width=300))
    assert (fake.calls, other.calls) == asked and again.usage.teacher_tokens == 0
    assert again.usage.tokens == filled.usage.tokens


def test_a_teacher_that_does_not_fit_leaves_the_others_their_sessions(two):
    config, other = two
    other.tokenizer_sha256 = "f" * 64
    with pytest.raises(MismatchError, match="another tokenizer"):
        opened(config, Findings())
    findings = Findings(stops=False)
    sessions, _, _ = opened(config, findings, only_stores=True)
    assert [session.connection.address for session in sessions] == [config.teachers[0].address]
    assert [found.setting for found in findings.all if not found.ok] == ["teacher"]
    assert sessions[0].head is None


def test_what_auto_chose_before_is_kept_for_each(two):
    config, _ = two
    config = config.model_copy(update={"labels": config.labels.model_copy(update={"transport": "auto"})})
    chosen = [config.labels.model_copy(update={"transport": name}) for name in ("full", "hidden")]
    sessions, _, _ = opened(config, Findings(), settled=chosen)
    assert [session.labels.transport for session in sessions] == ["full", "hidden"]
    for (
        session
    ) in sessions:  # the teacher's own likelihood is measured too, so every row of held-out labels has its figures
        assert session.measuring == replace(session.spec, check="all")


def test_the_policy_for_a_teacher_that_is_away_is_the_configs(config_of):
    teacher = config_of(teacher={"wait_s": 1, "retry_s": 2, "answer_s": 3}).teacher
    policy = Connection.of(teacher, "a:1").policy
    assert (policy.wait_s, policy.retry_s, policy.answer_s) == (1, 2, 3)
