"""Before step 0: what cannot work is refused by the name of the setting."""

from dataclasses import replace

import pytest

from student_trainer.config.teachers import LabelConfig
from student_trainer.errors import ConfigError
from student_trainer.findings import Findings
from student_trainer.teachers.handshake import StudentFacts, agree
from teacher_wire.core.errors import CapabilityError, LimitError, MismatchError
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher

INFO = FakeTeacher(tokenizer_sha256="t" * 64, chat_template_sha256="c" * 64).teacher_info()
STUDENT = StudentFacts(
    vocab_rows=62, tokenizer_size=60, tokenizer_sha256="t" * 64, chat_template_sha256="c" * 64, uses_chat_template=True
)


def meet(info=INFO, student=STUDENT, labels=None, **changes):
    return agree(
        info,
        student,
        labels or LabelConfig(),
        Findings(),
        **{"asked_by": "loss.output (jsd)", "longest": ("f:1", 10), **changes},
    )


def test_the_vocabulary_is_what_all_three_share():
    assert meet() == spec_of("hidden", 60, "sampled")
    assert meet(labels=LabelConfig(check="all")) == spec_of("hidden", 60)
    assert meet(student=replace(STUDENT, tokenizer_size=1000)).vocab_rows == 62
    assert meet(student=replace(STUDENT, tokenizer_size=1000, vocab_rows=1000)).vocab_rows == 64
    assert meet(labels=LabelConfig(transport="top_k", k=5)) == spec_of("top_k", 60, k=5)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"student": replace(STUDENT, tokenizer_sha256="x" * 64)}, MismatchError, "tokenizer"),
        ({"student": replace(STUDENT, chat_template_sha256="x" * 64)}, MismatchError, "allow_template_mismatch"),
        ({"info": replace(INFO, transports=("top_k",))}, CapabilityError, r"loss\.output \(jsd\).*hidden"),
        ({"labels": LabelConfig(transport="top_k", k=61)}, ConfigError, r"labels\.k=61.*vocabulary.*60"),
        (
            {
                "labels": LabelConfig(transport="top_k", k=9),
                "info": replace(INFO, limits=replace(INFO.limits, max_k=8)),
            },
            ConfigError,
            r"labels\.k=9.*limit of teacher 'fake'.*8",
        ),
        ({"longest": ("rows.jsonl:7", 5000)}, LimitError, r"rows\.jsonl:7.*5000.*4096"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, error, named):
    with pytest.raises(error, match=named):
        meet(**changes)


def test_a_template_that_is_not_used_does_not_matter():
    meet(student=replace(STUDENT, chat_template_sha256="x" * 64, uses_chat_template=False))
    meet(student=replace(STUDENT, chat_template_sha256="x" * 64), allow_template_mismatch=True)
