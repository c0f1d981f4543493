"""Real vLLM behind the backend: the same labels as transformers, texts that obey, nothing left behind, nothing that kills it.

One engine a role, in float32 with a prefix cache, and one in bfloat16 without; the other two combinations have an engine of
their own for one test each, in `make thorough`. `make test` installs vLLM; without it (a plain `pytest`) these tests are skipped.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.data.rows.formats import Turn
from student_trainer.data.trace_schema import Caps
from student_trainer.traces.questions import Question
from student_trainer.traces.styles.fitting import caps_as_bounds
from student_trainer.traces.styles.json_text import grammar_schema
from teacher_server.backends.transformers import backend as transformers_backend
from teacher_server.backends.vllm import backend as vllm_backend
from teacher_server.backends.vllm.writing import refuse_sampling, sample_seed
from teacher_server.config.backends import TransformersBackend, VllmBackend
from teacher_server.config.server import TeacherConfig
from teacher_server.errors import ServerConfigError
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.errors import LimitError, RequestError, UnavailableError
from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec
from teacher_wire.score.signals import spec_of
from teacher_wire.testing.loopback import serve
from teacher_wire.tokenizing.messages import TextRow, TokenizeCall
from tests.e2e.classroom import EngineService
from tests.faults import test_hostile_score as hostile_score
from tests.faults.test_hostile_generate import REQUESTS, attack
from tests.tiny import head_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None and "LYCEUM_VLLM" not in os.environ, reason="no vLLM: make setup-vllm"
    ),
]
VOCAB = 300
SMALL_BLOCKS = {
    "block_size": 32
}  # vLLM's default on a CPU is 128: no prefix of these short sequences would ever be cached
HIDDEN = spec_of("hidden", VOCAB)
PROMPTS = [[5, 6, 7], [9] * 30, [1, 2], [5, 6, 7]]


def settings(folder, **changes):
    """Head dimension 32: vLLM's CPU kernels know no smaller one."""
    small = {"kv_cache_gb": 0.25, "enforce_eager": True, "max_batch_tokens": 256, "max_sequences": 16}
    return VllmBackend(model=str(folder), **{**small, **changes})


@pytest.fixture(scope="module")
def folder(model_factory):
    return model_factory("qwen2", hidden=128)


@pytest.fixture(scope="module")
def calm(folder, tmp_path_factory):
    """The same model with ordinary weights: with three times those, bfloat16 is noise for any backend."""
    calm = shutil.copytree(folder, tmp_path_factory.mktemp("calm") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.div_(3.0)
    model.save_pretrained(calm)
    return calm


def reference(folder, dtype):
    return transformers_backend.load(
        TransformersBackend(model=str(folder), dtype=dtype, device="cpu"), deterministic=False
    )


@pytest.fixture(scope="module")
def wide(folder):
    """Both roles, float32, with a prefix cache."""
    model = vllm_backend.load(
        settings(folder, dtype="float32", roles=("score", "generate"), prefix_caching=True),
        deterministic=False,
        overrides=SMALL_BLOCKS,
    )
    yield model
    model.close()


@pytest.fixture(scope="module")
def narrow(calm):
    """Scores in bfloat16, without a prefix cache."""
    model = vllm_backend.load(settings(calm, dtype="bfloat16", prefix_caching=False), deterministic=False)
    yield model
    model.close()


def sequences():
    """Mixed lengths up to the longest, and shared prefixes of several cache blocks."""
    rng = np.random.default_rng(0)
    mixed = [rng.integers(0, VOCAB, n).tolist() for n in (3, 40, 2, 17, 128, 127, 8)]
    prefix = rng.integers(0, VOCAB, 90).tolist()
    return mixed + [prefix + rng.integers(0, VOCAB, n).tolist() for n in (2, 9, 30)] + [prefix]


def cosine(left_ND, right_ND):
    return (left_ND * right_ND).sum(-1) / np.linalg.norm(left_ND, axis=-1) / np.linalg.norm(right_ND, axis=-1)


@contextlib.contextmanager
def scoring(folder, dtype, prefix_caching):
    """An engine for one test."""
    config = settings(folder, dtype=dtype, prefix_caching=prefix_caching)
    model = vllm_backend.load(config, deterministic=False, overrides=SMALL_BLOCKS)
    try:
        yield model
    finally:
        model.close()


def assert_labels_equal(model, folder, times):
    """In float32: every row's likeliest token, and all numbers within rounding, each time they are asked for."""
    batch = TokenBatch.pack(sequences())
    jobs = [
        (batch, HIDDEN),
        (batch, spec_of("top_k", VOCAB, k=9)),
        (batch, spec_of("full", VOCAB)),
        (batch, spec_of("given", VOCAB)),
    ]
    theirs = reference(folder, "float32").score(jobs)
    for _ in range(times):
        ours = model.score(jobs)
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine.lse_N.array, other.lse_N.array, atol=2e-4)
            np.testing.assert_allclose(mine.label_logp_N.array, other.label_logp_N.array, atol=2e-4)
        assert cosine(ours[0]["hidden_ND"].array, theirs[0]["hidden_ND"].array).min() > 0.9999
        np.testing.assert_allclose(ours[0]["hidden_ND"].array, theirs[0]["hidden_ND"].array, atol=5e-4)
        np.testing.assert_allclose(ours[2]["logits_NV"].array, theirs[2]["logits_NV"].array, atol=5e-4)
        top_1_N = theirs[2]["logits_NV"].array.argmax(-1)
        assert len(top_1_N) == batch.rows
        np.testing.assert_array_equal(ours[2]["logits_NV"].array.argmax(-1), top_1_N)
        np.testing.assert_array_equal(ours[1]["topk_ids_NK"].array[:, 0], top_1_N)


def assert_states_point_the_same_way(model, folder, times):
    """In bfloat16: row for row, each time they are asked for."""
    batch = TokenBatch.pack(sequences())
    (theirs,) = reference(folder, "bfloat16").score([(batch, HIDDEN)])
    for _ in range(times):
        (ours,) = model.score([(batch, HIDDEN)])
        assert ours["hidden_ND"].dtype == "bfloat16" and ours.rows == batch.rows
        assert cosine(ours["hidden_ND"].as_float32(), theirs["hidden_ND"].as_float32()).min() >= 0.9999


def test_labels_equal_the_transformers_backends_row_for_row(wide, folder):
    assert_labels_equal(wide, folder, times=2)  # the second time every prefix is in the cache


@pytest.mark.thorough
def test_labels_equal_the_transformers_backends_without_a_prefix_cache(folder):
    with scoring(folder, "float32", prefix_caching=False) as model:
        assert_labels_equal(model, folder, times=1)


def test_in_bfloat16_without_a_prefix_cache_states_point_the_same_way(narrow, calm):
    assert_states_point_the_same_way(narrow, calm, times=1)


@pytest.mark.thorough
def test_in_bfloat16_with_a_prefix_cache_states_point_the_same_way(calm):
    with scoring(calm, "bfloat16", prefix_caching=True) as model:
        assert_states_point_the_same_way(model, calm, times=2)


def test_batches_begun_while_others_are_under_way_get_their_own_labels(wide):
    """As the engine does: the next is in vLLM before the last is waited for, and the waits are in other threads."""
    jobs = [[(TokenBatch.pack([ids]), spec_of("full", VOCAB))] for ids in sequences()]
    alone = [wide.score(job)[0] for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(wide.begin(job)) for job in jobs]
        for wait, expected in zip(waits, alone, strict=True):
            (mine,) = wait.result(timeout=60)
            np.testing.assert_allclose(mine["logits_NV"].array, expected["logits_NV"].array, atol=5e-4)
            assert mine.timing.batch_tokens == expected.timing.batch_tokens


def test_only_wanted_rows_come_back(wide):
    rows = [[5, 6, 7, 8, 9, 10], [1, 2, 3], [4] * 50]
    wanted = [[False, True, False, True, False, False], [False] * 3, [False] * 48 + [True, False]]
    (some,) = wide.score([(TokenBatch.pack(rows, wanted), HIDDEN)])
    (every,) = wide.score([(TokenBatch.pack(rows), HIDDEN)])
    np.testing.assert_allclose(some["hidden_ND"].array, every["hidden_ND"].array[[1, 3, 55]], atol=2e-4)
    np.testing.assert_allclose(some.label_logp_N.array, every.label_logp_N.array[[1, 3, 55]], atol=2e-4)


def test_the_teacher_says_what_it_is(wide, narrow, folder):
    same = reference(folder, "float32").facts
    facts = wide.facts
    assert facts.artifacts == same.artifacts and facts.tokenizer_sha256 == same.tokenizer_sha256
    assert facts.fingerprint != same.fingerprint, "labels of two backends differ by rounding"
    assert (facts.transports, facts.generates) == (("top_k", "hidden", "full", "given"), ("tokens", "json_schema"))
    assert narrow.facts.generates == () and facts.max_sequence_tokens == 128
    np.testing.assert_array_equal(head_of(wide).weight_VD.array, head_of(reference(folder, "float32")).weight_VD.array)


async def test_rows_are_tokenised_as_by_the_transformers_backend(wide, folder):
    asked = json.dumps({"messages": [{"role": "user", "content": "the cat?"}]}).encode()
    rows = tuple(TextRow("the old dog 你好\r\n".encode(), conversation) for conversation in (b"", asked))
    async with running(wide) as engine, running(reference(folder, "float32")) as other:
        assert [artifact.kind for artifact in engine.info.artifacts] == ["output_head", "byte_table"]
        found, expected = [await e.reader.tokenize(TokenizeCall("t", "", rows)) for e in (engine, other)]
        assert [row.digest for row in found] == [row.digest for row in expected]
        assert engine.info.artifacts == other.info.artifacts and not found[1].refused


@pytest.mark.parametrize(
    ("ids", "spec", "error"),
    [
        ([[1] * 129], HIDDEN, LimitError),
        ([[1, VOCAB]], HIDDEN, RequestError),
        ([[1, 299]], spec_of("full", 299), RequestError),
        ([[1, 2]], spec_of("full", VOCAB + 1), LimitError),
        ([[1] * 128] * 1000, spec_of("full", VOCAB), LimitError),
    ],
    ids=["too long", "foreign id", "foreign label", "wide", "tokens x vocabulary"],
)
def test_what_vllm_must_not_see_is_refused_before_it(wide, ids, spec, error):
    tight = wide._config
    wide._config = tight.model_copy(update={"answer_mb": 64})
    try:
        with pytest.raises(error):
            wide.score([(TokenBatch.pack([[1, 2]]), HIDDEN), (TokenBatch.pack(ids), spec)])
    finally:
        wide._config = tight
    assert wide.score([(TokenBatch.pack([[1, 2]]), HIDDEN)])[0].rows == 1


@contextlib.asynccontextmanager
async def running(model, **changes):
    config = TeacherConfig.model_validate({"name": "t", "backend": model._config.model_dump(), **changes})
    engine = TeacherEngine(config, model)
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def write(engine, spec, prompts=PROMPTS):
    call = GenerateCall("t", engine.info.fingerprint, spec, PromptBatch.pack(prompts))
    return {(s.prompt, s.index): s async for s in engine.generate(call)}


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_greedy_texts_and_their_log_probabilities_are_the_transformers_backends(wide, folder):
    spec = SamplingSpec(temperature=0.0, max_new_tokens=20)
    other = {"kind": "transformers", "model": str(folder), "dtype": "float32", "device": "cpu"}
    async with running(wide) as engine:
        ours = await write(engine, spec)
    plain = TeacherEngine(TeacherConfig.model_validate({"name": "t", "backend": other}))
    plain.start()
    theirs = await write(plain, spec)
    await plain.stop()
    for place, sample in theirs.items():
        assert ours[place].token_ids_n.tolist() == sample.token_ids_n.tolist()
        assert ours[place].finish == sample.finish
        np.testing.assert_allclose(ours[place].token_logp_n, sample.token_logp_n, atol=5e-4)


async def test_a_sample_depends_on_prompt_seed_and_number_alone(wide):
    spec = SamplingSpec(samples=3, temperature=0.8, top_p=0.9, max_new_tokens=16, seed=7)
    async with running(wide, generation={"max_running": 5}) as engine:
        first, _ = await asyncio.gather(
            write(engine, spec), write(engine, SamplingSpec(2, 1.0, 1.0, 16, 9), [[8] * 20, [3]])
        )
        alone = await write(engine, spec, [PROMPTS[1]])
        changed = await write(engine, SamplingSpec(3, 0.8, 0.9, 16, 8), [PROMPTS[0]])
    for index in range(3):
        assert alone[0, index].token_ids_n.tolist() == first[1, index].token_ids_n.tolist()
        assert first[0, index].token_ids_n.tolist() == first[3, index].token_ids_n.tolist()
    assert len({tuple(first[0, index].token_ids_n) for index in range(3)}) == 3
    assert changed[0, 0].token_ids_n.tolist() != first[0, 0].token_ids_n.tolist()


async def test_prompts_that_do_not_fit_one_forward_pass_together_are_written(wide):
    """On a CPU vLLM's engine dies of a seeded prompt that it computes in parts."""
    prompts = [[number + 3] * 100 for number in range(12)]  # of 256 tokens a pass
    spec = SamplingSpec(temperature=1.0, max_new_tokens=4, seed=1, ignore_eos=True)
    async with running(wide) as engine:
        together = await write(engine, spec, prompts)
        alone = await write(engine, spec, prompts[2:3])
    assert len(together) == 12
    assert together[2, 0].token_ids_n.tolist() == alone[0, 0].token_ids_n.tolist()


SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["a", "b"],
    "properties": {
        "a": {"enum": ["x", "yy"]},
        "b": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/word"}]}, "maxItems": 2},
    },
    "$defs": {"word": {"type": "string", "maxLength": 3}},
}  # fmt: skip


async def test_finished_samples_obey_their_schema_and_carry_log_probabilities_before_it(wide, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = SamplingSpec(samples=6, max_new_tokens=100, seed=3, json_schema=json.dumps(SCHEMA))
    async with running(wide) as engine:
        samples = await write(engine, spec, [[5, 6, 7]])
        finished = [sample for sample in samples.values() if sample.finish == "stop"]
        assert len(finished) >= 3
        for sample in finished:
            assert sample.token_ids_n[-1] == tokenizer.eos_token_id
            text = tokenizer.decode(sample.token_ids_n, skip_special_tokens=True)
            jsonschema.validate(json.loads(text), SCHEMA)
        question = Question((Turn("user", "5 + 7 = ?"),), "12", "test:1")
        for style in ("quotes", "offsets"):
            held_to = grammar_schema(caps_as_bounds(style, [question], Caps()))
            trace = SamplingSpec(max_new_tokens=20, json_schema=json.dumps(held_to))
            assert len(await write(engine, trace, [[5, 6, 7]])) == 1, "vLLM takes the schema of traces"
        ids = [5, 6, 7, *finished[0].token_ids_n.tolist()]
        scored = await engine.score(ScoreCall("r", "t", "", spec_of("full", VOCAB), TokenBatch.pack([ids])))
        np.testing.assert_allclose(scored.label_logp_N.array[2:], finished[0].token_logp_n, atol=5e-4)


async def test_leaving_frees_vllms_sequences(wide):
    """By the word of vLLM's own scheduler, which speaks after a step: of those still waiting then, the next request tells."""
    spec = SamplingSpec(samples=32, max_new_tokens=120, ignore_eos=True)
    async with running(wide) as engine:
        call = GenerateCall("t", "", spec, PromptBatch.pack([[1, 2]]))
        task = asyncio.create_task(anext(engine.generate(call)))
        await until(lambda: engine.counters()["vllm_generate_running"] == 16)
        before = engine.counters()["generated_tokens"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: engine.counters()["vllm_generate_running"] == 0)
        counters = engine.counters()
        assert counters["generate_running"] == counters["generate_waiting"] == 0
        assert counters["generated_tokens"] == before == 0, "none of them was written to its end"
        assert len(await write(engine, SamplingSpec(max_new_tokens=3, ignore_eos=True), [[4]])) == 1
        await until(
            lambda: engine.counters()["vllm_generate_waiting"] == engine.counters()["vllm_generate_running"] == 0
        )


async def test_a_client_that_hangs_up_frees_vllms_sequences(wide):
    from teacher_wire.endpoint.client import TeacherClient

    service = EngineService(TeacherEngine(TeacherConfig.model_validate(
        {"name": "t", "backend": wide._config.model_dump()}), wide))  # fmt: skip
    with serve(service) as server:
        async with TeacherClient(server.address) as client:
            info = await client.teacher("t", wait_for_s=5)
            spec = SamplingSpec(samples=16, max_new_tokens=120, ignore_eos=True)
            writing = client.generate(info, spec, PromptBatch.pack([[1, 2]]))
            task = asyncio.create_task(anext(writing))
            await until(lambda: wide.counters()["vllm_generate_running"] == 16)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: wide.counters()["vllm_generate_running"] == 0)
        service.stop()


async def test_two_thousand_hostile_requests_leave_vllm_alive(wide):
    service = EngineService(TeacherEngine(TeacherConfig.model_validate(
        {"name": "t", "backend": wide._config.model_dump()}), wide))  # fmt: skip
    with serve(service) as server:
        codes = await attack(server.address, REQUESTS)
        assert sum(codes.values()) == REQUESTS
        service.stop()
    wide.check_health()
    assert wide.score([(TokenBatch.pack([[1, 2]]), HIDDEN)])[0].rows == 1
    await until(lambda: wide.counters()["vllm_generate_running"] == 0)


async def test_two_thousand_hostile_score_requests_leave_vllm_alive(wide, capsys):
    service = EngineService(TeacherEngine(TeacherConfig.model_validate(
        {"name": "t", "backend": wide._config.model_dump()}), wide))  # fmt: skip
    rounds = await hostile_score.withstand(service)
    wide.check_health()
    assert wide.score([(TokenBatch.pack([[1, 2]]), HIDDEN)])[0].rows == 1
    with capsys.disabled():
        print("", *hostile_score.told(rounds), sep="\n")


def test_what_vllm_would_change_without_a_word_is_refused():
    refuse_sampling(SamplingSpec(temperature=0.0, stop_ids=(3,)))
    refuse_sampling(SamplingSpec(json_schema="{}"))
    for bad in (
        {"temperature": 0.005},
        {"json_schema": "{}", "ignore_eos": True},
        {"json_schema": "{}", "stop_ids": (3,)},
    ):
        with pytest.raises(RequestError):
            refuse_sampling(SamplingSpec(**bad))


def test_seeds_differ_and_repeat():
    one, two = np.array([1, 2], np.int32), np.array([1, 3], np.int32)
    seeds = {sample_seed(seed, index, ids) for seed in (0, 1) for index in range(20) for ids in (one, two)}
    assert len(seeds) == 80 and max(seeds) < 1 << 63
    assert sample_seed(0, 3, one) == sample_seed(0, 3, np.array([1, 2], np.int32))


def test_an_unknown_head_and_roles_are_refused_before_anything_starts(model_factory, tmp_path, folder):
    strange = shutil.copytree(folder, tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    with pytest.raises(ServerConfigError, match="OddForCausalLM"):
        vllm_backend.load(settings(strange), deterministic=False)
    with pytest.raises(ValueError, match="once each"):
        settings(folder, roles=("score", "score"))


def test_a_dead_engine_is_said_and_seen(narrow):
    """Last of its engine."""
    narrow.check_health()
    processes = psutil.Process().children(recursive=True)
    dead = [process for process in processes if _belongs(process, narrow)]
    assert dead
    for process in dead:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGKILL)
    for process in dead:
        process.wait(10)
    with pytest.raises(UnavailableError, match="died"):
        narrow.score([(TokenBatch.pack([[1, 2]]), HIDDEN)])
    with pytest.raises(RuntimeError, match="died"):
        narrow.check_health()


def _belongs(process, model):
    manager = model._engines["score"]._llm.engine_core.resources.engine_manager
    roots = {found.pid for found in manager.processes}
    return process.pid in roots or bool(roots & {parent.pid for parent in process.parents()})
