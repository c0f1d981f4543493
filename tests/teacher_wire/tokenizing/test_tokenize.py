"""Tokenize and the byte table over a real socket, with the fake teacher's own small tokenizer."""

import asyncio
import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest

from teacher_wire.artifacts.kinds.byte_table import ByteTableKind, of_artifact
from teacher_wire.core.errors import (
    CapabilityError,
    LabelError,
    LimitError,
    MismatchError,
    RequestError,
    UnavailableError,
)
from teacher_wire.core.info import BYTE_TABLE
from teacher_wire.core.tensor import Tensor
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.fake_tokenizer import FakeTokenizer
from teacher_wire.testing.loopback import serve
from teacher_wire.tokenizing import codec, servicer
from teacher_wire.tokenizing.messages import TextRow, TokenizeCall, TokenizedRow, check_tokenize
from teacher_wire.vocabulary.byte_table import END, TEXT, THINK_CLOSE, THINK_OPEN, UNUSED

READER = FakeTokenizer((b"the ", b"cat", "你好".encode(), b"12"))
ASKED = json.dumps({"messages": [{"role": "user", "content": "the cat?"}]}).encode()
WRAPPING = np.array([2**31 - 1, -(2**31), -1, 3], np.int32)  # differences of int32 that seem to rise
TEXTS = ["the cat 123", "你好，世界 🤖\r\n", "", "  x\n"]


@contextlib.asynccontextmanager
async def connected(service, **options):
    with serve(service) as server:
        async with TeacherClient(server.address, backoff_s=(0.02, 0.05), **options) as client:
            yield client, await client.teacher()


def teacher(**changes):
    return FakeTeacher(**{"vocab_rows": 300, "reader": READER, **changes})


async def test_rows_come_back_in_the_teachers_tokens_with_the_byte_table_to_read_them():
    async with connected(teacher()) as (client, info):
        rows = await client.tokenize(info, [TextRow(text.encode(), ASKED) for text in TEXTS])
        table = of_artifact(await client.artifact(info, info.artifact(BYTE_TABLE)))
    assert len(table) == info.vocab_rows and table.role_V[-1] == UNUSED
    prompt = READER.rows([TextRow(b"", ASKED)])[0].token_ids_T[:-1]
    for text, row in zip(TEXTS, rows, strict=True):
        target = row.token_ids_T[row.prompt_tokens :]
        assert not row.refused and row.ended and table.role_V[target[-1]] == END
        np.testing.assert_array_equal(row.token_ids_T[: row.prompt_tokens], prompt)
        assert table.text_of(target) == text.encode()
        np.testing.assert_array_equal(table.ends_of(target), row.byte_ends_C)


async def test_a_text_alone_has_neither_prompt_nor_end():
    async with connected(teacher()) as (client, info):
        [row] = await client.tokenize(info, [TextRow("你好12".encode())])
    assert (row.prompt_tokens, row.ended) == (0, False)
    assert row.token_ids_T.tolist() == READER.ids("你好12".encode()) and len(row.token_ids_T) == 2


async def test_marks_become_the_teachers_tokens_of_that_role():
    marks = ((0, THINK_OPEN), (3, THINK_CLOSE))
    async with connected(teacher()) as (client, info):
        [row] = await client.tokenize(info, [TextRow(b"catthe ", ASKED, marks)])
    ids = row.token_ids_T[row.prompt_tokens :].tolist()
    assert READER.table.role_V[ids].tolist() == [THINK_OPEN, TEXT, THINK_CLOSE, TEXT, END]
    assert row.byte_ends_C.tolist() == [0, 3, 3, 7, 7]


async def test_a_row_that_cannot_be_had_leaves_the_others_alone():
    rows = [
        TextRow(b"a", ASKED),
        TextRow(b"\xff"),
        TextRow(b"a", b"{nonsense"),
        TextRow(b"x" * (1 << 20), ASKED),
        TextRow(b"b", ASKED),
    ]
    done = []
    async with connected(teacher()) as (client, info):
        answers = await client.tokenize(info, rows, lambda some, of: done.append((some, of)))
    assert [bool(answer.refused) for answer in answers] == [False, True, True, True, False]
    assert "utf-8" in answers[1].refused and "JSON" in answers[2].refused
    assert "bytes" in answers[3].refused and done == [(5, 5)]


async def test_many_rows_go_in_calls_within_the_limits_and_keep_their_order():
    service = teacher()
    async with connected(service) as (client, info):
        texts = [f"row {number} the cat".encode() for number in range(700)]
        rows = await client.tokenize(info, [TextRow(text) for text in texts])
    assert service.tokenize_calls == 3
    assert [READER.table.text_of(row.token_ids_T) for row in rows] == texts


async def test_an_answer_that_is_too_long_for_a_message_comes_in_halves(monkeypatch):
    monkeypatch.setattr(servicer, "MAX_REPLY_BYTES", 1000)
    service = teacher()
    texts = [b"x" * 40 * (1 + number % 2) for number in range(16)] + [b"y" * 500] + [b"z" * 40]
    async with connected(service) as (client, info):
        rows = await client.tokenize(info, [TextRow(text) for text in texts])
    assert [bool(row.refused) for row in rows] == [False] * 16 + [True, False]
    assert rows[16].refused == "its ids take 4000 bytes, and one answer 1000"
    kept = [text for text in texts if len(text) < 500]
    assert [READER.table.text_of(row.token_ids_T) for row in rows if not row.refused] == kept


async def test_a_broken_call_is_made_again():
    class Flaky(FakeTeacher):
        failures = 2

        async def tokenize(self, call):
            if self.failures:
                self.failures -= 1
                raise UnavailableError("told to")
            return await super().tokenize(call)

    async with connected(Flaky(vocab_rows=300, reader=READER), on_trouble=lambda error: None) as (client, info):
        [row] = await client.tokenize(info, [TextRow(b"cat")])
        assert len(row.token_ids_T) == 1 and client.stats.retries == 2


async def test_a_silent_teacher_is_given_up():
    async with connected(teacher(delay_s=30.0), answer_s=0.1, retry_for_s=0.0) as (client, info):
        with pytest.raises(UnavailableError, match="no answer came"):
            await client.tokenize(info, [TextRow(b"cat")])
        with pytest.raises(Exception, match="not tokenised in time"):
            async with TeacherClient(client.address, retry_for_s=0.0) as patient:
                await patient.tokenize(info, [TextRow(b"cat")], timeout_s=0.05)


async def test_teachers_without_a_reader_say_so_on_both_sides():
    async with connected(FakeTeacher()) as (client, info):
        assert info.limits.max_tokenize_rows == 0
        with pytest.raises(CapabilityError, match="does not tokenise"):
            await client.tokenize(info, [TextRow(b"cat")])
        pretended = replace(info, limits=replace(info.limits, max_tokenize_rows=9, max_tokenize_bytes=9))
        with pytest.raises(CapabilityError, match="does not tokenise"):
            await client.tokenize(pretended, [TextRow(b"cat")])
        with pytest.raises(CapabilityError):
            info.artifact(BYTE_TABLE)


async def test_other_weights_are_a_mismatch():
    async with connected(teacher()) as (client, info):
        with pytest.raises(MismatchError):
            await client.tokenize(replace(info, fingerprint="0" * 64), [TextRow(b"cat")])


async def test_the_server_holds_to_its_limits_whatever_the_client_believes():
    async with connected(teacher(), retry_for_s=0.0) as (client, info):
        generous = replace(info, limits=replace(info.limits, max_tokenize_rows=999, max_tokenize_bytes=2 << 20))
        with pytest.raises(LimitError, match="limit=256"):
            await client.tokenize(generous, [TextRow(b"a")] * 300)
        with pytest.raises(LimitError, match="rows, bytes"):
            await client.tokenize(generous, [TextRow(b"a" * (1 << 20)), TextRow(b"b")])


@pytest.mark.parametrize("marks", [((2, 5), (1, 6)), ((9, 5),), ((0, 4),), ((0, 77),)])
def test_marks_that_are_none_are_refused(marks):
    with pytest.raises(RequestError, match=r"rows\[0\].marks"):
        check_tokenize(TokenizeCall("fake", "", (TextRow(b"abc", b"", marks),)), teacher().teacher_info())


def test_no_rows_are_refused():
    with pytest.raises(RequestError, match="at least one"):
        check_tokenize(TokenizeCall("fake", "", ()), teacher().teacher_info())


def spoiled(**changes):
    """A reply about one row with one thing wrong in it."""
    row = READER.rows([TextRow(b"cat", ASKED)])[0]
    return codec.encode_reply([replace(row, **changes)], "f")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token_ids_T": np.array([1, 2, 400], np.int32), "prompt_tokens": 1}, "vocabulary"),
        ({"token_ids_T": np.array([1, -2, 4], np.int32), "prompt_tokens": 1}, "vocabulary"),
        ({"prompt_tokens": 1}, "one end for each token"),
        ({"byte_ends_C": np.array([3, 2], np.int32)}, "those of the text"),
        ({"byte_ends_C": np.array([4, 3], np.int32)}, "those of the text"),
        ({"token_ids_T": np.ones(5, np.int32), "prompt_tokens": 1, "byte_ends_C": WRAPPING}, "those of the text"),
    ],
)
def test_answers_that_are_none_are_refused(changes, named):
    info = teacher().teacher_info()
    call = TokenizeCall("fake", "f", (TextRow(b"cat", ASKED),))
    with pytest.raises(LabelError, match=named):
        codec.decode_reply(spoiled(**changes), call, info)


def test_why_a_row_is_refused_is_short_and_moves_no_cursor():
    reply = codec.encode_reply([TokenizedRow.refusal("no \x1b[2J" + "x" * 10_000)], "f")
    (row,) = codec.decode_reply(reply, TokenizeCall("fake", "f", (TextRow(b"cat", ASKED),)), teacher().teacher_info())
    assert row.refused.startswith("no  [2Jx") and len(row.refused) <= 400


def test_a_tampered_answer_and_a_foreign_one_are_refused():
    info, call = teacher().teacher_info(), TokenizeCall("fake", "f", (TextRow(b"cat", ASKED),))
    reply = spoiled()
    assert codec.decode_reply(reply, call, info)[0].ended
    reply.rows[0].ended = False
    with pytest.raises(LabelError, match="digest"):
        codec.decode_reply(reply, call, info)
    with pytest.raises(LabelError, match="another teacher"):
        codec.decode_reply(codec.encode_reply([], "g"), call, info)
    with pytest.raises(LabelError, match="for each row"):
        codec.decode_reply(codec.encode_reply([], "f"), call, info)


@pytest.mark.parametrize("ends", [[0, *WRAPPING.tolist()], [0, 2, 1, 1, 3], [1, 1, 1, 1, 3], [0, 1, 1, 1, 2]])
def test_byte_tables_whose_ends_are_none_are_refused(ends):
    tensors = {
        "bytes_B": Tensor("uint8", np.zeros(3, np.uint8)),
        "ends_V1": Tensor("int32", np.array(ends, np.int32)),
        "role_V": Tensor("uint8", np.full(4, TEXT, np.uint8)),
    }
    with pytest.raises(LabelError, match="those of its bytes"):
        ByteTableKind().make(tensors, {})


async def test_what_a_tenant_has_open_is_counted_and_given_back():
    service = teacher(delay_s=0.05)
    with serve(service) as server:
        async with TeacherClient(server.address) as client:
            info = await client.teacher()
            await asyncio.gather(*(client.tokenize(info, [TextRow(b"cat")]) for _ in range(5)))
        held = server.servicer.held
    assert held["request_bytes"] == held["reply_bytes"] == 0


def test_the_digest_is_of_all_of_a_row():
    row = TokenizedRow(np.array([1, 2], np.int32), 1, np.array([3], np.int32), True)
    others = [
        replace(row, token_ids_T=np.array([1, 3], np.int32)),
        replace(row, prompt_tokens=0),
        replace(row, byte_ends_C=np.array([4], np.int32)),
        replace(row, ended=False),
    ]
    assert len({row.digest, *(other.digest for other in others)}) == 5
