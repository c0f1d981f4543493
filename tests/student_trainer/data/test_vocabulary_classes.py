"""The partition of two vocabularies, against a union-find written as docs/concepts/method.md 8.4 says it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.data.cross_tokenizer.classes import Partition, classes_key, kept_classes, vocabulary_classes
from student_trainer.data.cross_tokenizer.first_tokens import first_tokens, first_with_bytes
from teacher_wire.testing.fake_tokenizer import FakeTokenizer
from teacher_wire.vocabulary.byte_table import BOS, CONTROL, END, TEXT, THINK_OPEN, UNUSED
from tests.student_trainer.data.tiny_tokenizers import SCHEMES, metaspace, tokenizer
from tests.student_trainer.data.two_tokenizers import table_for, table_of

ROLES = (UNUSED, CONTROL, BOS, END, THINK_OPEN)


def greedy(tokens):
    """First tokens of a tokenizer that takes the longest piece at each place."""

    def first(texts):
        found = []
        for text in texts:
            assert text and text.decode() is not None, "only texts that are UTF-8 are asked about"
            held = [
                (len(token), i) for i, token in enumerate(tokens) if isinstance(token, bytes) and text.startswith(token)
            ]
            longest = max((length for length, _ in held), default=0)
            found.append(next((i for length, i in held if length == longest), -1))
        return np.array(found, np.int64)

    return first


def partition_of(student, teacher) -> Partition:
    return vocabulary_classes(table_of(student), table_of(teacher), greedy(student), greedy(teacher))


def test_a_text_that_is_no_utf8_goes_with_the_longest_token_that_begins_it():
    """No tokenizer can be asked about half a character: of the tokens that begin it the longest says the most."""
    student, teacher = [b"a", b"\xe4", b"\xe4\xb8", b"\xb8"], [b"a", b"\xe4\xb8\xe4", b"\xb8", b"\xe4", b"\xe4\xb8"]
    found = partition_of(student, teacher)
    assert found.teacher_Vt[1] == found.student_Vs[2] != found.student_Vs[1] == found.teacher_Vt[3]


def naive(student, teacher):
    """Sets of ("s" | "t", id) that belong together by bytes or by first tokens, as a union-find finds them; ids without a partner alone."""
    parent = {(side, i): (side, i) for side, tokens in (("s", student), ("t", teacher)) for i in range(len(tokens))}

    def root(node):
        while parent[node] != node:
            node = parent[node]
        return node

    for side, tokens, other_side, others in (("s", student, "t", teacher), ("t", teacher, "s", student)):
        for i, token in enumerate(tokens):
            if not isinstance(token, bytes):
                continue
            same = [j for j, other in enumerate(others) if other == token]
            if not same:
                same = [j for j, other in enumerate(others) if isinstance(other, bytes) and token.startswith(other)]
                same = [max(same, key=lambda j: len(others[j]))] if same else []
            same_here = [j for j, other in enumerate(tokens) if other == token]
            for node in [*((other_side, j) for j in same), *((side, j) for j in same_here)]:
                parent[root((side, i))] = root(node)
    found = {}
    for node in parent:
        found.setdefault(root(node), set()).add(node)
    return list(found.values())


def grouped(partition):
    found = {}
    for side, class_V in (("s", partition.student_Vs), ("t", partition.teacher_Vt)):
        for i, of in enumerate(class_V.tolist()):
            found.setdefault(of, set()).add((side, i))
    return found


pieces = st.lists(
    st.one_of(
        st.text("ab1é你", min_size=1, max_size=3).map(str.encode),
        st.binary(min_size=1, max_size=2),
        st.sampled_from(ROLES),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300)
@given(pieces, pieces)
def test_classes_are_those_of_the_union_find_and_have_ids_of_both_sides(student, teacher):
    partition = partition_of(student, teacher)
    assert partition.of_student_K.all() and partition.of_teacher_K.all(), "a class with ids of one side alone"
    if student == teacher:
        assert partition.is_pair_K.all()
        return
    text = {frozenset(c) for c in naive(student, teacher) if {side for side, _ in c} == {"s", "t"}}
    made = grouped(partition)
    is_text = {node for c in text for node in c}
    assert {frozenset(c & is_text) for c in made.values() if c & is_text} == text
    for role in (BOS, END, THINK_OPEN):
        members = (
            {("s", i) for i, t in enumerate(student) if t == role},
            {("t", i) for i, t in enumerate(teacher) if t == role},
        )
        if all(members):
            assert members[0] | members[1] <= next(c for c in made.values() if c & members[0])
    joined = set(itertools.chain(*made.values())) - is_text
    lost = [
        n
        for n in joined
        if not isinstance(_token(student, teacher, n), int) or _token(student, teacher, n) in (UNUSED, CONTROL)
    ]
    assert len({partition_class(partition, n) for n in lost}) <= 2, (
        "ids without a partner are of one class, or of one of the other side"
    )


def _token(student, teacher, node):
    return (student if node[0] == "s" else teacher)[node[1]]


def partition_class(partition, node):
    return int((partition.student_Vs if node[0] == "s" else partition.teacher_Vt)[node[1]])


@given(pieces)
def test_a_vocabulary_and_itself_are_pairs(tokens):
    partition = partition_of(tokens, tokens)
    assert partition.classes == len(tokens) and partition.other is None and partition.is_pair_K.all()
    assert partition.student_Vs.tolist() == partition.teacher_Vt.tolist() == list(range(len(tokens)))


@given(pieces, st.randoms(use_true_random=False))
def test_another_order_of_ids_changes_no_class(tokens, random):
    order = list(range(len(tokens)))
    random.shuffle(order)
    texts = list(dict.fromkeys(token if isinstance(token, bytes) else END for token in tokens))
    order = [at for at in order if at < len(texts)]
    partition = partition_of(texts, [texts[at] for at in order])
    if order == sorted(order):
        return  # the same tables
    for place, at in enumerate(order):
        assert partition.teacher_Vt[place] == partition.student_Vs[at]
    assert partition.classes == len(set(texts))


def test_ids_without_a_partner_are_of_one_class_or_join_the_first_control_id_of_the_other_side():
    both = partition_of([b"a", b"x", CONTROL], [b"a", CONTROL, UNUSED])
    assert both.other == 1 and both.student_Vs.tolist() == [0, 1, 1] and both.teacher_Vt.tolist() == [0, 1, 1]
    one = partition_of([b"a", b"x", END], [b"a", END])
    assert one.student_Vs.tolist() == [0, 1, 1] and one.teacher_Vt.tolist() == [0, 1] and one.other == 1
    none = partition_of([b"a"], [b"a", b"x"])
    assert none.teacher_Vt.tolist() == [0, 0] and none.other == 0


def test_bytes_that_are_no_text_join_the_longest_prefix():
    partition = partition_of([b"\xe4", b"\xe4\xbd", b"\xe4\xbd\xa0"], [b"\xe4\xbd", b"\xe4", b"\xbd"])
    assert partition.student_Vs.tolist() == [0, 1, 1] and partition.teacher_Vt.tolist()[:2] == [1, 0]


def test_a_first_token_that_is_no_prefix_is_not_believed():
    """SentencePiece may begin "the" with " the"; that stands for other bytes."""
    student, teacher = table_of([b"the", b"t", b" the"]), table_of([b" the", b"t"])
    partition = vocabulary_classes(student, teacher, greedy([]), lambda texts: np.zeros(len(texts), np.int64))
    assert partition.student_Vs.tolist() == [0, 0, 1] and partition.teacher_Vt.tolist() == [1, 0]


DIGITS = [str(number).encode() for number in range(1000)]


def test_numbers_of_many_digits_keep_their_mass_under_a_teacher_that_splits_them():
    """X-Token's strict matching pairs equal bytes alone: "123" then has no partner, and whatever the teacher says of numbers pushes it down."""
    student, teacher = [*DIGITS, b" ", END], [*DIGITS[:10], b" ", END]
    classes = partition_of(student, teacher).on("cpu")
    logits_V = torch.zeros(len(student), dtype=torch.float64)
    logits_V[123] = 12.0  # the student says "123" in one token, and the teacher "1" first
    logits_V.requires_grad_()
    teacher_V = torch.full((len(teacher),), 1e-9, dtype=torch.float64)
    teacher_V[1] = 1.0
    teacher_K = torch.zeros(classes.classes, dtype=torch.float64).index_add(
        0, classes.teacher_Vt, teacher_V / teacher_V.sum()
    )
    student_K = torch.zeros_like(teacher_K).index_add(0, classes.student_Vs, logits_V.softmax(0))
    assert float(student_K.detach()[classes.student_Vs[123]]) > 0.98, "the mass of 123 is with 1"
    (by_class_V,) = torch.autograd.grad((teacher_K * (teacher_K / student_K).log()).sum(), logits_V)

    shared = torch.tensor([*range(10), len(student) - 2, len(student) - 1])
    (strict_V,) = torch.autograd.grad(-(teacher_V / teacher_V.sum() * logits_V.log_softmax(0)[shared]).sum(), logits_V)
    assert float(strict_V[123]) > 0.8, "strict matching takes all its mass away"
    assert float(by_class_V[123]) < 0, "its class has less than the teacher gives it: the id is pushed up"
    assert abs(float(by_class_V[123])) < 0.02


def test_every_number_is_of_the_class_of_its_first_digit():
    partition = partition_of([*DIGITS, END], [*DIGITS[:10], END])
    assert partition.classes == 11 and partition.other is None
    for text, of in zip(DIGITS, partition.student_Vs.tolist(), strict=False):
        assert of == int(text[:1])


FAMILIES = {"chatml": lambda: tokenizer("chatml"), "llama": lambda: tokenizer("llama")}
FAMILIES |= {f"metaspace {scheme}": (lambda scheme=scheme: metaspace(scheme)) for scheme in SCHEMES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_begins_a_text_with_a_token_of_its_first_bytes(family):
    made = FAMILIES[family]()
    table = table_for(made)
    texts = [b"the", b" cat", b"a", b"\n\n", "你".encode(), "😀x".encode(), b"0", b"  ", "é".encode()]
    first = first_tokens(made, table)(texts)
    for text, token_id in zip(texts, first.tolist(), strict=True):
        assert table.of(token_id) and text.startswith(table.of(token_id))
    assert table.of(int(first[1]))[:1] == b" ", "a space of the text is a space of the token"


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("chatml", "metaspace first"), ("metaspace never", "llama"), ("metaspace prepend", "metaspace never")],
)
def test_every_id_of_two_tokenizers_shares_its_first_byte_with_its_class(student, teacher):
    one, other = FAMILIES[student](), FAMILIES[teacher]()
    tables = table_for(one), table_for(other)
    partition = vocabulary_classes(*tables, first_tokens(one, tables[0]), first_tokens(other, tables[1]))
    assert partition.of_student_K.all() and partition.of_teacher_K.all()
    begin: dict[int, set[bytes]] = {}
    for table, class_V in zip(tables, (partition.student_Vs, partition.teacher_Vt), strict=True):
        for token_id in np.flatnonzero((table.role_V == TEXT) & (class_V != partition.other)).tolist():
            begin.setdefault(int(class_V[token_id]), set()).add(table.of(token_id)[:1])
    assert all(len(first) == 1 for first in begin.values())
    ends = [
        class_V[table.role_V == END]
        for table, class_V in zip(tables, (partition.student_Vs, partition.teacher_Vt), strict=True)
    ]
    assert len(set(np.concatenate(ends).tolist())) == 1


def test_the_first_token_with_bytes_of_a_row():
    assert first_with_bytes(np.array([5, 6, 7]), np.array([0, 2, 3])) == 6
    assert (
        first_with_bytes(np.array([5]), np.array([0])) == first_with_bytes(np.array([], int), np.array([], int)) == -1
    )


def test_a_partition_is_kept_and_made_anew_where_it_is_damaged(tmp_path):
    student, teacher = [b"a", b"ab", CONTROL, END], [b"a", b"b", END]
    calls = []

    def make():
        calls.append(1)
        return partition_of(student, teacher)

    folder, key = tmp_path / "deep" / "tokens", classes_key(table_of(student), table_of(teacher), "s", "t")
    first, second = kept_classes(folder, key, make), kept_classes(folder, key, make)
    assert len(calls) == 1
    assert (first.classes, first.other) == (second.classes, second.other)
    assert first.student_Vs.tolist() == second.student_Vs.tolist() and second.student_Vs.dtype == np.int64
    assert first.teacher_Vt.tolist() == second.teacher_Vt.tolist()
    (file,) = folder.iterdir()
    data = file.read_bytes()
    for damaged in (b"", data[: len(data) // 2], data[:-1] + b"\x05", b"no file of ours"):
        file.write_bytes(damaged)
        again = kept_classes(folder, key, make)
        assert again.student_Vs.tolist() == first.student_Vs.tolist()
    assert len(calls) == 5
    file.rename(folder / "another.safetensors")
    kept_classes(folder, "another", make)
    assert len(calls) == 6, "a file says which partition it holds"


def test_the_name_of_a_partition_changes_with_all_that_decides_it():
    one, other = table_of([b"a", END]), table_of([b"a", b"b", END])
    names = {
        classes_key(*tables, *tokenizers)
        for tables in ((one, other), (other, one), (one, one), (table_of([b"a", CONTROL]), other))
        for tokenizers in (("s", "t"), ("t", "s"), ("s", "s"))
    }
    assert len(names) == 12


def test_a_folder_that_takes_no_file_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert kept_classes(tmp_path / "file" / "tokens", "k", lambda: partition_of([b"a"], [b"a"])).classes == 1


def test_a_fake_tokenizer_and_a_real_one_have_classes():
    fake, real = FakeTokenizer((b"the", b" cat")), tokenizer("chatml")
    table = table_for(real)
    partition = vocabulary_classes(
        table, fake.table, first_tokens(real, table),
        lambda texts: np.array([fake.ids(text)[0] for text in texts]),
    )  # fmt: skip
    assert partition.classes == 256 + sum(any(table.of(i) == p for i in range(len(table))) for p in fake.pieces) + 1 + 1
