"""The memory estimate against tensors that are really there: a Trainer's, and those that torch's own hooks see autograd keep."""

import gc
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.config.run import parse_config
from student_trainer.data.batch_plan import RunOrder
from student_trainer.data.dataset import Example, TokenizedDataset
from student_trainer.errors import ModelError
from student_trainer.model.load import load_student
from student_trainer.planning.estimate import parts
from student_trainer.planning.estimate.parts import Step, chunk_bytes, estimate
from student_trainer.planning.estimate.shapes import load_shapes
from student_trainer.training.objective import Objective
from student_trainer.training.trainer import DistillationTrainer
from student_trainer.training.windows import FixedOrder
from tests.bench import plan_memory
from tests.thorough import first

B, L, V = 2, 32, 300


def storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def settings(path, lora, **changes):
    return ModelConfig(path=str(path), dtype="float32", lora=LoraSettings(rank=4) if lora else None, **changes)


class Watch(TrainerCallback):
    """Counts the gradients that the optimizer is about to read."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = sum(storages(p.grad for p in model.parameters() if p.grad is not None).values())


@pytest.mark.parametrize(("family", "lora"), [("qwen2", True), ("llama", False)])
def test_weights_gradients_and_optimizer_are_those_of_a_trainer_to_the_byte(tmp_path, model_factory, family, lora):
    path = model_factory(family)
    tree = {
        "run": {"output_dir": str(tmp_path)}, "data": {"train": ["x"]}, "loss": {"output": None, "sft_weight": 1.0},
        "model": settings(path, lora).model_dump(mode="json"), "train": {"max_steps": 1, "accumulation": 1, "batch_size": B},
    }  # fmt: skip
    config = parse_config(tree, "test")
    student = load_student(config.model, 0)
    ids_L = torch.arange(L).numpy().astype("int32")
    data = TokenizedDataset([Example(ids_L, ids_L > 0, 0, str(n)) for n in range(B)])
    windows = FixedOrder(data, RunOrder(B, batch_size=B, accumulation=1, epochs=1, max_steps=1, seed=0))
    watch = Watch()
    trainer = DistillationTrainer(config, student, windows, Objective(config.loss, V).terms(student), callbacks=[watch])
    trainer.train()
    trainer.close()
    found = estimate(
        load_shapes(config.model, bfloat16=False), Step(B, L, B * (L - 1), compiled=False), on_gpu=False
    ).parts
    everything = storages([*student.model.parameters(), *student.model.buffers()])
    assert found["weights"] + found["float32 masters"] == sum(everything.values())
    assert found["gradients"] == watch.gradients
    state = [t for held in trainer.optimizer.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
    assert found["optimizer"] == sum(storages(state).values())


def kept_by(model, body, ids_BL):
    """Bytes that autograd holds after a pass, as torch's own hooks and the garbage collector see them."""
    lasting = storages([*model.parameters(), *model.buffers(), ids_BL])
    before = {id(found) for found in gc.get_objects() if isinstance(found, torch.Tensor)}
    seen = {}

    def keep(tensor):
        seen.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states_BLD = body(input_ids=ids_BL, use_cache=False).last_hidden_state
    held = [
        t for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and id(t) not in before and t.requires_grad and t is not states_BLD
    ]  # fmt: skip  # without masks, rotations and states of generators, which do not grow with the model
    seen |= storages(held)
    return sum(size for place, size in seen.items() if place not in lasting), states_BLD


@pytest.mark.parametrize(("family", "lora"), [("qwen2", True), ("gemma2", False)])
def test_activations_are_what_the_hooks_see(model_factory, family, lora):
    config = settings(model_factory(family), lora)
    student = load_student(config, 0)
    student.model.train()
    if lora:  # else the first block's input has no gradient, and that block keeps less than the others
        student.causal_lm.enable_input_require_grads()
    ids_BL = torch.arange(B * L).reshape(B, L)
    real, _ = kept_by(student.model, student.body, ids_BL)
    found = estimate(load_shapes(config, bfloat16=False), Step(B, L, B * L, compiled=False), on_gpu=False)
    assert found.parts["activations"] == found.activations_without
    assert found.activations_without == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("family", ["gemma2"])
def test_activations_of_a_checkpointed_student_are_what_is_there_after_its_pass(model_factory, family):
    config = settings(model_factory(family), True, gradient_checkpointing=True)
    student = load_student(config, 0)
    student.model.train()
    real, _ = kept_by(student.model, student.body, torch.arange(B * L).reshape(B, L))
    found = estimate(
        load_shapes(config, bfloat16=False), Step(B, L, B * L, compiled=False, checkpointing=True), on_gpu=False
    )
    assert found.parts["activations"] == found.activations_with < found.activations_without
    assert found.activations_with == pytest.approx(real, rel=0.05)


def test_float32_weights_that_compute_in_bfloat16_keep_casts_of_themselves(model_factory):
    config = ModelConfig(path=str(model_factory("qwen2")), lora=None)
    student = load_student(config, 0)
    student.model.train()
    lasting = storages([*student.model.parameters(), *student.model.buffers()])
    ids_BL, seen = torch.arange(B * L).reshape(B, L), {}

    def keep(tensor):
        seen.update(storages([tensor]))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        held = student.body(input_ids=ids_BL, use_cache=False).last_hidden_state
    real = sum(size for place, size in seen.items() if place not in lasting | storages([ids_BL]))
    found = estimate(load_shapes(config, bfloat16=True), Step(B, L, B * L, compiled=False), on_gpu=False)
    assert held is not None and found.activations_without == pytest.approx(real, rel=0.02)


def test_sizes_follow_the_formulas(model_factory):
    shapes = load_shapes(settings(model_factory("qwen2"), True), bfloat16=True)
    one = shapes.activations(1, L).kinds[0][0]
    assert shapes.activations(4, L).kinds[0][0].saved == pytest.approx(4 * one.saved, rel=0.03)
    assert shapes.activations(1, 2 * L).kinds[0][0].saved == pytest.approx(2 * one.saved, rel=0.01), (
        "flash attention is linear"
    )
    plain = Step(B, L, B * L, vocab_rows=V, chunk_bytes=1 << 30)
    assert chunk_bytes(plain, 2) == B * L * V * 10 and chunk_bytes(plain, 4) == B * L * V * 12
    assert chunk_bytes(replace(plain, teacher_logits=0), 2) == B * L * V * 6
    over_classes = replace(plain, class_bytes=12 * V)
    assert chunk_bytes(over_classes, 2) == B * L * (V * 10 + 12 * V)
    few = replace(over_classes, chunk_bytes=12 * V * 20)
    assert chunk_bytes(few, 2) == 20 * 22 * V, "twenty rows at a time, as the loss of several teachers takes"
    base = estimate(shapes, plain, on_gpu=True)
    more = estimate(shapes, replace(plain, teacher_heads_bytes=1 << 20, label_bytes=1 << 10), on_gpu=True)
    assert more.in_use - base.in_use == (1 << 20) + (1 << 10)
    recorded = estimate(shapes, replace(plain, graphs=True), on_gpu=True)
    assert recorded.parts["recordings"] > base.parts["activations"] and recorded.held > base.held
    assert base.on_card - base.held == parts.CONTEXT_BYTES
    assert estimate(shapes, plain, on_gpu=False).on_card == estimate(shapes, plain, on_gpu=False).in_use


def test_a_base_in_four_bit_is_counted_as_it_lies_in_memory(model_factory):
    config = settings(model_factory("qwen2", hidden=64), True)
    plain = load_shapes(config, bfloat16=True)

    class Four(ModelConfig):
        quantize: object = None

    four = load_shapes(
        Four(**config.model_dump(exclude={"quantize"}), quantize=type("Q", (), {"double": False})()), bfloat16=True
    )
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # two blocks: q, o; k, v; gate, up, down
    assert plain.frozen_bytes - four.frozen_bytes == 4 * linear - linear // 2 - 4 * linear // 64
    assert four.dequantized_bytes == 4 * 64 * 128 and four.trained == plain.trained


def test_an_architecture_that_cannot_be_traced_is_named(model_factory, monkeypatch):
    shapes = load_shapes(settings(model_factory("qwen2"), True), bfloat16=True)

    def broken(*_):
        raise RuntimeError("data-dependent\nshape")

    monkeypatch.setattr("student_trainer.planning.estimate.blocks.trace", broken)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM cannot be estimated: RuntimeError: data-dependent shape"):
        shapes.activations(1, L)


@pytest.mark.parametrize("case", first(plan_memory.peaks(), lambda case: case[0] == "0.5B" and not case[2]))
def test_estimates_are_the_peaks_that_were_measured_on_a_gpu(case):
    shape, way, checkpointing = case
    used_gib, held_gib = plan_memory.peaks()[case]
    bench = plan_memory.Bench("cuda", tiny=False, graphs=False)
    found = bench.estimated(shape, bench.config(way, checkpointing))
    assert found.in_use / 2**30 == pytest.approx(used_gib, rel=0.03)
    assert found.held / 2**30 == pytest.approx(held_gib, rel=0.05)
