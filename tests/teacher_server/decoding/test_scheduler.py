"""Writing: greedy texts equal the model called directly, draws follow its distribution, schemas hold, nobody disturbs anybody."""

import asyncio
import contextlib
import json
import threading

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from teacher_server.backends.grammar import Grammars
from teacher_server.backends.transformers.decode_loop import ModelStepper, choose
from teacher_server.backends.transformers.generation_probe import writes_as_it_scores
from teacher_server.config.server import GenerationConfig, TeacherConfig
from teacher_server.decoding.scheduler import SteppedGeneration
from teacher_server.decoding.sequence_queue import Layout, Sequence, SequenceQueue
from teacher_server.replica.engine import TeacherEngine
from teacher_wire.core.errors import (
    CapabilityError,
    LimitError,
    OverloadedError,
    RequestError,
    ServerError,
    UnavailableError,
)
from teacher_wire.generate.messages import GenerateCall, PromptBatch, Sample, SamplingSpec

FAMILIES = ["qwen2", "llama", "internlm3", "glm", "glm4", "gemma2", "cohere", "granite"]
PROMPTS = [[5, 6, 7], [9] * 30, [1, 2], [5, 6, 7]]
GREEDY = SamplingSpec(temperature=0.0, max_new_tokens=12)


@contextlib.asynccontextmanager
async def running(folder, **changes):
    backend = {"kind": "transformers", "model": str(folder), "dtype": "float32", "device": "cpu"}
    config = TeacherConfig.model_validate({"name": "t", "backend": backend, **changes})
    engine = TeacherEngine(config)
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def write(engine, spec, prompts=PROMPTS, **options):
    call = GenerateCall("t", engine.info.fingerprint, spec, PromptBatch.pack(prompts), **options)
    return {(s.prompt, s.index): s async for s in engine.generate(call)}


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def greedy(folder, prompt, new_tokens, end=2):
    """What the model writes, by one whole forward pass a token, and the log-probability of each token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, logps = list(prompt), []
    with torch.no_grad():
        for _ in range(new_tokens):
            logp_V = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            ids.append(int(logp_V.argmax()))
            logps.append(float(logp_V.max()))
            if ids[-1] == end:
                break
    return ids[len(prompt) :], logps


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_texts_are_those_of_the_model_called_directly(model_factory, family):
    folder = model_factory(family)
    async with running(folder, generation={"max_running": 2}) as engine:
        assert engine.info.generates == ("tokens", "json_schema")
        got = await write(engine, GREEDY)
        for number, prompt in enumerate(PROMPTS):
            ids, logps = greedy(folder, prompt, 12)
            assert got[number, 0].token_ids_n.tolist() == ids
            np.testing.assert_allclose(got[number, 0].token_logp_n, logps, atol=2e-4)
            assert got[number, 0].finish == ("stop" if ids[-1] == 2 else "length")


async def test_rows_that_come_and_go_in_the_middle_do_not_disturb_the_others(model_factory):
    folder = model_factory("qwen2")
    wanted = [([9] * 30, 4), ([5, 6, 7], 20), ([1, 2], 9), ([8] * 40, 5), ([3] * 12, 14), ([7], 7)]
    async with running(folder, generation={"max_running": 3}) as engine:
        calls = [write(engine, SamplingSpec(1, 0.0, 1.0, new, ignore_eos=True), [prompt]) for prompt, new in wanted]
        for (prompt, new), got in zip(wanted, await asyncio.gather(*calls), strict=True):
            ids, logps = greedy(folder, prompt, new, end=-1)
            assert got[0, 0].token_ids_n.tolist() == ids
            np.testing.assert_allclose(got[0, 0].token_logp_n, logps, atol=2e-4)


async def test_a_sample_depends_on_prompt_seed_and_number_alone(model_factory):
    spec = SamplingSpec(samples=3, temperature=0.8, top_p=0.9, max_new_tokens=16, seed=7)
    async with running(model_factory("qwen2"), generation={"max_running": 5}) as engine:
        first, other = await asyncio.gather(
            write(engine, spec), write(engine, SamplingSpec(2, 1.0, 1.0, 16, 9), [[8] * 20, [3]])
        )
        alone = await write(engine, spec, [PROMPTS[1]])
        again = await write(engine, spec, have=frozenset({(0, 0), (1, 1)}))
        assert len(other) == 4 and (0, 0) not in again and len(again) == len(first) - 2
        for index in range(3):
            assert alone[0, index].token_ids_n.tolist() == first[1, index].token_ids_n.tolist()
            assert first[0, index].token_ids_n.tolist() == first[3, index].token_ids_n.tolist()
        for place, sample in again.items():
            assert sample.token_ids_n.tolist() == first[place].token_ids_n.tolist()
        assert len({tuple(first[0, index].token_ids_n) for index in range(3)}) == 3
        changed = await write(engine, SamplingSpec(3, 0.8, 0.9, 16, 8), [PROMPTS[0]])
        assert changed[0, 0].token_ids_n.tolist() != first[0, 0].token_ids_n.tolist()
        counters = engine.counters()
        assert [counters[f"generate_{name}"] for name in ("calls", "running", "waiting")] == [0, 0, 0]


async def test_scoring_goes_on_between_tokens_and_agrees(model_factory):
    from teacher_wire.core.batch import TokenBatch
    from teacher_wire.core.calls import ScoreCall
    from teacher_wire.score.signals import spec_of

    async with running(model_factory("qwen2")) as engine:
        writing = asyncio.create_task(write(engine, SamplingSpec(max_new_tokens=60, ignore_eos=True, seed=1)))
        await until(lambda: engine.counters()["generate_steps"] >= 2)
        await engine.score(ScoreCall("r", "t", "", spec_of("full", 300), TokenBatch.pack([[1, 2]])))
        assert not writing.done()
        sample = (await writing)[1, 0]
        ids = [*PROMPTS[1], *sample.token_ids_n.tolist()]
        scored = await engine.score(ScoreCall("r", "t", "", spec_of("full", 300), TokenBatch.pack([ids])))
        np.testing.assert_allclose(scored.label_logp_N.array[len(PROMPTS[1]) - 1 :], sample.token_logp_n, atol=2e-4)


async def test_stop_ids_end_a_sample_and_eos_can_be_ignored(model_factory):
    folder = model_factory("qwen2")
    async with running(folder) as engine:
        plain = (await write(engine, GREEDY, [[5, 6, 7]]))[0, 0].token_ids_n.tolist()
        stop = plain[2]
        cut = (await write(engine, SamplingSpec(1, 0.0, 1.0, 12, 0, (stop,)), [[5, 6, 7]]))[0, 0]
        assert cut.token_ids_n.tolist() == plain[: plain.index(stop) + 1] and cut.finish == "stop"
        engine._generation._stepper._end_ids = frozenset({stop})
        assert (await write(engine, GREEDY, [[5, 6, 7]]))[0, 0].token_ids_n.tolist() == plain[: plain.index(stop) + 1]
        on = (await write(engine, SamplingSpec(1, 0.0, 1.0, 12, ignore_eos=True), [[5, 6, 7]]))[0, 0]
        assert on.token_ids_n.tolist() == plain


SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["a", "b"],
    "properties": {
        "a": {"enum": ["x", "yy"]},
        "b": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/word"}]}, "maxItems": 2},
    },
    "$defs": {"word": {"type": "string", "maxLength": 3}},
}  # fmt: skip


@pytest.mark.parametrize("end", [{2}, set()], ids=["with an end of text", "without"])
async def test_every_finished_sample_obeys_its_schema(model_factory, end):
    folder = model_factory("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    async with running(folder) as engine:
        engine._generation._stepper._end_ids = frozenset(end)
        spec = SamplingSpec(samples=6, max_new_tokens=120, seed=3, json_schema=json.dumps(SCHEMA))
        mixed, free = await asyncio.gather(write(engine, spec, [[5, 6, 7]]), write(engine, GREEDY))
        assert len(free) == len(PROMPTS)
        finished = [sample for sample in mixed.values() if sample.finish == "stop"]
        assert finished
        for sample in finished:
            text = tokenizer.decode(sample.token_ids_n, skip_special_tokens=True)
            jsonschema.validate(json.loads(text), SCHEMA)
        assert (finished[0].token_ids_n[-1] == 2) == bool(end)


async def test_what_a_vocabulary_cannot_write_is_refused(tmp_path, model_factory):
    folder = model_factory("qwen2")
    async with running(folder) as engine:
        real = engine._generation._stepper._grammars
        engine._generation._stepper._grammars = _Closed(real)
        with pytest.raises(RequestError, match="goes on"):
            await write(engine, SamplingSpec(json_schema='{"type":"null"}', max_new_tokens=5), [[1]])
        engine._generation._stepper._grammars = real
        assert len(await write(engine, GREEDY)) == len(PROMPTS)


class _Closed:
    """Grammars whose followers allow nothing."""

    def __init__(self, real: Grammars) -> None:
        self._real = real
        self.clean_V = real.clean_V

    def compile(self, schema):
        return self._real.compile(schema)

    def follow(self, schema, stop_ids):
        follower = self._real.follow(schema, stop_ids)
        follower.fill = lambda bits_bW, row: bits_bW[row].zero_()
        return follower


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits_V = torch.randn(12) * 2
    logits_V[3] = -torch.inf
    draws = 20_000
    uniform = ((np.arange(draws) + 0.5) / draws).tolist()
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 1e-9)):
        specs = [SamplingSpec(temperature=temperature, top_p=top_p)] * draws
        found = torch.bincount(choose(logits_V.expand(draws, -1), specs, uniform), minlength=12) / draws
        p_V = (logits_V / temperature).softmax(-1).double()
        order = p_V.argsort(descending=True, stable=True)
        before = p_V[order].cumsum(0) - p_V[order]
        kept = torch.zeros_like(p_V).scatter(0, order, p_V[order] * (before < top_p))
        torch.testing.assert_close(found.double(), kept / kept.sum(), atol=2e-4, rtol=0)
    edge = choose(logits_V.expand(2, -1), [SamplingSpec(), SamplingSpec(top_p=0.5)], [1 - 2**-53] * 2)
    assert torch.isfinite(logits_V[edge]).all()
    assert choose(logits_V[None], [SamplingSpec(temperature=0.0)], [0.9]).item() == int(logits_V.argmax())
    mixed = choose(logits_V.expand(2, -1), [SamplingSpec(temperature=0.0), SamplingSpec(top_p=0.5)], [0.9, 0.3])
    assert mixed[1] == choose(logits_V[None], [SamplingSpec(top_p=0.5)], [0.3])[0]


async def test_leaving_frees_the_sequences_at_the_next_token(model_factory):
    async with running(model_factory("qwen2", max_position_embeddings=4096), generation={"max_running": 4}) as engine:
        spec = SamplingSpec(samples=8, max_new_tokens=3000, ignore_eos=True)
        call = GenerateCall("t", "", spec, PromptBatch.pack([[1, 2]]))
        task = asyncio.create_task(anext(engine.generate(call)))
        await until(lambda: engine.counters()["generate_steps"] > 3)
        assert engine.counters()["generate_running"] == 4
        other = asyncio.create_task(write(engine, GREEDY, [[4]]))
        await until(lambda: engine.counters()["generate_waiting"] == 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(await other) == 1
        await until(lambda: not engine._generation._stepper.rows)
        assert engine.counters()["generate_running"] == engine.counters()["generate_waiting"] == 0
        assert engine.counters()["generate_steps"] < 100


async def test_limits_and_a_full_queue_are_refused_by_name(model_factory):
    tight = {"max_running": 1, "max_queue_tokens": 40, "max_samples": 4, "max_call_tokens": 200, "max_new_tokens": 100}
    async with running(model_factory("qwen2"), generation=tight) as engine:
        assert engine.info.limits.max_new_tokens == 100
        with pytest.raises(LimitError, match="samples"):
            await write(engine, SamplingSpec(samples=5, max_new_tokens=1), [[1]])
        with pytest.raises(LimitError, match="all samples"):
            await write(engine, SamplingSpec(samples=3, max_new_tokens=80), [[1]])
        with pytest.raises(LimitError, match="prompt 1 and max_new_tokens"):
            await write(engine, SamplingSpec(max_new_tokens=100), [[1], [1] * 29])
        spec = SamplingSpec(max_new_tokens=30, ignore_eos=True)
        gate = threading.Event()
        engine._thread.submit(gate.wait)  # no step is made before the gate opens
        first = [asyncio.create_task(write(engine, spec, [[1]]))]
        await until(lambda: engine.counters()["generate_running"] == 1)
        first.append(asyncio.create_task(write(engine, spec, [[1]])))
        await until(lambda: engine.counters()["generate_waiting"] == 1)
        with pytest.raises(OverloadedError) as caught:
            await write(engine, spec, [[1]])
        assert caught.value.retry_after_s > 0
        gate.set()
        await asyncio.gather(*first)


async def test_deterministic_calls_run_alone_and_repeat_bit_for_bit(model_factory):
    async with running(model_factory("qwen2"), deterministic=True) as engine:
        spec = SamplingSpec(samples=3, max_new_tokens=20, seed=5)
        alone = await write(engine, spec)
        crowded, _ = await asyncio.gather(write(engine, spec), write(engine, GREEDY, [[7] * 9]))
        for place, sample in alone.items():
            np.testing.assert_array_equal(sample.token_logp_n, crowded[place].token_logp_n)
            np.testing.assert_array_equal(sample.token_ids_n, crowded[place].token_ids_n)


class Steps:
    """A stepper that waits at a gate, fails when told, and ends every sequence after one token."""

    def __init__(self):
        self.gate, self.fail, self.resets = threading.Event(), False, 0
        self.gate.set()
        self.seen = []

    def prepare(self, spec):
        pass

    def step(self, joining, leaving):
        self.gate.wait()
        self.seen.append(([s.number for s in joining], leaving))
        if self.fail:
            raise RuntimeError("out of memory")
        one = np.ones(1, np.int32), np.zeros(1, np.float32)
        return [(s.number, Sample(s.prompt, s.index, *one, "stop")) for s in joining]

    def reset(self):
        self.resets += 1


async def on_thread(work, *arguments):
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


async def test_a_failed_step_fails_its_calls_and_nobody_after_them():
    steps = Steps()
    generation = SteppedGeneration(steps, GenerationConfig(), on_thread)
    generation.start()
    call = GenerateCall("t", "", SamplingSpec(), PromptBatch.pack([[1]]))
    steps.fail = True
    with pytest.raises(OverloadedError, match="no memory left") as caught:
        await anext(generation.generate(call))
    assert caught.value.retry_after_s > 0
    steps.fail = False
    assert [s.index async for s in generation.generate(call)] == [0]
    assert steps.resets == 1
    generation.check_health()
    steps.gate.clear()
    late = asyncio.create_task(anext(generation.generate(call)))
    await until(lambda: generation.counters()["generate_calls"] == 1)
    generation.stop()
    steps.gate.set()
    with pytest.raises(UnavailableError):
        await late
    await until(generation._task.done)
    with pytest.raises(RuntimeError, match="ended"):
        generation.check_health()


class Poisoned(Steps):
    """Keeps every sequence for three steps and fails while it holds a prompt that begins with `poison`, or too many."""

    def __init__(self, poison=-1, most=10**9, at=0, error="bad row"):
        super().__init__()
        self.poison, self.most, self.at, self.error = poison, most, at, error
        self.held, self.failures = {}, 0

    def step(self, joining, leaving):
        self.held = {n: left for n, left in self.held.items() if n not in leaving}
        self.held |= {s.number: (s, 0) for s in joining}
        bad = any(s.prompt_ids[0] == self.poison and age >= self.at for s, age in self.held.values())
        if bad or len(self.held) > self.most:
            self.failures += 1
            raise RuntimeError(self.error)
        done = [s for s, age in self.held.values() if age == 2]
        self.held = {n: (s, age + 1) for n, (s, age) in self.held.items() if age < 2}
        return [
            (s.number, Sample(s.prompt, s.index, np.ones(1, np.int32), np.zeros(1, np.float32), "stop")) for s in done
        ]

    def reset(self):
        super().reset()
        self.held = {}


@pytest.mark.parametrize("at", [0, 1], ids=["as it joins", "while it is written"])
async def test_a_step_that_fails_costs_only_the_sequence_that_is_to_blame(at):
    steps = Poisoned(poison=66, at=at)
    generation = SteppedGeneration(steps, GenerationConfig(max_running=8), on_thread)
    generation.start()

    async def ask(tenant, first, samples):
        spec = SamplingSpec(samples=samples)
        call = GenerateCall("t", "", spec, PromptBatch.pack([[first]]), tenant=tenant)
        return [s.index async for s in generation.generate(call)]

    outcomes = await asyncio.gather(
        ask("a", 1, 12), ask("b", 66, 2), ask("c", 3, 5), ask("d", 4, 1), return_exceptions=True
    )
    assert isinstance(outcomes.pop(1), ServerError)
    assert [sorted(found) for found in outcomes] == [list(range(12)), list(range(5)), [0]]
    assert steps.failures <= 12
    held = generation.counters()
    assert [held[f"generate_{name}"] for name in ("calls", "running", "waiting", "waiting_tokens")] == [0] * 4
    generation.stop()


async def test_a_step_without_memory_is_made_smaller_and_nobody_fails():
    steps = Poisoned(most=5, error="CUDA out of memory")
    generation = SteppedGeneration(steps, GenerationConfig(max_running=32), on_thread)
    generation.start()
    calls = [GenerateCall("t", "", SamplingSpec(samples=20), PromptBatch.pack([[i]]), tenant=str(i)) for i in range(3)]

    async def ask(call):
        return [s.index async for s in generation.generate(call)]

    assert [sorted(found) for found in await asyncio.gather(*map(ask, calls))] == [list(range(20))] * 3
    assert 3 <= steps.failures <= 20
    generation.stop()


async def test_the_cache_that_is_allocated_never_exceeds_what_was_admitted(model_factory):
    limit = 4000
    folder = model_factory("qwen2", max_position_embeddings=4096)
    async with running(folder, generation={"max_running": 32, "max_cache_tokens": limit}) as engine:
        stepper, most = engine._generation._stepper, [0]
        plain = stepper._step_batch

        def watched(*arguments):
            found = plain(*arguments)
            most[0] = max(most[0], stepper.slots)
            return found

        stepper._step_batch = watched
        long = SamplingSpec(max_new_tokens=8, ignore_eos=True)
        calls = [
            write(engine, long, [[1] * 1800]),
            *(write(engine, long, [[i, 2]] * 12, tenant=str(i)) for i in range(3)),
        ]
        found = await asyncio.gather(*calls)
        assert list(map(len, found)) == [1, 12, 12, 12]
        assert 1800 < most[0] <= limit
        ids, _ = greedy(folder, [1] * 1800, 4, end=-1)
        again = await write(engine, SamplingSpec(1, 0.0, 1.0, 4, ignore_eos=True), [[1] * 1800, [3]])
        assert again[0, 0].token_ids_n.tolist() == ids, "beside a bucket of its own"


def sequence(number, call=0, tokens=10, new=1):
    return Sequence(number, call, 0, number, np.zeros(tokens - new, np.int32), SamplingSpec(max_new_tokens=new))


def add(queue, tenant, sequences):
    queue.add(tenant, sequences[0].call, sequences, len(sequences), sum(s.tokens for s in sequences))


def test_tenants_take_turns_under_both_budgets():
    queue = SequenceQueue(GenerationConfig(max_running=3, max_cache_tokens=30, max_queue_tokens=100))
    add(queue, "a", [sequence(i, 0) for i in range(4)])
    add(queue, "b", [sequence(i, 1) for i in range(10, 12)])
    assert [s.number for s in queue.admit()] == [0, 10, 1]
    assert queue.admit() == [] and queue.waiting == 3 and queue.waiting_tokens == 30
    queue.end(0)
    assert [s.number for s in queue.admit()] == [11]
    assert sorted(queue.drop(0)) == [1] and queue.waiting == 0 and queue.waiting_tokens == 0
    assert sorted(queue.running) == [10, 11]
    add(queue, "a", [sequence(30, 3, tokens=99)])
    assert queue.admit() == [], "too large beside others"
    queue.drop(1)
    assert [s.number for s in queue.admit()] == [30], "but it runs alone"


def test_a_tenant_fills_its_share_of_the_queue_and_leaves_room_for_others():
    queue = SequenceQueue(GenerationConfig(max_queue_tokens=100))
    add(queue, "a", [sequence(i, 0) for i in range(9)])
    with pytest.raises(OverloadedError, match="share") as caught:
        add(queue, "a", [sequence(20 + i, 1) for i in range(2)])
    assert caught.value.field == "generation.max_queue_tokens" and caught.value.retry_after_s > 0
    add(queue, "b", [sequence(40 + i, 2) for i in range(9)])
    with pytest.raises(OverloadedError, match="share"):
        add(queue, "b", [sequence(60, 3)])
    add(queue, "c", [sequence(70, 4)])
    with pytest.raises(OverloadedError, match="queue is full"):
        add(queue, "d", [sequence(80 + i, 5) for i in range(9)])
    assert queue.waiting_tokens == 190


def drain(queue, count, ends=lambda sequence: sequence.spec.max_new_tokens):
    """Who is served while `count` sequences end, the oldest first: tokens used by call."""
    used = {}
    for _ in range(count):
        queue.admit()
        first = next(iter(queue.running.values()))
        written = ends(first)
        used[first.call] = used.get(first.call, 0) + len(first.prompt_ids) + written
        queue.end(first.number, written)
    return used


@pytest.mark.parametrize(
    ("lengths", "ends"), [((100, 100), 1.0), ((400, 50), 1.0), ((100, 100), 0.2), ((50, 400), 0.5)]
)
def test_tenants_share_by_weight_in_tokens_that_were_used(lengths, ends):
    queue = SequenceQueue(GenerationConfig(max_running=8, max_queue_tokens=10**9))
    queue.weights, queue.default_weight = {"a": 3.0}, 1.0
    for call, (tenant, tokens) in enumerate(zip("ab", lengths, strict=True)):
        add(queue, tenant, [sequence(i * 2 + call, call, tokens, tokens - 10) for i in range(4000)])
    used = drain(queue, 2000, lambda s: max(1, round(ends * s.spec.max_new_tokens)))
    assert used[0] / used[1] == pytest.approx(3.0, rel=0.1)


def test_who_comes_back_starts_now_and_who_is_idle_is_forgotten():
    queue = SequenceQueue(GenerationConfig(max_running=1, max_queue_tokens=10**9))
    add(queue, "a", [sequence(i, 0) for i in range(100)])
    drain(queue, 50)
    add(queue, "b", [sequence(1000 + i, 1) for i in range(100)])
    used = drain(queue, 20)
    assert used[0] == used[1], "no credit for the time before"
    drain(queue, 130)
    queue.drop(0), queue.drop(1)
    assert not queue._tenants and not queue._owner


def test_a_newcomer_finds_room_beside_a_tenant_that_fills_everything():
    queue = SequenceQueue(GenerationConfig(max_running=16, max_cache_tokens=160, max_queue_tokens=10**9))
    add(queue, "b", [sequence(5000, 9)])
    drain(queue, 1)  # b has been here: the replica is shared
    add(queue, "a", [sequence(i, 0) for i in range(100)])
    assert len(queue.admit()) == 14
    add(queue, "b", [sequence(1000 + i, 1) for i in range(100)])
    assert [s.number for s in queue.admit()] == [1000], "at once, though nothing has ended"


def test_cache_is_counted_as_it_is_laid_out():
    mixed = [sequence(i, tokens=tokens) for i, tokens in enumerate([30_000, *[100] * 36, 2000, 1100])]
    padded, paged = Layout(mixed, paged=False), Layout(mixed, paged=True)
    assert padded.slots == 30_000 + 36 * 100 + 2 * 2000 and paged.slots == sum(s.tokens for s in mixed)
    queue = SequenceQueue(GenerationConfig(max_running=64, max_cache_tokens=8192))
    add(queue, "a", [sequence(0, tokens=1000), *(sequence(i, tokens=10) for i in range(1, 60))])
    assert len(queue.admit()) == 8, "eight rows of 1,000, whatever the sum of their tokens"


def test_after_a_failed_step_those_that_joined_go_first_and_alone():
    queue = SequenceQueue(GenerationConfig(max_running=8))
    add(queue, "a", [sequence(i, 0) for i in range(3)])
    assert [s.number for s in queue.admit()] == [0, 1, 2]
    add(queue, "b", [sequence(10 + i, 1) for i in range(2)])
    joining = queue.admit()
    queue.narrow(joining, memory=False)
    assert [s.number for s in queue.admit()] == [10] and queue.begin_again == 4
    queue.end(10)
    seen = []
    while queue.running or queue.begin_again:
        seen += [s.number for s in queue.admit()]
        queue.stepped()
        if not queue.begin_again:
            break
    assert seen == [11, 0, 1, 2]
    queue.narrow([], memory=True)
    assert len(queue.admit()) == 2 and queue.begin_again == 2, "half the rows, half the cache"
    queue.drop(0)
    assert queue.begin_again == 1 and not queue.running
    assert [s.number for s in queue.admit()] == [11]


def test_a_model_whose_cache_lies_does_not_write(model_factory):
    model = AutoModelForCausalLM.from_pretrained(model_factory("qwen2")).eval()
    body, head = model.get_decoder(), model.get_output_embeddings()
    options = {"vocab_rows": 300, "end_ids": frozenset(), "grammars": None}
    honest = ModelStepper(body, head, torch.device("cpu"), **options)
    assert writes_as_it_scores(honest, body, torch.device("cpu"), 300)
    with pytest.raises(CapabilityError):
        honest.prepare(SamplingSpec(json_schema="{}"))

    class Forgets(ModelStepper):
        def _forward(self, ids_bL, mask_bL, places_bL, cache):
            return super()._forward(ids_bL, mask_bL, places_bL * 0, cache)

    assert not writes_as_it_scores(Forgets(body, head, torch.device("cpu"), **options), body, torch.device("cpu"), 300)
