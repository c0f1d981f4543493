"""Rows that several sequences share: the same losses, gradients and figures as a row for each, of every kind of label."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from student_trainer.config.model import ModelConfig
from student_trainer.data.dataset import Example, IndexedExample
from student_trainer.data.row_packing import pack_rows
from student_trainer.errors import ConfigError, ModelError
from student_trainer.model.forward import SharedRows
from student_trainer.model.load import load_student
from student_trainer.model.packing_probe import check_packing
from student_trainer.training.run import train
from student_trainer.training.windows import MicroBatch, padded


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(0, 9))
def test_every_token_has_one_place_and_rows_are_no_longer_than_the_longest(lengths, more):
    packing = pack_rows(lengths, lambda longest: longest + more)
    rows, length = packing.sequence_RL.shape
    assert length == max(lengths) + more and rows <= len(lengths)
    taken = np.zeros((rows, length), int)
    for b, tokens in enumerate(lengths):
        row, place = packing.row_B[b], slice(packing.start_B[b], packing.start_B[b] + tokens)
        taken[row, place] += 1
        assert len(set(packing.sequence_RL[row, place])) == 1
        assert (packing.position_RL[row, place] == np.arange(tokens)).all()
        outside = np.delete(packing.sequence_RL[row], np.arange(place.start, place.stop))
        assert packing.sequence_RL[row, place.start] not in outside
    assert taken.max() == 1 and taken.sum() == sum(lengths)
    # first fit: no two rows could be one
    used = sorted(taken.sum(1))
    assert rows < 2 or used[0] + used[1] > length


def example(tokens, seed):
    ids = np.random.default_rng(seed).integers(3, 300, tokens).astype(np.int32)
    mask = np.arange(tokens) >= tokens // 2
    return IndexedExample(seed, Example(ids, mask, 1, f"row {seed}"))


FAMILIES = ["qwen2", "llama", "gemma2", "qwen3", "phi"]


@pytest.mark.parametrize(("family", "compiled"), [*((family, False) for family in FAMILIES), ("qwen2", True)])
def test_states_and_gradients_are_those_of_rows_of_their_own(model_factory, family, compiled):
    """gemma2 has windows of 64 tokens in every other layer; the compiled layers are the ones a GPU trains with."""
    from student_trainer.model.speed import compiled as layers

    config = ModelConfig.model_validate(
        {"path": str(model_factory(family)), "dtype": "float32", "lora": None, "compiled": False}
    )
    student = load_student(config, 0)
    check_packing(student)
    batch = MicroBatch.of(0, [example(tokens, seed) for seed, tokens in enumerate((40, 9, 17, 5, 31, 8))])
    plain, shared = padded(batch, 0), padded(batch, 0, shares_rows=True)
    assert shared.input_ids_BL.shape == (3, 40) and plain.input_ids_BL.shape == (6, 40)
    for name in ("labels_N", "weights_N", "sequence_N", "position_N"):
        assert np.array_equal(getattr(plain, name), getattr(shared, name)), name
    assert plain.request == shared.request or plain.request.names == shared.request.names
    student.model.train()
    if compiled:
        layers.install(student.model, backend="aot_eager")
    found = []
    for one in (plain, shared):
        student.model.zero_grad()
        rows = SharedRows.of(one.packing, torch.device("cpu")) if one.packing else None
        outputs = student.forward(one.input_ids_BL, (0, 1, 2), rows)
        states = [tensor.reshape(-1, tensor.shape[-1])[one.index_N] for tensor in outputs.tensors()]
        sum((state * torch.linspace(-1, 1, state.numel()).view_as(state)).sum() for state in states).backward()
        found.append(
            (states, {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None})
        )
    (states, gradients), (other_states, other_gradients) = found
    for state, other in zip(states, other_states, strict=True):
        assert (state - other).norm() <= 1e-5 * state.norm()
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).norm() <= 1e-4 * gradient.norm().clamp(min=1e-6), name


def run(config_of, tmp_path, name, packing, **sections):
    tree = {
        "train": {
            "packing": packing,
            "max_steps": 3,
            "batch_size": 6,
            "accumulation": 1,
            "learning_rate": 1e-3,
            "save_steps": 0,
        }
    }
    config = config_of(
        run={"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")},
        model={"lora": None}, **{**sections, **tree},
    )  # fmt: skip
    result = train(config, console=Console(file=io.StringIO()))
    return [entry for entry in result.curve if "loss" in entry], result.metrics


@pytest.mark.parametrize(
    "sections",
    [
        {"labels": {"transport": "hidden"}, "loss": {"sft_weight": 0.3}},
        {"labels": {"transport": "top_k", "k": 12, "extra_ids": 4}, "loss": {"output": {"divergence": "reverse_kl"}}},
        {"on_policy": {"share": 0.5, "max_new_tokens": 8, "max_staleness": 0}},
    ],
    ids=["hidden", "extra_ids", "on_policy"],
)
def test_a_run_with_shared_rows_logs_what_one_without_logs(config_of, tmp_path, sections):
    plain, figures = run(config_of, tmp_path, "plain", False, **sections)
    shared, other = run(config_of, tmp_path, "shared", True, **sections)
    assert shared[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    for before, after in zip(plain, shared, strict=True):
        for name in ("loss", "kd_loss", "grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-4), name
    assert other["kl_to_teacher"] == pytest.approx(figures["kl_to_teacher"], rel=1e-3)


def test_a_recurrent_student_is_refused_by_what_it_computes(model_factory):
    config = {"path": str(model_factory("recurrent_gemma")), "dtype": "float32", "lora": None, "compiled": False}
    student = load_student(ModelConfig.model_validate(config), 0)
    with pytest.raises(ModelError, match=r"train\.packing=true: RecurrentGemmaForCausalLM .* set train\.packing=false"):
        check_packing(student)


def test_a_leak_is_seen(model_factory, monkeypatch):
    """Without the mask the probe must fail: it is what stands between a user and rows that read one another."""
    from transformers import masking_utils

    student = load_student(
        ModelConfig.model_validate({"path": str(model_factory("qwen2")), "dtype": "float32", "lora": None}), 0
    )
    monkeypatch.setattr(masking_utils, "packed_sequence_mask_function", lambda _: lambda b, h, q, kv: kv >= 0)
    with pytest.raises(ModelError, match="computes a sequence otherwise beside others"):
        check_packing(student)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"loss": {"attention": {"weight": 0.1}}}, "loss.attention, whose maps are of one sequence a row"),
        ({"model": {"graphs": True}}, "model.graphs=true"),
        ({"model": {"attention": "flash_attention_2"}}, "model.attention=flash_attention_2"),
    ],
)
def test_what_does_not_go_with_shared_rows_is_named(config_of, sections, told):
    with pytest.raises(ConfigError, match=f"train.packing=true does not go with {told}"):
        config_of(train={"packing": True}, **sections)
