"""`auto` picks exact labels where they fit, and says what decided."""

from dataclasses import replace

import pytest

from student_trainer.config.teachers import LabelConfig
from student_trainer.errors import ConfigError
from student_trainer.teachers.choose import Probe, choose
from teacher_wire.core.info import Limits
from teacher_wire.testing.fake_teacher import FakeTeacher

GIB = 2**30
AUTO = LabelConfig(transport="auto")
BIG = replace(  # Qwen2.5-7B
    FakeTeacher().teacher_info(),
    dtype="bfloat16", vocab_rows=152_064, hidden_size=3584, limits=Limits(32768, 65536, 1024, 4096, 64 << 20),
)  # fmt: skip
FAST, SLOW = Probe(transfer_s=0.01, forward_s=0.1), Probe(transfer_s=0.5, forward_s=0.1)


def pick(info=BIG, free=20 * GIB, probe=FAST, softened=False, settings=AUTO):
    labels, why = choose(info, min(info.vocab_rows, 151_665), free, probe, softened=softened, settings=settings)
    assert labels.check == (settings.check if labels.transport == "hidden" else "sampled")
    return (labels.transport, labels.compression, labels.k if labels.transport == "top_k" else 0), why


@pytest.mark.parametrize(
    ("changes", "expected", "reason"),
    [
        ({}, ("hidden", "none", 0), "exact"),
        ({"softened": True}, ("hidden", "none", 0), "exact"),
        ({"probe": SLOW}, ("hidden", "int8", 0), "5.0 times slower"),
        ({"free": 2 * GIB}, ("top_k", "none", 128), "quarter of the 2,048 MiB"),
        ({"free": 2 * GIB, "settings": LabelConfig(transport="auto", k=40)}, ("top_k", "none", 40), "top 40 with"),
        ({"settings": LabelConfig(transport="auto", k=40, check="all")}, ("hidden", "none", 0), "exact"),
        ({"probe": SLOW, "settings": LabelConfig(transport="auto", check="all")}, ("hidden", "int8", 0), "5.0 times"),
        ({"free": 2 * GIB, "softened": True}, ("full", "none", 0), "temperature"),
        ({"info": replace(BIG, transports=("top_k",)), "probe": None}, ("top_k", "none", 128), "does not offer"),
        ({"info": replace(BIG, vocab_rows=300, hidden_size=512)}, ("full", "none", 0), "every logit"),
    ],
)
def test_the_choice_and_its_reason(changes, expected, reason):
    chosen, why = pick(**changes)
    assert chosen == expected
    assert reason in why


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ConfigError, match=r"auto.*quarter"):
        pick(info=replace(BIG, transports=("top_k", "hidden")), free=2 * GIB, softened=True)


def test_a_policy_gradient_keeps_the_number_that_held_out_rows_are_measured_with():
    info = replace(BIG, transports=("given", "top_k"))
    settings = LabelConfig(transport="auto", k=40)
    labels, _ = choose(info, 300, GIB, None, softened=False, settings=settings, on_samples=True)
    assert (labels.transport, labels.k) == ("given", 40)
