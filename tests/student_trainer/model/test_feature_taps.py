"""What is read inside the student's blocks: attention made again beside the maps of eager transformers, FFN energies beside hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.errors import ModelError
from student_trainer.losses.features import attention as formulas
from student_trainer.losses.features import ffn
from student_trainer.losses.term import FfnTap
from student_trainer.model import internlm
from student_trainer.model.attention_reader import AttentionReader
from student_trainer.model.forward import blocks_of, down_projection
from student_trainer.model.speed import compiled, cuda_graphs
from tests.student_trainer.losses.worlds import grid_of
from tests.student_trainer.model.test_cuda_graphs import Rerunner, trained
from tests.student_trainer.model.test_forward import IDS, gradients, same, student_of
from tests.tiny import make_model

KNOWN = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "internlm3": {},
    "gemma2": {"sliding_window": 20, "attn_logit_softcapping": 2.0, "num_hidden_layers": 2},
    "gemma3_text": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 20},
    "olmo2": {},
    "glm4": {},
}
SHAPES = {"qwen3": {}, "mistral": {}, "olmo2": {}}
TOKENS = torch.arange(5, 205).remainder(290).reshape(2, 100)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            if family in SHAPES:
                made[family] = plain_model(folder, family, **KNOWN[family])
            else:
                made[family] = make_model(folder, family, **KNOWN[family])
        return made[family]

    return make


def plain_model(folder, family, **changes):
    """A family that tests.tiny does not know."""
    import transformers as tf

    make_model(folder, "llama")  # its tokenizer, and a folder
    shape = dict(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(family, **shape, **changes))
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", KNOWN)
def test_maps_made_again_are_those_of_eager_attention(folder_of, family):
    folder = folder_of(family)
    internlm.register()
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = eager(TOKENS, output_attentions=True, use_cache=False).attentions
    student = student_of(folder, lora=False, checkpointing=False)
    reader = AttentionReader(student.body, student.computing)
    rows = torch.tensor([2, 17, 40, 63, 64, 99])
    with torch.no_grad():
        outputs = student.forward(TOKENS, (0, 1))
        for block in (1, 2):
            reader.check(block)
            found = reader(block, outputs.taps[block - 1])
            for sequence in range(2):
                logp_RP = formulas.pooled_logp(found, grid_of(rows, sequence), 16)
                map_RT = expected[block - 1][sequence, :, rows].mean(0)
                map_RT[:, :4] = 0
                pooled_RP = torch.nn.functional.pad(map_RT, (0, 12)).unflatten(-1, (-1, 16)).sum(-1)
                share_RP = pooled_RP / pooled_RP.sum(-1, keepdim=True)
                torch.testing.assert_close(logp_RP[1:].exp(), share_RP[1:], rtol=1e-4, atol=2e-6)
    assert student.model.training  # as it was


def test_padding_and_company_change_no_map(folder_of):
    student = student_of(folder_of("qwen2"), lora=False, checkpointing=False)
    reader = AttentionReader(student.body, student.computing)
    rows = torch.tensor([10, 40])

    def logp(ids_BL, sequence):
        with torch.no_grad():
            states = reader(2, student.forward(ids_BL, (1,)).taps[1])
            return formulas.pooled_logp(states, grid_of(rows, sequence), 16)

    alone = logp(TOKENS[1:, :41], 0)
    padded = torch.cat([TOKENS[1, :41], torch.zeros(59, dtype=torch.long)])
    torch.testing.assert_close(logp(torch.stack([TOKENS[0], padded]), 1), alone, rtol=1e-5, atol=1e-6)


def read_loss(student, reader, rows=(9, 15, 19)):
    """Of maps, keys and values of both blocks: what reaches every weight that they are made of."""
    taps = student.forward(IDS, (0, 1)).taps
    total = 0.0
    for block in (1, 2):
        found = reader(block, taps[block - 1])
        logp_RP = formulas.pooled_logp(found, grid_of(torch.tensor(rows), 1), 8)
        total = total + (logp_RP * torch.linspace(-1, 1, logp_RP.numel()).view_as(logp_RP)).clamp_min(-50).sum()
        total = total + found.plain_key_BLGd.square().sum() * 1e-3 + found.value_BLGd.square().sum() * 1e-3
    return total


def grads_of(student, loss):
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
def test_gradients_of_maps_are_those_of_the_eager_model(folder_of, family):
    """By the eager model's own maps, whose graph is autograd's alone."""
    folder = folder_of(family)
    student = student_of(folder, lora=False, checkpointing=False)
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    student.model.double(), eager.double()
    reader = AttentionReader(student.body, student.computing)
    rows = torch.tensor([9, 15, 19])
    slope = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)
    states = reader(2, student.forward(IDS, (1,)).taps[1])
    logp_RP = formulas.pooled_logp(states, grid_of(rows, 1), 8)
    found = grads_of(student, (logp_RP.exp() * slope).sum())
    map_RT = eager(IDS, output_attentions=True, use_cache=False).attentions[1][1, :, rows].mean(0)[:, 4:]
    pooled_RP = torch.stack([map_RT[:, :4].sum(-1), map_RT[:, 4:12].sum(-1), map_RT[:, 12:].sum(-1)], -1)
    (pooled_RP / pooled_RP.sum(-1, keepdim=True) * slope).sum().backward()
    expected = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, grad in found.items() if grad.any()} == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))


def test_maps_by_compiled_and_checkpointed_layers_and_adapters_have_the_gradients_of_plain_ones(model_factory):
    student = student_of(model_factory("qwen2"), checkpointing=False)
    reader = AttentionReader(student.body, student.computing)
    expected = grads_of(student, read_loss(student, reader))
    assert any("lora_A" in name and "q_proj" in name for name in expected)
    ways = copy.deepcopy(student)
    ways.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled.install(ways.model, backend="aot_eager")
    reader = AttentionReader(ways.body, ways.computing)
    for block in (1, 2):
        reader.check(block)
    found = grads_of(ways, read_loss(ways, reader))
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-9)


def test_adapters_drop_nothing_when_maps_are_made_again(model_factory):
    from student_trainer.config.model import LoraSettings, ModelConfig
    from student_trainer.model.load import load_student

    config = ModelConfig(path=str(model_factory("qwen2")), dtype="float32", lora=LoraSettings(rank=4, dropout=0.5))
    student = load_student(config, 0)
    student.model.train()
    reader = AttentionReader(student.body, student.computing)
    state = torch.randn(1, 8, 32)
    before = torch.get_rng_state()
    one, other = reader(1, state), reader(1, state)
    assert torch.equal(one.query_BLHd, other.query_BLHd) and torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in student.model.modules() if isinstance(m, torch.nn.Dropout))


@pytest.mark.parametrize("family", ["cohere2", "granitemoe", "hyperclovax", "nanochat"])
def test_families_with_manners_of_their_own_are_understood(model_factory, family):
    student = student_of(model_factory(family), lora=False, checkpointing=False)
    reader = AttentionReader(student.body, student.computing)
    for block in range(1, len(blocks_of(student.body)) + 1):
        reader.check(block)


@pytest.mark.parametrize("family", ["phi", "llama4_text", "recurrent_gemma"])
def test_attention_that_is_not_understood_is_refused_by_the_term(model_factory, family):
    """Phi rotates some of the channels, Llama 4 by complex numbers, and Recurrent Gemma's first block has no attention."""
    student = student_of(model_factory(family), lora=False, checkpointing=False)
    with pytest.raises(ModelError, match=r"loss\.attention is not possible with this student; set it to null"):
        AttentionReader(student.body, student.computing).check(1)


def test_a_soft_cap_is_in_the_maps(folder_of):
    student = student_of(folder_of("gemma2"), lora=False, checkpointing=False)
    reader = AttentionReader(student.body, student.computing)
    reader.check(1)
    assert reader(1, torch.randn(1, 8, 32)).softcap == 2.0


def test_a_wrong_window_is_noticed(folder_of):
    student = student_of(folder_of("gemma3_text"), lora=False, checkpointing=False)
    blocks_of(student.body)[0].self_attn.sliding_window = 21
    with pytest.raises(ModelError, match="attends otherwise than its queries and keys say"):
        AttentionReader(student.body, student.computing).check(1)


# ---------------------------------------------------------------------- FFN


TAPS = (1, FfnTap(1), FfnTap(2, quantiles=True))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "glm4"])
def test_energies_are_those_of_a_hook_and_change_nothing(model_factory, family):
    student = student_of(model_factory(family), lora=False, checkpointing=False)
    student.model.eval()
    seen = {}
    downs = [down_projection(block) for block in blocks_of(student.body)]
    handles = [
        down.register_forward_pre_hook(lambda m, given, n=n: seen.update({n: given[0]})) for n, down in enumerate(downs)
    ]
    with torch.no_grad():
        outputs, plain = student.forward(IDS, TAPS), student.forward(IDS)
    for handle in handles:
        handle.remove()
    assert torch.equal(outputs.final_BLD, plain.final_BLD)
    assert torch.equal(outputs.taps[FfnTap(1)][..., 0], ffn.energy(seen[0]))
    assert outputs.taps[FfnTap(2, True)].shape == (2, 20, 17)
    assert torch.equal(outputs.taps[FfnTap(2, True)][..., 1:], ffn.profile(seen[1]))
    assert not any(down._forward_pre_hooks for down in downs)


def test_energies_by_checkpointed_and_compiled_passes_have_the_gradients_of_plain_ones(model_factory):
    student = student_of(model_factory("qwen2"), checkpointing=False)
    plain = gradients(student, student.forward, TAPS)
    ways = copy.deepcopy(student)
    ways.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(gradients(ways, ways.forward, TAPS), plain)
    compiled.install(ways.model, backend="aot_eager")
    same(gradients(ways, ways.forward, TAPS), plain)


def test_a_tapped_block_is_checkpointed_as_the_others_are(model_factory):
    student = student_of(model_factory("qwen2"), checkpointing=True)
    calls = []
    handle = blocks_of(student.body)[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    gradients(student, student.forward, TAPS)
    handle.remove()
    assert len(calls) == 2, "once in each direction"


def test_recorded_passes_carry_energies(model_factory):
    student = student_of(model_factory("qwen2"))
    plain = gradients(student, student.forward, TAPS)
    body = cuda_graphs.GraphedBody(student.forward, trained(student), Rerunner(), pytest.fail, worth=1)
    same(gradients(student, body, TAPS), plain)
    assert body.recorded == 1


def test_a_student_without_one_ffn_is_refused_by_the_term(model_factory):
    student = student_of(model_factory("granitemoe"), lora=False)
    with pytest.raises(ModelError, match=r"no mlp\.down_proj.*no loss\.ffn is possible"):
        down_projection(blocks_of(student.body)[0])
