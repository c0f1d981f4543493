"""Tokenize from a student to a teacher's own tokenizer: engine, edge, tokens, quotas, tenants, and teachers that have none."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from teacher_server.config.backends import FakeBackend, TransformersBackend
from teacher_server.config.server import TeacherConfig, TenantConfig
from teacher_server.replica import reading
from teacher_server.replica.reading import Reader
from teacher_wire.artifacts.kinds.byte_table import of_artifact
from teacher_wire.artifacts.kinds.output_head import OUTPUT_HEAD
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import AuthenticationError, CapabilityError, MismatchError, OverloadedError
from teacher_wire.core.info import BYTE_TABLE
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.fake_tokenizer import FakeTokenizer
from teacher_wire.tokenizing.messages import TextRow, TokenizeCall, TokenizedRow
from teacher_wire.vocabulary.byte_table import END, UNUSED
from tests.published import Served
from tests.teacher_server.edge.test_server import TOKEN_A, client_of, edge
from tests.tiny import make_model

ASKED = json.dumps({"messages": [{"role": "user", "content": "the cat?"}]}).encode()
TEXTS = ["the old dog", "你好 🤖\r\n  x", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("reading") / "model", vocab=320)


def config_of(folder):
    return TeacherConfig(name="me", backend=TransformersBackend(model=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def served(folder):
    made = Served(config_of(folder))
    yield made
    made._engine.reader.close()


async def test_a_student_gets_ids_and_byte_table_and_may_ask_for_labels_of_them(folder, served):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    async with edge(served) as server, client_of(server) as client:
        info = await client.teacher()
        assert [artifact.kind for artifact in info.artifacts] == [OUTPUT_HEAD, BYTE_TABLE]
        rows = await client.tokenize(info, [TextRow(text.encode(), ASKED) for text in TEXTS])
        table = of_artifact(await client.artifact(info, info.artifact(BYTE_TABLE)))
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "the cat?"}], add_generation_prompt=True, tokenize=False
        )
        for text, row in zip(TEXTS, rows, strict=True):
            whole = tokenizer(prompt + text + "<|im_end|>", add_special_tokens=False)["input_ids"]
            assert row.token_ids_T.tolist() == whole and row.ended
            assert table.text_of(row.token_ids_T[row.prompt_tokens :]) == text.encode()
        assert (
            len(table) == info.vocab_rows == 320
            and table.role_V[300] == UNUSED
            and table.role_V[tokenizer.eos_token_id] == END
        )
        wanted = [
            [index >= row.prompt_tokens - 1 for index in range(len(row.token_ids_T) - 1)] + [False] for row in rows
        ]
        batch = TokenBatch.pack([row.token_ids_T.tolist() for row in rows], wanted)
        labels = await client.score(info, spec_of("top_k", 320, k=4), batch)
    assert len(labels["topk_ids_NK"].array) == sum(len(row.byte_ends_C) for row in rows)
    counters = served._engine.counters()
    assert counters["tokenized_rows"] >= 3 and counters["tokenized_bytes"] > 0


async def test_other_weights_are_a_mismatch_and_a_limit_a_refusal(served):
    reader = served._engine.reader
    with pytest.raises(MismatchError) as caught:
        await reader.tokenize(TokenizeCall("me", "0" * 64, (TextRow(b"a"),)))
    assert caught.value.field == "fingerprint"


async def test_tokens_and_quotas_hold_for_it_too(served, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {TOKEN_A}\n")
    async with edge(served, tokens_file=tokens) as server:
        async with client_of(server, token="c" * 20) as client:
            with pytest.raises(AuthenticationError):
                await client.tokenize(served.teacher_info(), [TextRow(b"cat")])
        async with client_of(server, token=TOKEN_A) as client:
            info = await client.teacher()
            await client.tokenize(info, [TextRow(b"cat" * 1000)])
            sent = server.counters()["tenants"]["alice"]["sent_bytes"]
            assert sent > 4 * 1000 and server.counters()["held"]["reply_bytes"] == 0
        server.set_tenants({"alice": TenantConfig(bytes_per_s=100)})
        async with TeacherClient(server.address, credentials=client._connection._credentials, retry_for_s=0.0) as hasty:
            await hasty.tokenize(info, [TextRow(b"cat" * 1000)])  # one overdraws the quota
            with pytest.raises(OverloadedError, match="over its quota"):
                await hasty.tokenize(info, [TextRow(b"cat" * 1000)])
        assert server.counters()["held"] | {"kept_reply_bytes": 0} == {
            "open_calls": 0,
            "request_bytes": 0,
            "reply_bytes": 0,
            "kept_reply_bytes": 0,
        }


async def test_an_edge_that_drains_refuses_it():
    teacher = FakeTeacher(vocab_rows=300, reader=FakeTokenizer())
    async with edge(teacher) as server:
        info = teacher.teacher_info()
        server._gate.closed = True
        async with TeacherClient(server.address, retry_for_s=0.0) as client:
            with pytest.raises(Exception, match="going down"):
                await client.tokenize(info, [TextRow(b"cat")])


class Slow:
    """Says in which order pieces came; each takes as long as it is told."""

    def __init__(self):
        self.order = []

    def rows(self, rows):
        self.order.append(rows[0].text[:1])
        return [TokenizedRow(np.zeros(1, np.int32), 0, np.array([len(row.text)], np.int32), False) for row in rows]

    def close(self):
        pass


async def test_a_tenant_with_much_to_read_holds_nobody_up(served):
    """Its pieces are taken one by one, and those of others between them."""
    reader = Reader(served._engine._backend, served._engine.info)
    reader._process.close()
    slow = reader._process = Slow()
    much = TokenizeCall("me", "", tuple(TextRow(b"a" * reading._PIECE_BYTES) for _ in range(10)), tenant="a")
    little = TokenizeCall("me", "", (TextRow(b"b"),), tenant="b")
    first = asyncio.create_task(reader.tokenize(much))
    while not slow.order:
        await asyncio.sleep(0)
    await reader.tokenize(little)
    assert slow.order.index(b"b") < 5, slow.order
    assert len(await first) == 10 and len(slow.order) == 11
    reader.close()


async def test_teachers_without_a_tokenizer_offer_nothing():
    made = Served(TeacherConfig(name="me", backend=FakeBackend()))
    assert BYTE_TABLE not in {artifact.kind for artifact in made.teacher_info().artifacts}
    assert made.teacher_info().limits.max_tokenize_rows == 0
    with pytest.raises(CapabilityError, match="does not tokenise"):
        await made._engine.reader.tokenize(TokenizeCall("me", "", (TextRow(b"a"),)))


class WordPieces:
    """A backend whose tokenizer does not say which bytes its tokens stand for."""

    def __init__(self):
        words = {word: n for n, word in enumerate(["[UNK]", "[SEP]", "the", "cat", "##s"])}
        made = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[SEP]")


async def test_teachers_whose_tokens_do_not_say_their_bytes_serve_as_before(caplog):
    caplog.set_level("INFO")
    info = FakeTeacher().teacher_info()
    reader = Reader(WordPieces(), info)
    assert reader.info == info and reader.artifacts == ()
    assert "WordPiece" in caplog.text and "offers no Tokenize" in caplog.text
    with pytest.raises(CapabilityError, match="does not tokenise"):
        await reader.tokenize(TokenizeCall("fake", "", (TextRow(b"a"),)))
    reader.close()


async def test_everything_else_of_the_description_is_as_without_it(served):
    bare = replace(
        served.teacher_info(),
        artifacts=served.teacher_info().artifacts[:1],
        limits=replace(served.teacher_info().limits, max_tokenize_bytes=0, max_tokenize_rows=0),
    )
    made = Reader(served._engine._backend, bare)
    assert made.info == served.teacher_info()
    made.close()
