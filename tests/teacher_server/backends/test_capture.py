"""Values from inside a pass against the same model called directly under eager attention with hooks, for every family and way to run.

Tolerances. float32: 2e-5 relative for rows of states, keys and values, 2e-5 for every probability of every head, energy and quantile (worst
seen 1.4e-5, Gemma 2's states). bfloat16: 0.06 relative, 0.06 for probabilities and energies: rounding through two layers.
"""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher_server.backends import internlm
from teacher_server.backends.transformers import decoder_runners
from teacher_server.backends.transformers.capture import hooks, taps
from teacher_server.config.backends import TransformersBackend
from teacher_server.signals import reduce
from teacher_server.signals.captured import Wish, union
from tests.teacher_server.backends.inside_oracle import distances, inside
from tests.teacher_server.backends.test_transformers import backend, sequences

REAL = Path("/work/real/smollm2")
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.06}
PROMPT = sequences(seed=7, lengths=(40,))[0]
MIXED = [
    np.array(row, np.int32)
    for row in (
        *sequences(lengths=(3, 40, 2, 17)),
        *(PROMPT + tail for tail in sequences(seed=8, lengths=(2, 5, 30, 5))),
    )
]
WAYS = {
    "padded": {"packing": "off"},
    "packed": {"layers": "transformers", "prefix_min_tokens": 0},
    "packed, prefixes shared": {"layers": "transformers", "prefix_min_tokens": 16},
    "fused": {"layers": "fused", "prefix_min_tokens": 0},
    "fused, prefixes shared": {"layers": "fused", "prefix_min_tokens": 16},
}
SOFTCAP = {"attn_logit_softcapping": 1.5, "sliding_window": 8}  # both at work in the shortest of sequences
FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama": ("llama", {"num_hidden_layers": 3}),
    "internlm3": ("internlm3", {}),
    "gemma2": ("gemma2", SOFTCAP),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3_moe": ("qwen3_moe", {}),
    "granitemoe": ("granitemoe", {}),
}  # fmt: skip
FUSED = ("qwen2", "qwen3", "llama", "internlm3")
WINDOWS = ("gemma2", "gemma3")


def ways_of(family):
    if family in WINDOWS:
        return ["padded"]
    return [way for way in WAYS if not way.startswith("fused") or family in FUSED]


def every(model, quantiles=True):
    """A wish for all there is."""
    blocks = tuple(range(1, len(model.model.layers) + 1))
    return Wish((0, *blocks), blocks, blocks, quantiles)


def some_rows(ids, seed=0):
    """About half of the positions of each sequence, of one sequence none."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(len(row), (len(row) + 1) // 2, replace=False)) for row in ids]
    rows[2] = np.zeros(0, np.int64)
    return rows


@pytest.fixture(scope="module")
def loaded(model_factory):
    """family, dtype -> the eager model and what it shows of MIXED; made once."""
    made = {}

    def get(family, dtype="float32"):
        if (family, dtype) not in made:
            name, changes = FAMILIES[family]
            folder = model_factory(name, **changes)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation="eager"
            )
            made[family, dtype] = model.eval(), [inside(model, row) for row in MIXED]
        return made[family, dtype]

    return get


def body_of(model, way, dtype="float32"):
    with torch.inference_mode():
        body = decoder_runners.choose(model, TransformersBackend(model="m", dtype=dtype, device="cpu", **WAYS[way]))
    assert body.name == way.split(",")[0]
    return body


@pytest.mark.parametrize(("family", "way"), [(family, way) for family in FAMILIES for way in ways_of(family)])
@torch.inference_mode()
def test_captured_values_are_the_eager_models_own(loaded, family, way):
    model, shown = loaded(family)
    body, rows, wish = body_of(model, way), some_rows(MIXED), every(model)
    before = body.computed_tokens
    states_ND, captured = body.run(MIXED, rows, wish)
    spent = body.computed_tokens - before
    assert spent == sum(map(len, MIXED)) - (3 * len(PROMPT) if "shared" in way else 0)
    worst = distances(captured, shown, rows, wish)
    assert all(worst[name] <= TOLERANCE["float32"] for name in worst), worst
    torch.testing.assert_close(
        states_ND, torch.cat([one.final[row] for one, row in zip(shown, rows, strict=True)]), atol=2e-4, rtol=0
    )
    assert torch.equal(states_ND, body.states(MIXED, rows)), "the pass computes what it computes without taps"


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("qwen2", "packed, prefixes shared"),
        ("qwen2", "padded"),
        ("llama", "fused, prefixes shared"),
        ("gemma3", "padded"),
    ],
)
@torch.inference_mode()
def test_in_bfloat16_they_differ_by_rounding(loaded, family, way):
    model, shown = loaded(family, "bfloat16")
    rows, wish = some_rows(MIXED), every(model)
    _, captured = body_of(model, way, "bfloat16").run(MIXED, rows, wish)
    assert captured.states[1].dtype == captured.attention[1].value_TGd.dtype == torch.bfloat16
    worst = distances(captured, shown, rows, wish)
    assert all(worst[name] <= TOLERANCE["bfloat16"] for name in worst), worst


@pytest.mark.parametrize("way", ["padded", "packed, prefixes shared", "fused, prefixes shared"])
@torch.inference_mode()
def test_passes_that_are_cut_and_reordered_give_the_order_of_the_request(loaded, way):
    model, shown = loaded("llama")
    body, rows, wish = body_of(model, way), some_rows(MIXED, seed=3), Wish((1, 3), (2,), (3,))
    body._max_tokens = 60
    _, captured = body.run(MIXED, rows, wish)
    worst = distances(captured, shown, rows, wish)
    assert all(worst[name] <= TOLERANCE["float32"] for name in worst), worst


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_a_part_is_what_the_sequences_alone_would_give(loaded, way):
    model, shown = loaded("qwen2")
    rows = some_rows(MIXED)
    _, captured = body_of(model, way).run(MIXED, rows, every(model))
    for part, wish in ((slice(0, 2), Wish((0, 2))), (slice(1, 6), Wish((1,), (2,), (1,))), (slice(2, 3), every(model)), (slice(0, 8), Wish(ffn=(2,), quantiles=True))):  # fmt: skip
        worst = distances(captured.part(part, wish), shown[part], rows[part], wish)
        assert all(worst[name] <= TOLERANCE["float32"] for name in worst), worst


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_without_a_wish_nothing_is_touched(loaded, monkeypatch, way):
    model, _ = loaded("qwen2")
    body, rows = body_of(model, way), some_rows(MIXED)
    modules = list(model.modules())
    before = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in modules]
    body.run(MIXED, rows, every(model))
    after = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in modules]
    assert before == after, "hooks end with their pass"
    assert all(getattr(module, "config", model.config) is model.config for module in modules) and not hooks._listeners

    def touched(*args, **settings):
        raise AssertionError("a tap where nothing is wished")

    for owner, name in (
        (decoder_runners, "Taps"),
        (torch.nn.Module, "register_forward_hook"),
        (torch.nn.Module, "register_forward_pre_hook"),
    ):
        monkeypatch.setattr(owner, name, touched)
    _, captured = body.run(MIXED, rows, Wish())
    assert not captured.states and not captured.attention and not captured.ffn


def test_the_union_of_wishes_grants_all():
    wishes = [Wish(), Wish((2, 5), (), (1,)), Wish((0, 2), (7,), (), quantiles=False), Wish(ffn=(1, 3), quantiles=True)]
    assert union(wishes) == Wish((0, 2, 5), (7,), (1, 3), quantiles=True)
    assert not union([]) and not Wish(quantiles=True)


# ------------------------------------------------------- what a model can give


def given(folder, **settings):
    return backend(folder, **settings)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("qwen2", {"states", "attention", "ffn"}),
        ("gemma2", {"states", "attention", "ffn"}),
        ("qwen3_moe", {"states", "attention", "ffn"}),
        ("glm4", {"states", "attention", "ffn"}),
        ("cohere2", {"states", "attention", "ffn"}),
        ("phi", {"states", "attention"}),
        ("llama4_text", {"states"}),
        ("recurrent_gemma", {"states", "ffn"}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_gives_what_the_probe_finds_equal(model_factory, offers, family, kinds, dtype):
    assert offers(given(model_factory(family), dtype=dtype)) == kinds


@pytest.fixture
def offers(monkeypatch):
    """What of `Wish` a backend's facts offer, by a plugged-in kind for each field."""
    fields, plain = (
        ("states", "attention", "ffn"),
        {kind: reduce.REDUCTIONS[kind] for kind in ("top_k", "hidden", "full")},
    )
    kinds = {f"of_{field}": type(field, (reduce.HiddenReduction,), {"captures": field}) for field in fields}
    monkeypatch.setattr(reduce, "REDUCTIONS", plain | kinds)
    monkeypatch.setattr(reduce, "SIGNALS", reduce.SIGNALS | dict.fromkeys(kinds, reduce.SIGNALS["top_k"]))
    return lambda teacher: {kind.removeprefix("of_") for kind in teacher.facts.transports} - set(plain)


def shifted(taps_, block, x_XD):
    return WHOLE_STATE(taps_, block, x_XD.roll(1, 0))


def unscaled(taps_, block, query, key, value, *, scale, **rest):
    return WHOLE_ATTENTION(taps_, block, query, key, value, scale=2 * scale, **rest)


def unsounded(taps_, block, query, key, value, *, scale, **rest):
    return WHOLE_ATTENTION(taps_, block, query, key, value.flip(1), scale=scale, **rest)


def rotated(taps_, block, query, key, value, **rest):
    taps_._plain_keys[block] = taps_._of_tokens(key).flatten(1)
    return WHOLE_ATTENTION(taps_, block, query, key, value, **rest)


WHOLE_STATE, WHOLE_ATTENTION = taps.Taps.state, taps.Taps.attention


@pytest.mark.parametrize(
    ("method", "fault", "lost"),
    [
        ("state", shifted, "states"),
        ("attention", unscaled, "attention"),
        ("attention", unsounded, "attention"),
        ("attention", rotated, "attention"),
        ("ffn", lambda taps_, block, u, scale=None: None, "ffn"),
    ],
    ids=["shifted states", "wrong scale", "values of other heads", "rotated keys", "no activation"],
)
@pytest.mark.parametrize("layers", ["transformers", "fused"])
def test_what_differs_from_the_plain_model_is_not_offered(
    model_factory, monkeypatch, caplog, offers, method, fault, lost, layers
):
    monkeypatch.setattr(taps.Taps, method, fault)
    with caplog.at_level(logging.INFO):
        teacher = given(model_factory("qwen2"), layers=layers)
    assert offers(teacher) == {"states", "attention", "ffn"} - {lost}
    assert f"does not give {lost} of chosen layers: block" in caplog.text


def test_attention_with_a_soft_cap_is_offered_since_it_is_computed_with_it(model_factory, offers):
    """transformers' sdpa leaves the cap out: `auto` takes eager attention for such a model."""
    assert offers(given(model_factory("gemma2", **SOFTCAP))) == {"states", "attention", "ffn"}


def test_a_backend_that_captures_nothing_offers_no_layers(offers):
    assert reduce.offered(serves_head=True) == ("top_k", "hidden", "full")
    assert reduce.offered(serves_head=False, captures=("ffn",)) == ("top_k", "full", "of_ffn")


# ------------------------------------------------------------- a trained model


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
@torch.inference_mode()
def test_a_trained_model_shows_what_it_computes(monkeypatch):
    """SmolLM2-135M in float32, alone, packed and with shared prefixes, of all three ways to run it."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    start = rng.integers(0, 49_000, 70)
    ids = [np.concatenate([start, rng.integers(0, 49_000, n)]).astype(np.int32) for n in (9, 30)]
    ids.insert(0, rng.integers(0, 49_000, 25).astype(np.int32))
    shown = [inside(model, row) for row in ids]
    rows = [np.arange(1, len(row), 3) for row in ids]
    wish = Wish((0, 1, 15, 30), (1, 20, 30), (1, 15, 30), quantiles=True)
    for way in ("padded", "packed, prefixes shared", "fused, prefixes shared", "fused"):
        body = body_of(model, way)
        _, captured = body.run(ids, rows, wish)
        worst = distances(captured, shown, rows, wish)
        print(way, worst)
        assert all(worst[name] <= 1e-4 for name in worst), (way, worst)
    _, alone = body.run(ids[1:2], rows[1:2], wish)
    worst = distances(alone, shown[1:2], rows[1:2], wish)
    assert all(worst[name] <= 1e-4 for name in worst), worst


internlm.register()
