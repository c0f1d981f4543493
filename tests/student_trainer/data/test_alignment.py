"""Groups of two tokenisations of one text, against the two pointers of docs/concepts/method.md 8.3, on random and on real tokenizers' tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.data.cross_tokenizer.alignment import align
from student_trainer.data.cross_tokenizer.groups import AlignedRows, join_groups
from student_trainer.errors import DataError
from teacher_wire.vocabulary.byte_table import CONTROL, END, THINK_CLOSE, THINK_OPEN
from tests.student_trainer.data.tiny_tokenizers import SCHEMES, metaspace, tokenizer
from tests.student_trainer.data.two_tokenizers import TEXTS, table_for, table_of, written

ROLES = (CONTROL, END, THINK_OPEN, THINK_CLOSE)
ALPHABET = "a1 \n\r\t▁é你😀👍🏽\u0301<|im_end|>"


def two_pointers(ends_a, ends_b):
    """The groups of two lists of rising ends, as docs/concepts/method.md 8.3 writes them."""
    i = j = si = sj = 0
    found = []
    while i < len(ends_a) and j < len(ends_b):
        if ends_a[i] < ends_b[j]:
            i += 1
        elif ends_b[j] < ends_a[i]:
            j += 1
        else:
            i, j = i + 1, j + 1
            found.append(((si, i), (sj, j)))
            si, sj = i, j
    return found


def cut_up(draw, text: bytes, controls: bool):
    """A random tokenisation of bytes: (tokens, each its bytes or a role)."""
    places = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12))) if len(text) > 1 else []
    tokens: list[bytes | int] = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)]) if b > a]
    for _ in range(draw(st.integers(0, 3)) if controls else 0):
        tokens.insert(draw(st.integers(0, len(tokens))), draw(st.sampled_from(ROLES)))
    return tokens


@st.composite
def two_tokenisations(draw, controls=True):
    text = draw(st.one_of(st.text(ALPHABET, max_size=12), st.text(max_size=12))).encode()
    return cut_up(draw, text, controls), cut_up(draw, text, controls)


def aligned(student, teacher, **more):
    """The alignment of two lists of tokens, each token an id of its own."""
    return align(np.arange(len(student)), table_of(student), np.arange(len(teacher)), table_of(teacher), **more)


def pairs(alignment):
    return list(zip(map(tuple, alignment.student_G2.tolist()), map(tuple, alignment.teacher_G2.tolist()), strict=True))


def as_bytes(tokens, start, stop):
    return b"".join(token for token in tokens[start:stop] if isinstance(token, bytes))


def check_rules(student, teacher, alignment):
    """What holds for every alignment of two lists of tokens."""
    place_s = place_t = 0
    for ((a, b), (c, d)), is_control in zip(pairs(alignment), alignment.is_control_G.tolist(), strict=True):
        assert a >= place_s and c >= place_t and b > a and d > c, "groups rise, do not overlap and are not empty"
        place_s, place_t = b, d
        assert as_bytes(student, 0, a) == as_bytes(teacher, 0, c), "both sides have read the same bytes before a group"
        assert as_bytes(student, a, b) == as_bytes(teacher, c, d), "both sides of a group are the same bytes"
        controls = [[token for token in side if isinstance(token, int)] for side in (student[a:b], teacher[c:d])]
        if is_control:
            assert (b - a, d - c) == (1, 1) and controls[0] == controls[1] and controls[0][0] != CONTROL
        else:
            assert controls == [[], []]
            ends_s = {len(as_bytes(student, a, end)) for end in range(a + 1, b)}
            assert not ends_s & {len(as_bytes(teacher, c, end)) for end in range(c + 1, d)}, "no group can be cut"


@given(two_tokenisations(controls=False))
def test_text_is_grouped_as_the_two_pointers_group_it(both):
    student, teacher = both
    alignment = aligned(student, teacher)
    ends = [list(itertools.accumulate(len(token) for token in side)) for side in both]
    assert pairs(alignment) == two_pointers(*ends)
    for side, ranges in ((student, alignment.student_G2), (teacher, alignment.teacher_G2)):
        assert [at for start, stop in ranges.tolist() for at in range(start, stop)] == list(range(len(side)))


@settings(max_examples=300)
@given(two_tokenisations())
def test_control_tokens_join_their_like_and_no_group_has_one_inside(both):
    check_rules(*both, aligned(*both))


@given(two_tokenisations(), st.binary(min_size=1, max_size=3), st.binary(max_size=3))
def test_nothing_is_grouped_behind_a_difference(both, more_s, more_t):
    student, teacher = [*both[0], more_s, END], [*both[1], more_t, END] if more_t else [*both[1], END]
    check_rules(student, teacher, aligned(student, teacher))


@given(two_tokenisations(), st.randoms(use_true_random=False))
def test_a_group_with_a_row_that_is_not_supervised_is_left_out(both, random):
    student, teacher = both
    flags = [np.array([random.random() < 0.7 for _ in side], np.bool_) for side in both]
    whole = aligned(student, teacher)
    part = aligned(student, teacher, student_wanted_n=flags[0], teacher_wanted_m=flags[1])
    kept = [((a, b), (c, d)) for (a, b), (c, d) in pairs(whole) if flags[0][a:b].all() and flags[1][c:d].all()]
    ranks = [np.concatenate([[0], np.cumsum(side)]) for side in flags]
    assert pairs(part) == [((ranks[0][a], ranks[0][b]), (ranks[1][c], ranks[1][d])) for (a, b), (c, d) in kept]


def test_the_same_tokens_are_one_to_one():
    tokens = [THINK_OPEN, b"so", THINK_CLOSE, b"a", b" b", END]
    alignment = aligned(tokens, tokens)
    assert alignment.groups == 6 and alignment.is_one_to_one_G.all()
    assert alignment.is_control_G.tolist() == [True, False, True, False, False, True]
    assert alignment.one_to_one_share(6) == 1.0 and alignment.one_to_one_share(12) == 0.5
    assert alignment.one_to_one_share(0) == 0.0


def test_an_end_of_turn_behind_another_text_is_no_partner():
    assert pairs(aligned([b"ab", END], [b"ab", b"c", END])) == [((0, 1), (0, 1))]
    assert pairs(aligned([b"ab", END], [b"a", b"x", END])) == []


def test_a_control_token_inside_a_group_masks_the_group():
    student, teacher = [b"a", CONTROL, b"b", b"c"], [b"ab", b"c"]
    assert pairs(aligned(student, teacher)) == [((3, 4), (1, 2))]


def test_a_space_put_before_the_text_has_no_bytes_of_it():
    """SentencePiece: " the" stands for "the" at the beginning, and "▁" alone for nothing."""
    student = table_of([b"the", b" cat"])
    teacher = table_of([b" ", b" the", b"the", b" c", b"at"])
    first = align(np.array([0, 1]), student, np.array([1, 3, 4]), teacher, teacher_ends_m=np.array([3, 5, 7]))
    assert pairs(first) == [((0, 1), (0, 1)), ((1, 2), (1, 3))]
    alone = align(np.array([0, 1]), student, np.array([0, 2, 3, 4]), teacher, teacher_ends_m=np.array([0, 3, 5, 7]))
    assert pairs(alone) == [((0, 1), (1, 2)), ((1, 2), (2, 4))]


FAMILIES = {**{name: (lambda name=name: tokenizer(name)) for name in ("chatml", "llama")}}
FAMILIES |= {f"metaspace {scheme}": (lambda scheme=scheme: metaspace(scheme)) for scheme in SCHEMES}


@pytest.mark.parametrize(("student", "teacher"), itertools.permutations(FAMILIES, 2))
def test_texts_of_two_tokenizers_are_grouped_whole(student, teacher):
    one, other = FAMILIES[student](), FAMILIES[teacher]()
    for text in TEXTS:
        ids_n, ends_n = written(one, text)
        ids_m, ends_m = written(other, text)
        found = align(ids_n, table_for(one), ids_m, table_for(other), student_ends_n=ends_n, teacher_ends_m=ends_m)
        for ids, ends, table, ranges in (
            (ids_n, ends_n, table_for(one), found.student_G2), (ids_m, ends_m, table_for(other), found.teacher_G2)
        ):  # fmt: skip
            starts = np.concatenate([[0], ends])
            parts = [text.encode()[starts[a] : ends[b - 1]] for a, b in ranges.tolist()]
            assert b"".join(parts) == text.encode()
            outside = set(range(len(ids))) - {at for a, b in ranges.tolist() for at in range(a, b)}
            assert all(ends[at] == starts[at] and len(table.of(int(ids[at]))) for at in outside), (
                "only spaces put before"
            )
        assert found.is_control_G.tolist() == [False] * (found.groups - 1) + [True]


@settings(max_examples=60)
@given(st.text(ALPHABET.replace("<|im_end|>", "") + "the cat", max_size=30))
def test_any_text_of_two_tokenizers_is_grouped_whole(text):
    for one, other in ((tokenizer("chatml"), metaspace("never")), (metaspace("never"), tokenizer("llama"))):
        ids_n, ends_n = written(one, text.replace("▁", " "))  # which SentencePiece cannot tell from a space
        ids_m, ends_m = written(other, text.replace("▁", " "))
        found = align(ids_n, table_for(one), ids_m, table_for(other))
        assert two_pointers(ends_n[:-1].tolist(), ends_m[:-1].tolist()) == pairs(found)[:-1]
        assert pairs(found)[-1] == ((len(ids_n) - 1, len(ids_n)), (len(ids_m) - 1, len(ids_m)))


def test_groups_of_a_micro_batch_count_its_rows():
    one = aligned([b"ab", b"c", END], [b"a", b"bc", END])
    two = aligned([b"x", END], [b"x", END])
    groups = join_groups([AlignedRows(one, 3, 3), AlignedRows(None, 5, 0), AlignedRows(two, 2, 2)])
    assert groups.student_G2.tolist() == [[0, 2], [2, 3], [8, 9], [9, 10]]
    assert groups.teacher_G2.tolist() == [[0, 2], [2, 3], [3, 4], [4, 5]]
    assert groups.student_G2.dtype == groups.teacher_G2.dtype == np.int64
    assert join_groups([AlignedRows(None, 4, 0)]).student_G2.shape == (0, 2)
    assert join_groups([]).teacher_G2.shape == (0, 2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"teacher_ids_m": np.array([0, 7])}, "teacher token id, value=7"),
        ({"student_ids_n": np.array([-1])}, "student token id, value=-1"),
        ({"teacher_ends_m": np.array([1])}, "one per token, 2"),
        ({"teacher_ends_m": np.array([1, 0])}, "token 1 would have -1 bytes"),
        ({"teacher_ends_m": np.array([3, 4])}, "token 0 would have 3 bytes, its table says 1"),
        ({"student_wanted_n": np.array([True])}, "student flags"),
    ],
)  # fmt: skip
def test_what_fits_no_table_is_refused_by_name(more, said):
    table = table_of([b"a", b"b"])
    asked = {"student_ids_n": np.array([0, 1]), "teacher_ids_m": np.array([0, 1]), **more}
    with pytest.raises(DataError, match=said):
        align(student_table=table, teacher_table=table, **asked)
