"""Tokenize through Ray Serve and gRPC: ids of the teacher's tokenizer, from whichever replica, and its byte table."""

import asyncio
import json

import pytest
from transformers import AutoTokenizer

from teacher_wire.artifacts.kinds.byte_table import of_artifact
from teacher_wire.core.info import BYTE_TABLE
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.tokenizing.messages import TextRow

pytestmark = pytest.mark.ray


async def test_served_ids_are_those_of_the_tokenizer_called_directly(teachers):
    tokenizer = AutoTokenizer.from_pretrained(teachers.model)
    turns = [{"role": "user", "content": "the cat? 你好"}]
    asked = json.dumps({"messages": turns}).encode()
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    texts = [f"the old dog {number}\r\n🤖" for number in range(300)]
    async with TeacherClient(teachers.address) as client:
        infos = [await client.teacher(name) for name in ("exact", "shared")]
        answers = await asyncio.gather(
            *(
                client.tokenize(info, [*(TextRow(text.encode(), asked) for text in texts), TextRow(b"\xff")])
                for info in infos
            )
        )
        table = of_artifact(await client.artifact(infos[0], infos[0].artifact(BYTE_TABLE)))
        async with asyncio.timeout(30):
            while "tokenize" not in await stages(client):  # replicas tell of what they do once a second
                await asyncio.sleep(0.2)
    for rows in answers:
        assert [bool(row.refused) for row in rows] == [False] * 300 + [True]
        for text, row in zip(texts, rows, strict=False):
            ids = tokenizer(prompt + text + "<|im_end|>", add_special_tokens=False)["input_ids"]
            assert row.token_ids_T.tolist() == ids
            assert table.text_of(row.token_ids_T[row.prompt_tokens :]) == text.encode()
    assert answers[0][0].digest == answers[1][0].digest


async def stages(client):
    """Whose latencies the server tells."""
    status = await client.server_status()
    return {latency.stage for teacher in status.teachers for latency in teacher.latencies}
