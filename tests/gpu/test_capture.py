"""Values from inside a pass on a real GPU, where our kernels make them, against the same model under eager attention with hooks.

Tolerances: float32 5e-5, bfloat16 0.08, relative for rows of tensors, absolute for energies, and 0.2 for each head's probabilities in
bfloat16, whose eager scores are rounded before their softmax (0.025 with equal states); float8 0.25 for energies.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher_server.backends.transformers import decoder_runners
from teacher_server.backends.transformers.capture import probe
from teacher_server.config.backends import TransformersBackend
from teacher_server.signals.captured import Wish
from tests.teacher_server.backends.inside_oracle import distances, inside
from tests.tiny import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = {"float32": 5e-5, "bfloat16": 0.08}
FAMILIES = {"llama": 32, "qwen2": 64, "qwen3_moe": 32}


def material(tmp_path, family, dtype):
    folder = make_model(
        tmp_path / family, family, hidden=4 * FAMILIES[family]
    )  # heads of 32 and 64 channels: our kernel's
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
        .cuda()
        .eval()
    )
    rng = np.random.default_rng(0)
    start = rng.integers(0, 300, 40)
    ids = [np.concatenate([start, rng.integers(0, 300, n)]).astype(np.int32) for n in (2, 30, 5)]
    ids.insert(0, rng.integers(0, 300, 17).astype(np.int32))
    return model, ids, [np.arange(1, len(row), 2) for row in ids]


@pytest.mark.parametrize(
    ("family", "dtype"),  # experts in bfloat16 go either way at a near tie
    [(family, dtype) for family in FAMILIES for dtype in TOLERANCE if (family, dtype) != ("qwen3_moe", "bfloat16")],
)
@torch.inference_mode()
def test_captured_values_are_the_eager_models_own(tmp_path, family, dtype):
    model, ids, rows = material(tmp_path, family, dtype)
    shown = [inside(model, row) for row in ids]
    wish = Wish((0, 1, 2), (1, 2), (1, 2), quantiles=True)
    ways = {"padded": {"packing": "off"}, "packed": {"layers": "transformers"}}
    if family != "qwen3_moe":
        ways["fused"] = {"layers": "fused"}
    for way, settings in ways.items():
        config = TransformersBackend(model="m", dtype=dtype, prefix_min_tokens=16, **settings)
        body = decoder_runners.choose(model, config)
        assert body.name == way
        states_ND, captured = body.run(ids, rows, wish)
        worst = distances(captured, shown, rows, wish)
        print(family, dtype, way, {name: f"{value:.1e}" for name, value in worst.items()})
        if dtype == "bfloat16":
            assert worst.pop("maps") <= 0.2
        assert all(value <= TOLERANCE[dtype] for value in worst.values()), (way, worst)
        assert torch.equal(states_ND, body.states(ids, rows))
        assert probe.captures(model.model, body, config) == ("states", "attention", "ffn")


@torch.inference_mode()
def test_float8_layers_show_their_activation(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("multiplies no float8")
    model, ids, rows = material(tmp_path, "llama", "bfloat16")
    shown = [inside(model, row) for row in ids]
    body = decoder_runners.choose(model, TransformersBackend(model="m", dtype="bfloat16", layers="fused"))
    body.fused.quantize()
    wish = Wish((), (), (1, 2), quantiles=True)
    worst = distances(body.run(ids, rows, wish)[1], shown, rows, wish)
    print("float8", worst)
    assert worst["energy"] <= 0.25 and worst["quantiles"] <= 0.05
