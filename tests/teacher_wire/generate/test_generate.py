"""Generate over a real socket: samples as they are made, each once, refusals by name, broken calls taken up, cancellation."""

import asyncio
import contextlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.data.rows.formats import Turn
from student_trainer.data.trace_schema import Caps
from student_trainer.traces.questions import Question
from student_trainer.traces.styles.fitting import caps_as_bounds
from student_trainer.traces.styles.json_text import grammar_schema
from teacher_wire.core.errors import (
    CapabilityError,
    DeadlineError,
    LabelError,
    LimitError,
    MismatchError,
    OverloadedError,
    RequestError,
    ServerError,
    TeacherWireError,
)
from teacher_wire.endpoint.client import TeacherClient
from teacher_wire.generate import codec
from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec, check_generate
from teacher_wire.generate.schemas import check_schema
from teacher_wire.testing.fake_generation import FakeWriter
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from teacher_wire.v2 import teacher_pb2 as pb

PROMPTS = PromptBatch.pack([[1, 2, 3], [4], [5, 6]])
SPEC = SamplingSpec(samples=3, max_new_tokens=8)


@contextlib.asynccontextmanager
async def connected(writer=None, **options):
    fake = FakeTeacher(writer=writer or FakeWriter())
    with serve(fake) as server:
        async with TeacherClient(
            server.address, backoff_s=(0.01, 0.02), on_trouble=lambda _: None, **options
        ) as client:
            client.server, client.fake = server, fake
            yield client, await client.teacher()


async def collect(client, info, spec=SPEC, prompts=PROMPTS, **options):
    return {(s.prompt, s.index): s async for s in client.generate(info, spec, prompts, **options)}


async def until(condition, within_s=5.0):
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_every_sample_arrives_once_as_it_was_made():
    async with connected() as (client, info):
        assert info.generates == ("tokens", "json_schema") and info.limits.max_samples == 64
        got = await collect(client, info)
        assert sorted(got) == [(p, i) for p in range(3) for i in range(3)]
        call = GenerateCall(info.name, "", SPEC, PROMPTS)
        async for made in client.fake.generate(call):
            arrived = got[made.prompt, made.index]
            np.testing.assert_array_equal(arrived.token_ids_n, made.token_ids_n)
            np.testing.assert_array_equal(arrived.token_logp_n, made.token_logp_n)
            assert arrived.finish == made.finish and arrived.logp == pytest.approx(made.token_logp_n.sum())
        await until(lambda: client.server.servicer.open_requests == 0)


@pytest.mark.parametrize("mistake", ["repeated", "unasked", "too_long", "nan", "foreign_id"])
async def test_a_spoiled_sample_is_refused(mistake):
    async with connected(FakeWriter(mistake=mistake)) as (client, info):
        with pytest.raises(LabelError):
            await collect(client, info)


async def test_a_server_that_forgets_or_crashes_is_found_out():
    async with connected(FakeWriter(mistake="missing"), retry_for_s=0.1) as (client, info):
        with pytest.raises(TeacherWireError, match="dropped samples"):
            await collect(client, info, SamplingSpec(), PromptBatch.pack([[1]]))
    async with connected(FakeWriter(mistake="crash")) as (client, info):
        with pytest.raises(ServerError, match="told to crash"):
            await collect(client, info)


async def test_a_broken_call_is_taken_up_without_what_has_come():
    async with connected(FakeWriter(break_after=4, refusals=2)) as (client, info):
        got = await collect(client, info)
        assert len(got) == 9
        fake = client.fake.writer
        assert (fake.calls, fake.written, client.stats.retries) == (4, 9, 3), "nothing is made twice"


async def test_a_broken_connection_is_taken_up_too():
    async with connected(FakeWriter(delay_s=0.02)) as (client, info):
        got = []
        async for sample in client.generate(info, SPEC, PROMPTS):
            got.append((sample.prompt, sample.index))
            if len(got) == 3:
                client.server.stop()
                client.server.start()
        assert sorted(got) == [(p, i) for p in range(3) for i in range(3)]


async def test_retries_end():
    async with connected(FakeWriter(refusals=1000), retry_for_s=0.05) as (client, info):
        with pytest.raises(OverloadedError):
            await collect(client, info)


async def test_leaving_stops_the_work():
    async with connected(FakeWriter(delay_s=0.01)) as (client, info):
        samples = client.generate(info, SamplingSpec(samples=60, max_new_tokens=8), PROMPTS)
        await anext(samples)
        await samples.aclose()
        await until(lambda: client.fake.writer.open == 0)
        assert client.fake.writer.written < 60
        await until(lambda: client.server.servicer.open_requests == 0)


async def test_late_samples_end_the_call():
    async with connected(FakeWriter(delay_s=0.05)) as (client, info):
        with pytest.raises(DeadlineError):
            await collect(client, info, timeout_s=0.12)
        await until(lambda: client.fake.writer.open == 0)


@pytest.mark.parametrize(
    ("spec", "prompts", "error"),
    [
        ({"samples": 65}, [[1]], LimitError),
        ({"max_new_tokens": 4097}, [[1]], LimitError),
        ({"max_new_tokens": 4096}, [[1] * 2], LimitError),
        ({"samples": 64, "max_new_tokens": 4000}, [[1]] * 200, LimitError),
        ({}, [[1]] * 257, LimitError),
        ({}, [[64]], RequestError),
        ({"stop_ids": (64,)}, [[1]], RequestError),
        ({"json_schema": "{"}, [[1]], RequestError),
        ({"json_schema": json.dumps({"description": "x" * 70_000})}, [[1]], LimitError),
    ],
)
async def test_what_breaks_a_limit_is_refused_before_it_is_sent(spec, prompts, error):
    async with connected() as (client, info):
        with pytest.raises(error):
            await collect(client, info, SamplingSpec(**{"max_new_tokens": 4, **spec}), PromptBatch.pack(prompts))
        assert client.fake.writer.calls == 0


async def test_capability_and_fingerprint():
    async with connected(FakeWriter(generates=("tokens",))) as (client, info):
        with pytest.raises(CapabilityError, match="json_schema"):
            await collect(client, info, SamplingSpec(json_schema="{}"))
        call = GenerateCall(info.name, "f" * 64, SPEC, PROMPTS)
        with pytest.raises(MismatchError):
            check_generate(call, info)


@pytest.mark.parametrize(
    "bad",
    [
        {"samples": 0}, {"max_new_tokens": 0}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": -1.0},
        {"temperature": 1e-9}, {"temperature": 1e9}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": math.nan}, {"seed": -1},
        {"seed": 1 << 64}, {"stop_ids": (-1,)}, {"stop_ids": tuple(range(65))},
    ],
)  # fmt: skip
def test_sampling_out_of_range(bad):
    with pytest.raises(RequestError) as caught:
        SamplingSpec(**bad)
    assert caught.value.field == next(iter(bad))


CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(40)} | {"d40": {}}
LAUGHS = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 8} for i in range(8)} | {"d8": {}}
BAD_SCHEMAS = {
    "not JSON": "{", "no object": "[]", "true": "true", "NaN": '{"minimum": NaN}', "twice": '{"type":"null","type":"null"}',
    "NUL": '{"title": "\\u0000"}', "half": '{"title": "\ud800"}', "unknown": {"pattern": "a{999999}"},
    "recursive": {"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    "unused recursive": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "root": {"$ref": "#"}, "foreign": {"$ref": "https://example.org/schema"}, "absent": {"$ref": "#/$defs/x"},
    "chain": {"$defs": CHAIN}, "laughs": {"$defs": LAUGHS, "$ref": "#/$defs/d0"},
    "inner defs": {"items": {"$defs": {}}}, "type": {"type": "text"}, "types": {"type": []}, "kind": {"type": 3},
    "items": {"items": True}, "anyOf": {"anyOf": []}, "properties": {"properties": []}, "defs": {"$defs": []},
    "required": {"required": ["a"]}, "required type": {"required": "a"}, "enum": {"enum": []},
    "count": {"minItems": -1}, "huge": {"maxLength": 10**9}, "float": {"minLength": 0.5}, "number": {"minimum": 1e300},
    "bool": {"minItems": True}, "range": {"minItems": 3, "maxItems": 2}, "beside": {"$ref": "#/$defs/a", "$defs": {"a": {}}, "type": "null"},
}  # fmt: skip


@pytest.mark.parametrize("schema", BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_a_schema_nothing_can_be_held_to_is_refused(schema):
    with pytest.raises(RequestError, match="json_schema"):
        check_schema(schema if isinstance(schema, str) else json.dumps(schema), 65_536)


def test_size_and_depth_of_schemas():
    with pytest.raises(LimitError, match="bytes"):
        check_schema("{}", 1)
    with pytest.raises(LimitError, match="deep"):
        check_schema('{"items":' * 100_000, 1 << 24)
    check_schema(json.dumps({"const": '[[{"' * 100}), 65_536)
    question = Question((Turn("user", "5 + 7 = ?"),), "12", "test:1")
    for style in ("quotes", "offsets"):
        check_schema(json.dumps(grammar_schema(caps_as_bounds(style, [question], Caps()))), 65_536)
    check_schema(json.dumps({"$defs": {"a": {"type": "null"}}, "prefixItems": [{"$ref": "#/$defs/a"}] * 2}), 65_536)


@given(st.text(max_size=60))
def test_any_text_is_a_schema_or_a_refusal(text):
    with contextlib.suppress(RequestError):
        check_schema(text, 65_536)


IDS = st.lists(st.lists(st.integers(0, 63), min_size=1, max_size=5), min_size=1, max_size=4)


@given(IDS, st.integers(1, 5), st.floats(0.01, 50), st.floats(0.01, 1), st.integers(0, 2**64 - 1), st.data())
@settings(deadline=None)
def test_a_call_survives_the_wire(prompts, samples, temperature, top_p, seed, data):
    spec = SamplingSpec(samples, temperature, top_p, 7, seed, (3, 4), True, '{"type":"null"}')
    every = [(p, s) for p in range(len(prompts)) for s in range(samples)]
    have = frozenset(data.draw(st.lists(st.sampled_from(every), max_size=len(every) - 1)))
    call = GenerateCall("t", "f", spec, PromptBatch.pack(prompts), have, 1.5, "me")
    back = codec.decode_generate(pb.GenerateRequest.FromString(codec.encode_generate(call).SerializeToString()), "me")
    assert (back.teacher, back.fingerprint, back.spec, back.have, back.timeout_s, back.tenant) == (
        "t", "f", spec, have, 1.5, "me")  # fmt: skip
    assert [back.prompts.prompt(i).tolist() for i in range(len(prompts))] == prompts
    assert sorted(back.wanted()) == sorted(set(every) - have) and back.samples == len(every) - len(have)
    assert back.tokens == sum(len(prompts[p]) + 7 for p, _ in back.wanted())
