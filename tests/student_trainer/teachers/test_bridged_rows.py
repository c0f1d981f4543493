"""Rows in another tokenizer: what the teacher is asked, what becomes of its answer, and what is kept on disk."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from student_trainer.data.dataset import Example
from student_trainer.data.routing import Routing
from student_trainer.data.teacher_view import Told
from student_trainer.teachers.rows.bridged_rows import bridged_row, row_key, text_row
from student_trainer.teachers.rows.bridging import cut
from student_trainer.teachers.rows.reading import BridgePlan, Reading
from student_trainer.teachers.rows.tokenised import CHUNK, tokenised
from teacher_wire.core.errors import UnavailableError
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.fake_tokenizer import FakeTokenizer
from teacher_wire.tokenizing.messages import TextRow, TokenizedRow
from teacher_wire.vocabulary.byte_table import THINK_CLOSE, THINK_OPEN, UNUSED

OURS = FakeTokenizer((b" the", b"cat", b" cat", b"12", b"\xe4\xbd"))
THEIRS = FakeTokenizer((b"the ", b"ca", b"t", b"1", b"2"))
TOLD = b'{"messages":[{"role":"user","content":"?"}]}'


def example(text: bytes, *, prompt=3, key="rows:1", tags=(), masked=0, think=()) -> Example:
    """An answer in our tokens behind a prompt of so many; of its tokens the first `masked` have no weight."""
    ids = OURS.ids(text)
    for place, control in think:
        ids.insert(place, OURS.id_of(control))
    ids.append(OURS.id_of("<end>"))
    mask = np.zeros(prompt + len(ids), np.bool_)
    mask[prompt + masked :] = True
    return Example(
        np.array([1] * prompt + ids, np.int32), mask, len(text), key, tags=tags,
        told=Told(TOLD, prompt, text.startswith(b" ")),
    )  # fmt: skip


def bridged(row: Example, least=0.0):
    (answer,) = THEIRS.rows([text_row(row, OURS.table)])
    return bridged_row(row, OURS.table, answer, THEIRS.table, least), answer


@pytest.mark.parametrize("text", ["the cat", "12 12", "你好 😀\r\n  x", "  the cat", "a" * 50, "\n"])
def test_groups_hold_the_same_bytes_on_both_sides(text):
    row = example(text.encode())
    found, answer = bridged(row)
    assert answer.token_ids_T.size == found.view.token_ids.size
    ours = row.token_ids[row.loss_mask].astype(np.int64)
    theirs = found.view.token_ids[found.view.loss_mask].astype(np.int64)
    pieces = [
        (OURS.table.text_of(ours[a:b]), THEIRS.table.text_of(theirs[c:d]))
        for (a, b), (c, d) in zip(found.alignment.student_G2, found.alignment.teacher_G2, strict=True)
    ]
    assert all(one == other for one, other in pieces)
    assert b"".join(one for one, _ in pieces) == text.encode() and pieces[-1] == (b"", b""), "and the ends of turn"
    assert 0 < found.coverage <= 1


def test_a_space_that_sentencepiece_puts_before_an_answer_is_not_of_its_text():
    row = example(b" cat 12")
    row = replace(row, told=replace(row.told, begins_with_space=False))
    assert text_row(row, OURS.table).text == b"cat 12"
    found, _ = bridged(row)
    assert found.alignment.groups and found.view is not None
    first = found.alignment.student_G2[0].tolist(), found.alignment.teacher_G2[0].tolist()
    assert first == ([0, 1], [0, 2]), "our ' cat' is their 'ca', 't'"
    kept = replace(row, told=replace(row.told, begins_with_space=True))
    assert text_row(kept, OURS.table).text == b" cat 12" and row_key(kept) != row_key(row)


def test_think_tags_are_told_as_marks():
    row = example(b"12cat", think=((0, "<think>"), (2, "</think>")))
    asked = text_row(row, OURS.table)
    assert asked.text == b"12cat" and asked.marks == ((0, THINK_OPEN), (2, THINK_CLOSE))
    found, _ = bridged(row)
    assert found.alignment.is_control_G.sum() == 3


def test_tokens_without_weight_are_in_no_group_and_the_rest_keeps_its_place():
    whole, _ = bridged(example(b"12cat 12"))
    some, _ = bridged(example(b"12cat 12", masked=1))
    assert some.alignment.groups == whole.alignment.groups - 1
    assert (some.alignment.student_G2 == whole.alignment.student_G2[1:] - 1).all()
    assert (some.alignment.teacher_G2 == whole.alignment.teacher_G2[1:]).all(), "the teacher's rows are all of its own"


def test_too_little_coverage_or_a_refusal_leaves_a_row_to_others():
    row = example(b" the cat the cat")
    assert bridged(row, 1.0)[0].view is None and bridged(row, 1.0)[0].coverage > 0
    refused = bridged_row(row, OURS.table, TokenizedRow.refusal("no template"), THEIRS.table, 0)
    assert refused.view is None and refused.refused == "no template"
    bare = TokenizedRow(np.array([300], np.int32), 0, np.array([1], np.int32), False)
    assert "nothing stands before" in bridged_row(row, OURS.table, bare, THEIRS.table, 0).refused
    (answer,) = THEIRS.rows([text_row(row, OURS.table)])
    foreign = replace(answer, token_ids_T=answer.token_ids_T + 10_000)
    assert "byte table" in bridged_row(row, OURS.table, foreign, THEIRS.table, 0).refused


def test_a_row_with_a_token_that_the_teachers_head_lacks_is_left_to_others():
    """Its labels could not be asked for: found before the run, and not by a request in the middle of it."""
    row = example(b"the cat")
    _, answer = bridged(row)
    most = int(answer.token_ids_T.max())
    assert bridged_row(row, OURS.table, answer, THEIRS.table, 0.0, most + 1).view is not None
    found = bridged_row(row, OURS.table, answer, THEIRS.table, 0.0, most)
    assert found.view is None and f"its token {most} is beyond the {most}" in found.refused


def test_the_rows_of_an_answer_are_those_of_the_sequences_that_were_asked():
    tags = ("math",), (), ("math", "x"), ()
    rows = [
        example(text, key=str(i), tags=own)
        for i, (text, own) in enumerate(zip((b"12", b"cat", b" the cat", b"a"), tags, strict=True))
    ]
    routing = Routing((("one", ("math",)), ("rest", ())))
    one, rest = (Reading(name, routing) for name in ("one", "rest"))
    assert rest.asked(rows).sequences == (0, 1, 2, 3) and rest.asked(rows).row_M is None
    asked = one.asked(rows)
    lengths = [int(row.loss_mask.sum()) for row in rows]
    bounds = np.cumsum([0, *lengths])
    assert asked.sequences == (0, 2) and asked.request.names == ("0", "2")
    assert asked.row_M.tolist() == [*range(bounds[0], bounds[1]), *range(bounds[2], bounds[3])]
    labels_N = np.concatenate([row.token_ids[row.loss_mask] for row in rows])
    assert (labels_N[asked.row_M] == asked.request.batch.labels_N()).all()
    assert one.asked([rows[1], rows[3]]) is None and one.request([rows[1]]) is None


def test_groups_of_a_micro_batch_skip_the_rows_that_are_not_labelled():
    rows = [example(b"12cat", key="a"), example(b" the cat the", key="b"), example(b"cat", key="c")]
    found = {row_key(row): bridged(row)[0] for row in rows}
    found[row_key(rows[1])] = replace(found[row_key(rows[1])], view=None, alignment=None)
    reading = Reading("far", None, BridgePlan(None, found, 0.5, 100.0, "d"))
    asked = reading.asked(rows)
    assert asked.sequences == (0, 2) and asked.row_M is None
    labels_N = np.concatenate([row.token_ids[row.loss_mask] for row in rows]).astype(np.int64)
    labels_M = asked.request.batch.labels_N().astype(np.int64)
    for (a, b), (c, d) in zip(asked.groups.student_G2, asked.groups.teacher_G2, strict=True):
        assert OURS.table.text_of(labels_N[a:b]) == THEIRS.table.text_of(labels_M[c:d])
    assert asked.groups.student_G2[-1, 1] == labels_N.size and asked.groups.teacher_G2[-1, 1] == labels_M.size


class Teacher:
    """Answers in its tokens, until it has answered so often."""

    def __init__(self, most=10**9):
        self.asked, self.most = 0, most

    async def ask(self, rows):
        if self.asked >= self.most:
            raise UnavailableError("away")
        self.asked += 1
        return THEIRS.rows(rows)


def rows_on_disk(folder, teacher, rows, told=None, **changes):
    info = replace(FakeTeacher(vocab_rows=len(THEIRS), reader=THEIRS).teacher_info(), **changes)
    return asyncio.run(
        tokenised(teacher.ask, info, rows, folder, lambda done: None, ([] if told is None else told).append)
    )


def test_tokens_of_rows_are_asked_for_once_and_a_run_that_broke_goes_on(tmp_path):
    rows = [TextRow(f"row {i}".encode(), TOLD) for i in range(CHUNK * 2 + 5)]
    first = Teacher(most=2)
    with pytest.raises(UnavailableError):
        rows_on_disk(tmp_path, first, rows)
    second = Teacher()
    found = rows_on_disk(tmp_path, second, rows)
    assert second.asked == 1, "the last file alone"
    assert [row.digest for row in found] == [row.digest for row in THEIRS.rows(rows)]
    assert rows_on_disk(tmp_path, Teacher(most=0), rows)[7].digest == found[7].digest
    assert not list(tmp_path.glob("*.partial"))


def test_other_weights_find_the_tokens_and_another_tokenizer_or_template_does_not(tmp_path):
    rows = [TextRow(b"row", TOLD)]
    rows_on_disk(tmp_path, Teacher(), rows)
    for changes, asked in (
        ({"fingerprint": "9" * 64}, 0),
        ({"tokenizer_sha256": "9" * 64}, 1),
        ({"chat_template_sha256": "9" * 64}, 1),
    ):
        teacher = Teacher()
        rows_on_disk(tmp_path, teacher, rows, **changes)
        assert teacher.asked == asked, changes


def test_a_damaged_file_is_asked_for_again_and_a_refusal_is_not_kept(tmp_path):
    rows = [TextRow(b"row", TOLD)]
    rows_on_disk(tmp_path, Teacher(), rows)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    again = Teacher()
    assert rows_on_disk(tmp_path, again, rows)[0].digest == THEIRS.rows(rows)[0].digest and again.asked == 1
    bad = [TextRow(b"\xff", TOLD)]
    for _ in range(2):
        teacher = Teacher()
        assert rows_on_disk(tmp_path, teacher, bad)[0].refused and teacher.asked == 1


def test_a_folder_that_takes_nothing_is_told_of(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    told = []
    assert rows_on_disk(blocked / "tokens", Teacher(), [TextRow(b"row", TOLD)], told)[0].token_ids_T.size
    assert "cannot be kept" in told[0]


def test_a_table_is_cut_or_filled_to_the_rows_of_a_head():
    table = OURS.table
    for rows in (1, 9, len(table) - 1, len(table), len(table) + 4):
        made = cut(table, rows)
        assert len(made) == rows and made.ends_V1.size == rows + 1 and made.ends_V1[-1] == made.bytes_B.size
        assert all(made.of(i) == table.of(i) for i in range(min(rows, len(table))))
        assert (made.role_V[len(table) :] == UNUSED).all()
