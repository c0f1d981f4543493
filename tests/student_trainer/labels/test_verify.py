"""What must never be learned from is refused, with the sample named; what is right passes."""

from dataclasses import replace

import numpy as np
import pytest

from student_trainer.labels.verify import check_signals
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import LabelError
from teacher_wire.core.tensor import float32
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher, _spoil

SPECS = {
    "top_k": spec_of("top_k", 64, k=6),
    "all_kept": spec_of("top_k", 64, k=64),
    "full": spec_of("full", 64),
    "hidden": spec_of("hidden", 64),
}
NAMES = ("rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3")


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return TokenBatch.pack([rng.integers(0, 64, n).tolist() for n in (12, 9, 20)])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("seed", range(5))
def test_right_answers_pass(spec, seed):
    check_signals(FakeTeacher(seed=seed).signals(spec, batch(seed)), spec, batch(seed), NAMES)


@pytest.mark.parametrize(
    ("mistake", "transport"),
    [
        ("shifted", "top_k"), ("shifted", "all_kept"), ("shifted", "full"),
        ("nan", "top_k"), ("nan", "full"), ("nan", "hidden"),
        ("truncated", "hidden"), ("unsorted", "top_k"), ("duplicate", "top_k"), ("mass", "top_k"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_refused_and_the_sample_named(mistake, transport):
    spec = SPECS[transport]
    spoilt = _spoil(FakeTeacher().signals(spec, batch()), mistake)
    with pytest.raises(LabelError) as caught:
        check_signals(spoilt, spec, batch(), NAMES)
    assert mistake == "truncated" or any(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("transport", ["top_k", "full"])
def test_another_sequences_labels_are_refused(transport):
    """Same shapes, other tokens: only logp(label) can tell."""
    spec = SPECS[transport]
    foreign = FakeTeacher().signals(spec, batch(seed=9))
    with pytest.raises(LabelError):
        check_signals(foreign, spec, batch(seed=0), NAMES)


def test_one_bad_row_is_found_and_placed():
    spec = SPECS["full"]
    signals = FakeTeacher().signals(spec, batch())
    logits = signals["logits_NV"].array.copy()
    logits[13] += np.linspace(-3, 3, 64)  # 11 rows of sequence 0, so row 2 of sequence 1
    with pytest.raises(LabelError, match=r"rows\.jsonl:2, row 2: .*1 of 38"):
        check_signals(replace(signals, tensors=signals.tensors | {"logits_NV": float32(logits)}), spec, batch(), NAMES)


def test_an_id_beyond_the_vocabulary_is_refused():
    spec = SPECS["top_k"]
    signals = FakeTeacher().signals(spec, batch())
    narrow = spec_of("top_k", 20, k=6)
    with pytest.raises(LabelError, match="outside the vocabulary"):
        check_signals(signals, narrow, batch(), NAMES)
