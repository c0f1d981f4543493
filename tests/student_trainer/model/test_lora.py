"""The fast LoRA layers against peft's own, in values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from student_trainer.model.speed import lora as fast_lora


def _model(dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    base = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2)).double()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    lora = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, lora).double().train()


def _run(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(24).reshape(2, 12)
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["plain", "disabled", "merged"])
def test_same_values_and_gradients_as_peft(dropout: float, mode: str) -> None:
    model = _model(dropout)
    fast = copy.deepcopy(model)
    assert fast_lora.install(fast) == 14
    for one in (model, fast):
        if mode == "disabled":
            one.base_model.disable_adapter_layers()
        if mode == "merged":
            one.merge_adapter()
    (loss, grads), (fast_loss, fast_grads) = _run(model), _run(fast)
    torch.testing.assert_close(fast_loss, loss, rtol=1e-12, atol=0)
    assert grads.keys() == fast_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(fast_grads[name], grad, rtol=1e-9, atol=1e-13)
    assert fast.state_dict().keys() == model.state_dict().keys()


def test_bfloat16_under_autocast_is_as_near_to_the_truth_as_peft() -> None:
    exact = _model()
    model = copy.deepcopy(exact).bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fast = copy.deepcopy(model)
    fast_lora.install(fast)
    _, want = _run(exact)
    errors = []
    for one in (model, fast):
        with torch.autocast("cpu", torch.bfloat16):
            _, grads = _run(one)
        assert all(g.dtype == torch.float32 for name, g in grads.items() if "lora_" in name)
        off = sum(float((grads[name].double() - want[name]).square().sum()) for name in want)
        errors.append((off / sum(float(w.square().sum()) for w in want.values())) ** 0.5)
    assert errors[1] < 1.2 * errors[0]
