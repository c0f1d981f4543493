"""Taps: the outputs of blocks, by plain, compiled, checkpointed and recorded passes, with the gradients that flow through them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.config.model import LoraSettings, ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model.forward import blocks_of
from student_trainer.model.load import load_student
from student_trainer.model.speed import compiled, cuda_graphs
from tests.student_trainer.model.test_cuda_graphs import Rerunner, trained

IDS = torch.arange(3, 43).remainder(290).reshape(2, 20)
FAMILIES = ["qwen2", "llama", "gemma2", "glm4", "cohere", "granitemoe", "falcon_h1", "recurrent_gemma", "phi"]


def student_of(folder, *, lora=True, checkpointing=True, attention="auto"):
    settings = LoraSettings(rank=4) if lora else None
    student = load_student(
        ModelConfig(
            path=str(folder), dtype="float32", lora=settings, gradient_checkpointing=checkpointing, attention=attention
        ),
        0,
    )
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:  # zero at first: then nothing would reach A
            torch.nn.init.normal_(parameter, std=0.1)
    student.model.train()
    return student


def gradients(student, run, taps, ids_BL=IDS):
    """Of a loss on the final states and every tap; and the outputs."""
    outputs = run(ids_BL, taps)
    sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in outputs.tensors()).backward()
    found = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad(set_to_none=True)
    return [value.detach().clone() for value in outputs.tensors()], found


def same(one, other, rtol=1e-4):
    (outputs, grads), (expected, expected_grads) = one, other
    for value, plain in zip(outputs, expected, strict=True):
        torch.testing.assert_close(value, plain, rtol=rtol, atol=rtol)
    assert grads.keys() == expected_grads.keys() and grads
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


def test_a_soft_cap_of_attention_scores_is_computed_or_refused(model_factory):
    """transformers' sdpa leaves it out, with a warning at most: another model would be trained."""
    folder = model_factory("gemma2", attn_logit_softcapping=0.5)
    student = student_of(folder, lora=False)
    student.model.eval()
    eager, sdpa = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name).eval().model
        for name in ("eager", "sdpa")
    )
    with torch.no_grad():
        found = student.states(IDS)
        torch.testing.assert_close(found, eager(IDS).last_hidden_state)
        assert not torch.allclose(found, sdpa(IDS).last_hidden_state, atol=1e-2), "a case that shows nothing"
    with pytest.raises(ModelError, match=r"model\.attention=sdpa: .*attn_logit_softcapping=0\.5.*auto or eager"):
        student_of(folder, attention="sdpa")


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_the_hidden_states_of_transformers_and_change_nothing(model_factory, family):
    student = student_of(model_factory(family), lora=False, checkpointing=False)
    student.model.eval()
    count = len(blocks_of(student.body))
    with torch.no_grad():
        expected = student.body(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
        outputs = student.forward(IDS, range(count + 1))
        plain = student.forward(IDS)
    assert torch.equal(outputs.final_BLD, plain.final_BLD) and not plain.taps
    assert list(outputs.taps) == list(range(count + 1))
    for tap in range(count):  # transformers' last is after the norm, ours before it
        torch.testing.assert_close(outputs.taps[tap], expected[tap], rtol=1e-5, atol=1e-5)
    assert not torch.equal(outputs.taps[count], outputs.final_BLD)
    assert all(type(block).__name__ != "_Tapped" for block in blocks_of(student.body)), (
        "the blocks are in their places again"
    )


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_flow_through_taps(model_factory, lora, checkpointing):
    """Against transformers' own hidden states, without checkpoints."""
    student = student_of(model_factory("llama"), lora=lora, checkpointing=checkpointing)
    plain = student_of(model_factory("llama"), lora=lora, checkpointing=False)
    plain.model.load_state_dict(student.model.state_dict())

    def states(ids_BL, taps):
        from student_trainer.losses.term import StudentOutputs

        outputs = plain.body(input_ids=ids_BL, use_cache=False, output_hidden_states=True)
        return StudentOutputs(outputs.last_hidden_state, {tap: outputs.hidden_states[tap] for tap in taps})

    same(gradients(student, student.forward, (1, 0)), gradients(plain, states, (1, 0)))


def test_compiled_layers_are_tapped_from_outside(model_factory):
    torch._dynamo.reset()
    plain = student_of(model_factory("qwen2"))
    quick = copy.deepcopy(plain)
    compiled.install(quick.model, "aot_eager")
    for taps in ((1, 2), (), (0, 2)):
        same(gradients(quick, quick.forward, taps), gradients(plain, plain.forward, taps))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_recorded_passes_carry_taps(model_factory, lora):
    student = student_of(model_factory("qwen2"), lora=lora)
    plain, told = copy.deepcopy(student), []
    recorded = cuda_graphs.GraphedBody(student.forward, trained(student), Rerunner(), told.append, worth=2)
    for number in range(4):
        for taps in ((1, 2), (), (0, 1)):  # a step whose term is annealed away asks for fewer
            ids_BL = (IDS + number).remainder(290)
            found = gradients(student, recorded, taps, ids_BL)
            same(found, gradients(plain, plain.forward, taps, ids_BL))
    assert recorded.recorded == 3 and not told


def test_a_tap_that_no_loss_reads_adds_nothing(model_factory):
    student = student_of(model_factory("qwen2"))
    recorded = cuda_graphs.GraphedBody(student.forward, trained(student), Rerunner(), pytest.fail, worth=1)
    grads = []
    for run in (recorded, student.forward):
        run(IDS, (1,)).final_BLD.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None})
        student.model.zero_grad(set_to_none=True)
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("taps", [(3,), (-1,), (1, 99)])
def test_taps_out_of_range_are_refused(model_factory, taps):
    student = student_of(model_factory("qwen2"))
    with pytest.raises(ModelError, match=r"taps must lie in 0\.\.2"):
        student.forward(IDS, taps)
    student.forward(IDS, (2,))  # and nothing is left behind


def test_blocks_that_run_twice_or_lie_elsewhere_are_refused(model_factory):
    student = student_of(model_factory("qwen2"))
    blocks = student.body.layers
    plain = blocks[1].forward
    blocks[1].forward = lambda *args, **kwargs: plain(blocks[0](*args, **kwargs), **kwargs)
    with pytest.raises(ModelError, match="block 1 of the student runs more than once"):
        student.forward(IDS, (1,))
    blocks[1].forward = plain
    student.body.more = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    with pytest.raises(ModelError, match="2 lists of 2 blocks"):
        student.forward(IDS, (1,))
