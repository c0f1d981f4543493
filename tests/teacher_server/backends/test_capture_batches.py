"""Captured values of whole batches: each answer gets its own rows and sequences of what the pass handed over, and deterministic ones its bits.

The kind of this file answers each wanted row with numbers that depend on everything captured for it: the states, what its attention would
read of the values and of the unrotated keys, and the activation. Tolerance: 2e-5 relative (float32), as in test_capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher_server.backends.transformers.capture import probe
from teacher_server.signals import reduce
from teacher_server.signals.base import Reduction
from teacher_server.signals.captured import Wish
from teacher_wire.core.axes import Axis
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.errors import CapabilityError
from teacher_wire.core.signals import Field, Signal, SignalSpec
from teacher_wire.score.signals import Full, Hidden, TopK, spec_of
from tests.teacher_server.backends.inside_oracle import energy, inside, quantiles, relative
from tests.teacher_server.backends.test_transformers import backend, by_sequence, sequences

WIDTH, HEADS = 32, 4


@dataclass(frozen=True)
class Inside(Signal):
    """What is inside some blocks, as rows."""

    kind = "inside"
    layers: tuple[int, ...] = ()
    quantiles: int = 0

    def fields(self, shape):
        made = [Field(f"state{n}_ND", Axis.ROW, "float32", (WIDTH,)) for n in self.layers]
        for n in self.layers:
            made += [Field(f"{name}{n}_NF", Axis.ROW, "float32", (WIDTH,)) for name in ("context", "plain")]
            made += [Field(f"ffn{n}_NQ", Axis.ROW, "float32", (17 if self.quantiles else 1,))]
        return tuple(made)


class InsideReduction(Reduction):
    needs_logits = False
    captures = "states"

    @classmethod
    def wish(cls, signal):
        return Wish(signal.layers, signal.layers, signal.layers, bool(signal.quantiles))

    def rest(self):
        seen, made = self.rows.captured, {}
        assert len(seen.position_R) == self.rows.count
        for n in self.signal.layers:
            inputs, ffn = seen.attention[n], seen.ffn[n]
            read = {"context": [], "plain": []}
            for sequence, (start, stop) in enumerate(pairwise(seen.cu_tokens_B1.tolist())):
                first, last = np.searchsorted(seen.sequence_R, [sequence, sequence + 1]).tolist()
                rows, tokens = slice(first, last), slice(start, stop)
                map_HRL = probe.weights(inputs, rows, tokens, seen.position_R[rows])
                for name, what_TGd in (("context", inputs.value_TGd), ("plain", inputs.plain_key_TGd)):
                    what_HLd = what_TGd[tokens].transpose(0, 1).repeat_interleave(2, 0)
                    read[name].append((map_HRL @ what_HLd).transpose(0, 1).flatten(1))
            parts = {f"{name}{n}_NF": torch.cat(parts) for name, parts in read.items()}
            figures = ffn.energy_R[:, None]
            if self.signal.quantiles:
                figures = torch.cat([figures, ffn.quantiles_RQ], 1)
            made |= parts | {f"state{n}_ND": seen.states[n], f"ffn{n}_NQ": figures}
        return {name: self.rows.kept(part) for name, part in made.items()}


@pytest.fixture
def plugged_in(monkeypatch):
    monkeypatch.setitem(reduce.REDUCTIONS, "inside", InsideReduction)
    monkeypatch.setitem(reduce.SIGNALS, "inside", Inside)


PROMPT = [5, 6, 7] * 12
ROWS = [*sequences(lengths=(3, 40, 2, 17)), *([*PROMPT, *tail] for tail in sequences(seed=8, lengths=(2, 5, 30)))]
WAYS = {
    "padded": {"packing": "off"},
    "packed": {"layers": "transformers", "prefix_min_tokens": 16},
    "fused": {"layers": "fused", "prefix_min_tokens": 16},
}
FIRST = SignalSpec(300, (Inside((1,)),))
BOTH = SignalSpec(300, (Inside((1, 2), quantiles=1), Hidden()))


def flags(row, every=3):
    """Every third row is wanted, of long sequences alone."""
    return [len(row) > 2 and i % every == 1 and i < len(row) - 1 for i in range(len(row))]


@pytest.fixture(scope="module")
def expected(model_factory):
    """What the eager model shows of each sequence, as rows."""
    model = AutoModelForCausalLM.from_pretrained(
        model_factory("qwen2"), attn_implementation="eager", dtype=torch.float32
    )
    made = {}
    for row in ROWS:
        one, of = inside(model.eval(), row), {}
        for n in (1, 2):
            plain_HLd = one.keys[n - 1].unflatten(1, (-1, 8)).transpose(0, 1).repeat_interleave(2, 0)
            of |= {
                f"state{n}_ND": one.states[n],
                f"context{n}_NF": one.contexts[n - 1],
                f"plain{n}_NF": (one.maps[n - 1] @ plain_HLd).transpose(0, 1).flatten(1),
                f"ffn{n}_NQ": torch.cat([energy(one.ffn[n - 1])[:, None], quantiles(one.ffn[n - 1])], 1),
            }
        made[tuple(row)] = of
    return made


def differs(answer, rows, wanted, expected):
    """The largest relative distance of a row of an answer from the eager model's."""
    worst = 0.0
    for name in (name for name in answer.tensors if name.startswith(("state", "context", "plain", "ffn"))):
        found = torch.from_numpy(answer[name].array)
        whole = [expected[tuple(row)][name][torch.tensor(flag)] for row, flag in zip(rows, wanted, strict=True)]
        worst = max(worst, relative(found, torch.cat(whole)[:, : found.shape[1]]))
    return worst


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_each_answer_of_a_batch_has_its_own_rows(plugged_in, model_factory, expected, way, deterministic):
    teacher = backend(model_factory("qwen2"), deterministic=deterministic, **WAYS[way])
    assert teacher._body.name == way
    full, some = SignalSpec(300, (Full(),)), [flags(row) for row in ROWS]
    every = [[i < len(row) - 1 for i in range(len(row))] for row in ROWS]
    jobs = [
        (TokenBatch.pack(ROWS[3:]), full),
        (TokenBatch.pack(ROWS[:3], some[:3]), BOTH),
        (TokenBatch.pack(ROWS[1:], every[1:]), FIRST),
        (TokenBatch.pack(ROWS[4:6], some[4:6]), BOTH),
        (TokenBatch.pack(ROWS[2:4]), SignalSpec(300, (TopK(4),))),
        (TokenBatch.pack(ROWS[6:], some[6:]), FIRST),
    ]
    answers = teacher.score(jobs)
    for number, (rows, wanted) in {1: (ROWS[:3], some[:3]), 2: (ROWS[1:], every[1:]), 3: (ROWS[4:6], some[4:6]), 5: (ROWS[6:], some[6:])}.items():  # fmt: skip
        worst = differs(answers[number], rows, wanted, expected)
        assert worst <= 2e-5, (number, worst)
    (plain,) = teacher.score(jobs[:1])
    for name, tensor in plain.tensors.items():
        np.testing.assert_allclose(answers[0][name].array, tensor.array, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_deterministic_ones_are_a_function_of_the_sequence_alone(plugged_in, model_factory, way):
    """Bit for bit: in any company, with other kinds beside it, whatever other rows are wanted."""
    teacher = backend(model_factory("qwen2"), deterministic=True, reduce_mb=1, **WAYS[way] | {"prefix_min_tokens": 64})
    alone = {}
    for row in ROWS:
        alone |= by_sequence(teacher.score([(TokenBatch.pack([row]), BOTH)])[0], TokenBatch.pack([row]), [row])
    batch = TokenBatch.pack(ROWS[::-1])
    answers = teacher.score(
        [(TokenBatch.pack(ROWS[:2]), spec_of("full", 300)), (batch, BOTH), (TokenBatch.pack(ROWS[:4]), FIRST)]
    )
    for row, found in by_sequence(answers[1], batch, ROWS[::-1]).items():
        assert found == alone[row]
    for row, found in by_sequence(answers[2], TokenBatch.pack(ROWS[:4]), ROWS[:4]).items():
        for name in ("state1_ND", "context1_NF", "plain1_NF"):
            assert found[name] == alone[row][name]
    wanted = [flags(ROWS[1])]
    (some,) = teacher.score([(TokenBatch.pack([ROWS[1]], wanted), BOTH)])
    (every,) = teacher.score([(TokenBatch.pack([ROWS[1]]), BOTH)])
    for name, tensor in some.tensors.items():
        assert tensor.array.tobytes() == every[name].array[np.flatnonzero(wanted[0])].tobytes()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("check", ["all", "sampled"])
def test_labels_beside_them_are_those_without(plugged_in, model_factory, deterministic, check):
    """Bit for bit: the same pass makes both, and rows whose labels are not checked have features."""
    teacher = backend(model_factory("qwen2"), deterministic=deterministic)
    batch = TokenBatch.pack(ROWS, [flags(row) for row in ROWS])
    ((both,), (hidden,)) = (
        teacher.score([(batch, SignalSpec(300, signals, check))]) for signals in ((Inside((2,)), Hidden()), (Hidden(),))
    )
    assert set(both.tensors) - set(hidden.tensors) == {"state2_ND", "context2_NF", "plain2_NF", "ffn2_NQ"}
    for name, tensor in hidden.tensors.items():
        assert both[name].array.tobytes() == tensor.array.tobytes(), name


def test_one_pass_makes_all_of_a_batch(plugged_in, model_factory):
    teacher = backend(model_factory("qwen2"), prefix_min_tokens=0)
    before, batch = teacher.computed_tokens, TokenBatch.pack(ROWS)
    teacher.score([(batch, BOTH), (batch, FIRST), (batch, spec_of("full", 300))])
    assert teacher.computed_tokens - before == 3 * batch.tokens


@pytest.mark.parametrize("way", WAYS)
def test_what_would_not_fit_is_captured_in_parts(plugged_in, model_factory, expected, monkeypatch, way):
    """The answers are those of one part, and no part holds more than it may, unless a single sequence does."""
    teacher = backend(model_factory("qwen2"), **WAYS[way])
    some = [flags(row) for row in ROWS]
    extra = np.arange(2 * sum(map(sum, some[2:])), dtype=np.int32).reshape(-1, 2) % 300
    named = TokenBatch.pack(ROWS[2:], some[2:])
    named = TokenBatch(named.token_ids_T, named.cu_lengths_B1, named.wanted_T, extra)
    jobs = [
        (TokenBatch.pack(ROWS, some), BOTH),
        (named, SignalSpec(300, (TopK(4, extra=2), Inside((1,))))),
        (TokenBatch.pack(ROWS[3:], some[3:]), SignalSpec(300, (Hidden(), Inside((2,))), "sampled")),
        (TokenBatch.pack(ROWS[:2]), spec_of("full", 300)),
    ]
    whole = teacher.score(jobs)
    seen, run = [], teacher._body.run
    monkeypatch.setattr(teacher._body, "run", lambda ids, *rest: seen.append(sum(map(len, ids))) or run(ids, *rest))
    numbers_per_token = 2 * 32 + 2 * (4 + 3 * 2) * 8
    teacher._capture_bytes = 45 * 4 * numbers_per_token
    parts = teacher.score(jobs)
    assert len(seen) > 6 and all(tokens <= 45 or tokens in map(len, ROWS) for tokens in seen)
    assert sum(seen) == sum(batch.tokens for batch, _ in jobs)
    for one, other in zip(whole, parts, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        for name, tensor in one.tensors.items():
            np.testing.assert_allclose(
                other[name].array.astype(float), tensor.array.astype(float), atol=2e-4, err_msg=name
            )
    assert differs(parts[0], ROWS, some, expected) <= 2e-5
    seen.clear()
    teacher.score([(batch, spec_of("full", 300)) for batch, _ in jobs[:2]])
    assert len(seen) == 1, "without a wish there is one part"


def test_vllm_refuses_by_the_name_of_the_kind(plugged_in):
    from teacher_server.backends.vllm.backend import VllmModel

    facts = SimpleNamespace(transports=reduce.offered(serves_head=True))
    assert "inside" not in facts.transports
    with pytest.raises(CapabilityError) as refused:
        VllmModel._refuse(SimpleNamespace(_facts=facts), TokenBatch.pack(ROWS), FIRST)
    assert (refused.value.field, refused.value.value) == ("signal", "inside")
