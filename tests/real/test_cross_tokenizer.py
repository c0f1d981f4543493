"""Five real tokenizers, every ordered pair: alignments are total on texts of four kinds, classes have ids of both sides, numbers keep their mass.

LYCEUM_REAL names the folder that tests/real/fetch.py fills; without it nothing here runs.
"""

from __future__ import annotations

import itertools
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

REAL = os.environ.get("LYCEUM_REAL", "")
if not REAL or not Path(REAL).expanduser().is_dir():
    pytest.skip("LYCEUM_REAL names no folder of real models (python -m tests.real.fetch)", allow_module_level=True)

from student_trainer.data.cross_tokenizer.alignment import align  # noqa: E402
from teacher_wire.vocabulary.byte_table import TEXT  # noqa: E402
from tests.bench.coverage import FOLDERS, classes, coverage, table, tokenizer, written  # noqa: E402
from tests.bench.cross_texts import KINDS  # noqa: E402

PAIRS = list(itertools.permutations(FOLDERS, 2))
SPLITS_DIGITS = {"SmolLM2": True, "Qwen3": True, "Gemma 3": True, "Llama 3.1": False, "DeepSeek V3": False}
CHARACTERS = "ab1 9\n\r\t é你机器学😀👍🏽\u200d\u0301ﬁ𝄞\u00a0_{}()='\"\\"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOLDERS)
def test_ids_of_a_tokenizer_are_the_bytes_of_the_text(name, kind):
    for ids_n, text in zip(written(name, kind), KINDS[kind](), strict=True):
        assert table(name).text_of(ids_n) == text.encode()


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_alignment_is_total_on_real_texts(student, teacher):
    for kind in KINDS:
        found = coverage(student, teacher, kind)
        assert found.student_masked == found.teacher_masked == 0, "a row in no group"
        assert found.one_to_one_groups > 0.3


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_alignment_is_total_on_random_characters(student, teacher):
    draw = random.Random(f"{student} {teacher}")
    for _ in range(20):
        text = unicodedata.normalize("NFC", "".join(draw.choices(CHARACTERS, k=draw.randrange(60))))
        sides = [
            np.array(tokenizer(name).backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
            for name in (student, teacher)
        ]
        found = align(sides[0], table(student), sides[1], table(teacher))
        for name, ids, ranges in zip((student, teacher), sides, (found.student_G2, found.teacher_G2), strict=True):
            assert b"".join(table(name).text_of(ids[a:b]) for a, b in ranges.tolist()) == text.encode()
        for (a, b), (c, d) in zip(found.student_G2.tolist(), found.teacher_G2.tolist(), strict=True):
            assert table(student).text_of(sides[0][a:b]) == table(teacher).text_of(sides[1][c:d])


def test_what_stands_behind_a_character_that_a_teacher_normalises_is_masked():
    """Qwen3 writes "e" and a combining accent as one character: from there on both sides have read other bytes."""
    text = "an ide\u0301e of a cat"
    sides = [
        np.array(tokenizer(name).backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        for name in ("SmolLM2", "Qwen3")
    ]
    found = align(sides[0], table("SmolLM2"), sides[1], table("Qwen3"))
    grouped = table("SmolLM2").text_of(sides[0][: int(found.student_G2[-1, 1])])
    assert grouped and b"an ide".startswith(grouped)


@pytest.mark.parametrize(("student", "teacher"), itertools.combinations(FOLDERS, 2))
def test_every_class_has_ids_of_both_sides_that_begin_alike(student, teacher):
    partition, _ = classes(student, teacher)
    assert partition.of_student_K.all() and partition.of_teacher_K.all()
    begins_K = np.full(partition.classes, -1, np.int64)
    for name, class_V in ((student, partition.student_Vs), (teacher, partition.teacher_Vt)):
        made = table(name)
        text = np.flatnonzero((made.role_V == TEXT) & (class_V != partition.other))
        assert len(text) > 0.999 * int((made.role_V == TEXT).sum()), "texts without a partner"
        first = made.bytes_B[made.ends_V1[text]].astype(np.int64)
        fresh = begins_K[class_V[text]] < 0
        begins_K[class_V[text][fresh]] = first[fresh]
        assert (begins_K[class_V[text]] == first).all()


@pytest.mark.parametrize("student", [name for name, splits in SPLITS_DIGITS.items() if not splits])
@pytest.mark.parametrize("teacher", [name for name, splits in SPLITS_DIGITS.items() if splits])
def test_numbers_keep_their_mass_under_a_teacher_that_splits_digits(student, teacher):
    """Strict matching by bytes (X-Token) leaves all 1,100 numbers without a partner; by classes each is with its first digit."""
    numbers = [f"{number:0{length}}" for length in (2, 3) for number in range(10**length)]
    ids = {text: tokenizer(student).convert_tokens_to_ids(text) for text in numbers}
    assert all(table(student).of(token_id) == text.encode() for text, token_id in ids.items())
    of_teacher = {table(teacher).of(at): at for at in range(len(table(teacher)))}
    assert not any(text.encode() in of_teacher for text in numbers), "strict matching: none of them has a partner"
    partition, _ = classes(student, teacher)
    for text, token_id in ids.items():
        assert partition.student_Vs[token_id] == partition.teacher_Vt[of_teacher[text[:1].encode()]]

    logits_V = torch.zeros(len(table(student)), dtype=torch.float64)
    logits_V[ids["123"]] = 20.0  # the student is sure of "123", the teacher of "1"
    q_V = logits_V.softmax(0)
    shared = torch.tensor([table(student).of(at) in of_teacher for at in range(len(table(student)))])
    assert float(q_V[shared].sum()) < 1e-3, "of what strict matching compares nothing is left"
    q_K = torch.zeros(partition.classes, dtype=torch.float64).index_add(0, torch.from_numpy(partition.student_Vs), q_V)
    assert float(q_K[partition.teacher_Vt[of_teacher[b"1"]]]) > 0.999
