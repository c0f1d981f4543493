"""The student's own writer, against the model called directly over whole sequences."""

import numpy as np
import pytest
import torch

from student_trainer.config.model import ModelConfig
from student_trainer.errors import RolloutError
from student_trainer.model.load import load_student
from student_trainer.model.speed import compiled
from student_trainer.rollout.engines import hf_sampler
from student_trainer.rollout.engines.draw import draw
from student_trainer.rollout.engines.hf_sampler import HfSampler, Sampling
from student_trainer.rollout.sample import Rollout, RolloutFailure, RolloutPrompt
from student_trainer.schedules import uniforms

V = 300


def student_of(folder, **settings):
    settings = {"dtype": "float32", "lora": {"rank": 4}, "compiled": False} | settings
    student = load_student(ModelConfig(path=str(folder), **settings), seed=0)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:  # new adapters change nothing
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return student


def trained(student):
    return {name: p for name, p in student.model.named_parameters() if p.requires_grad}


def prompts_of(*lengths, step=3):
    rng = np.random.default_rng(5)
    return [
        RolloutPrompt(step, slot, rng.integers(3, V, n).astype(np.int32), f"row {slot}")
        for slot, n in enumerate(lengths)
    ]


@torch.no_grad()
def by_hand(student, prompt, sampling, vocab=V):
    """A completion by whole passes over the sequence so far, one after the other."""
    student.model.eval()
    ids, logp = list(map(int, prompt.token_ids)), []
    for place in range(sampling.max_new_tokens):
        z_1V = student.model(input_ids=torch.tensor([ids])).logits[:, -1, :vocab].float()
        u = uniforms(sampling.seed, "rollout", prompt.step, np.asarray([prompt.slot * 2**20 + place]))
        token_1, logp_1 = draw(z_1V, torch.from_numpy(u), sampling.temperature, sampling.top_p)
        ids.append(int(token_1))
        logp.append(float(logp_1))
        if ids[-1] in sampling.stop_ids:
            return ids[prompt.token_ids.size :], logp, True
    return ids[prompt.token_ids.size :], logp, False


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "glm4", "gemma3_text", "cohere2"])
def test_it_writes_what_whole_passes_write(model_factory, family):
    student = student_of(model_factory(family))
    sampling = Sampling(7, 12, temperature=0.8, top_p=0.95, stop_ids=frozenset(range(40, 80)), likeliest=4, batch=4)
    prompts = prompts_of(5, 17, 2, 9, 5, 30)
    written = HfSampler(student, sampling, V).sample(prompts)
    finished = set()
    for prompt, rollout in zip(prompts, written, strict=True):
        ids, logp, ended = by_hand(student, prompt, sampling)
        assert isinstance(rollout, Rollout) and rollout.prompt is prompt and rollout.version == 0
        assert rollout.token_ids.tolist() == ids and rollout.finished is ended
        np.testing.assert_allclose(rollout.logp_n, logp, atol=1e-4)
        assert rollout.likeliest_nM.shape == (len(ids), 4)
        finished.add(ended)
    assert True in finished  # and with most models False


def test_whole_weights_narrow_passes_and_tied_heads_are_copied(model_factory):
    for settings in ({"lora": None}, {"lora": None, "dtype": "bfloat16"}, {"gradient_checkpointing": True}):
        student = student_of(model_factory("qwen2"), **settings)
        sampler = HfSampler(student, Sampling(0, 6), V)
        (rollout,) = sampler.sample(prompts_of(8))
        student.model.eval()
        with torch.no_grad(), student.computing():
            ids = torch.tensor([[*rollout.prompt.token_ids.tolist(), *rollout.token_ids.tolist()]])
            logp = student.model(input_ids=ids).logits.float().log_softmax(-1)[0, 7:-1]
        wanted = logp.gather(-1, torch.tensor(rollout.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logp_n, wanted, atol=1e-4 if student.narrowed is None else 0.1)


def dtypes_of_one_that_writes_the_same(student, monkeypatch):
    """Holds a sampler with rounded weights against one that casts at every token, to the bit; dtypes of its trained weights by name."""
    others = {name: p + 0.05 * torch.randn_like(p) for name, p in trained(student).items()}

    def written():
        sampler = HfSampler(student, Sampling(1, 10, likeliest=3), V, narrowed=torch.bfloat16)
        first = sampler.sample(prompts_of(8, 3, 12))
        sampler.load(others, 1)
        return sampler, [*first, *sampler.sample(prompts_of(8, 3, 12))]

    sampler, rounded = written()
    with monkeypatch.context() as patched:
        patched.setattr(hf_sampler, "_narrow_products", lambda *_: None)
        for one, other in zip(rounded, written()[1], strict=True):
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_array_equal(one.logp_n, other.logp_n)
    assert all(p.dtype == torch.float32 for p in trained(student).values())
    return {name: p.dtype for name, p in sampler._trained.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_products_round_are_held_rounded(model_factory, monkeypatch, tied):
    student = student_of(model_factory("qwen2", tie_word_embeddings=tied), lora=None)
    found = dtypes_of_one_that_writes_the_same(student, monkeypatch)
    kinds = {name.rsplit(".", 2)[-2]: dtype for name, dtype in found.items()}
    assert kinds["q_proj"] == kinds["down_proj"] == torch.bfloat16
    assert kinds["norm"] == kinds["embed_tokens"] == kinds.get("lm_head", torch.float32) == torch.float32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "targets", "kept"), [
    ("qwen2", "all-linear", ""), ("qwen2", ["q_proj", "lm_head"], "lm_head"), ("qwen3_moe", "all-linear", ".mlp."),
])  # fmt: skip
def test_adapters_are_held_rounded_but_for_those_that_are_added_in_float32(
    model_factory, monkeypatch, family, targets, kept, tied
):
    """The head's adapter is multiplied by our own code, those of experts and of their router by peft, both without autocast."""
    lora = {"rank": 4, "target_modules": targets}
    student = student_of(model_factory(family, tie_word_embeddings=tied), lora=lora)
    for name, dtype in dtypes_of_one_that_writes_the_same(student, monkeypatch).items():
        assert dtype == (torch.float32 if kept and kept in name else torch.bfloat16), name


def test_it_has_weights_of_its_own_until_it_is_given_others(model_factory):
    student = student_of(model_factory("qwen2"))
    sampling = Sampling(1, 10)
    sampler, prompts = HfSampler(student, sampling, V), prompts_of(4, 6)
    before = [rollout.token_ids.tolist() for rollout in sampler.sample(prompts)]
    with torch.no_grad():
        for parameter in trained(student).values():
            parameter.mul_(-2.0)
    assert [rollout.token_ids.tolist() for rollout in sampler.sample(prompts)] == before
    sampler.load(trained(student), 5)
    after = sampler.sample(prompts)
    assert (
        [rollout.token_ids.tolist() for rollout in after]
        == [by_hand(student, p, sampling)[0] for p in prompts]
        != before
    )
    assert {rollout.version for rollout in after} == {5}


def test_frozen_weights_are_shared_and_the_student_is_as_it_was(model_factory):
    student = student_of(model_factory("qwen2"))
    names = set(trained(student))
    student.model.train()
    sampler = HfSampler(student, Sampling(1, 4), V)
    sampler.sample(prompts_of(4))
    assert set(trained(student)) == names and student.model.training
    own = {p.data_ptr() for p in sampler._student.model.parameters()} - {
        p.data_ptr() for p in student.model.parameters()
    }
    assert len(own) == len(names)


def test_a_student_of_compiled_layers_writes_by_plain_ones(model_factory):
    student = student_of(model_factory("qwen2"))
    compiled.install(student.model, backend="eager")
    sampler, (prompt,) = HfSampler(student, Sampling(1, 5), V), prompts_of(6)
    (rollout,) = sampler.sample([prompt])
    assert rollout.token_ids.tolist() == by_hand(student, prompt, Sampling(1, 5))[0]


def test_a_sampler_that_is_closed_stops_before_the_next_token(model_factory):
    sampler = HfSampler(student_of(model_factory("qwen2")), Sampling(1, 5), V)
    sampler.close()
    sampler.close()
    with pytest.raises(RolloutError, match="closed"):
        sampler.sample(prompts_of(6))


def test_company_order_and_step_of_others_change_nothing(model_factory):
    student = student_of(model_factory("llama"))
    prompts = prompts_of(12, 3, 7, 7, 20)
    together = HfSampler(student, Sampling(2, 8, batch=8), V).sample(prompts)
    alone = [HfSampler(student, Sampling(2, 8, batch=1), V).sample([prompt])[0] for prompt in reversed(prompts)]
    assert [r.token_ids.tolist() for r in together] == [r.token_ids.tolist() for r in reversed(alone)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    HfSampler(student, Sampling(2, 8), V).sample(prompts)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_of_one_prompt_differ_by_their_slots_and_read_it_once(model_factory):
    student = student_of(model_factory("qwen2"))
    (prompt,) = prompts_of(9)
    same = [RolloutPrompt(3, slot, prompt.token_ids, "row") for slot in range(6)]
    sampling = Sampling(2, 6)
    sampler = HfSampler(student, sampling, V)
    read = []
    handle = sampler._student.body.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: read.append(args[0].shape)
    )
    written = sampler.sample(same)
    handle.remove()
    assert read[0] == (1, 9) and read[1] == (6, 1)
    assert [r.token_ids.tolist() for r in written] == [by_hand(student, p, sampling)[0] for p in same]
    assert len({tuple(r.token_ids.tolist()) for r in written}) == 6


def test_only_shared_ids_are_drawn(model_factory):
    student = student_of(model_factory("qwen2"))
    (rollout,) = HfSampler(student, Sampling(2, 40, temperature=5.0), 50).sample(prompts_of(4))
    assert rollout.token_ids.max() < 50


def test_a_prompt_that_cannot_be_answered_harms_no_other(model_factory):
    student = student_of(model_factory("qwen2"))
    sampler = HfSampler(student, Sampling(2, 8), V, positions=30)
    good, long, empty = prompts_of(10, 23, 0)
    first, second, third = sampler.sample([long, good, empty])
    assert (
        isinstance(first, RolloutFailure)
        and "23 tokens and on_policy.max_new_tokens=8 are more than the 30" in first.why
    )
    assert isinstance(second, Rollout) and isinstance(third, RolloutFailure)


def test_logits_that_are_no_numbers_are_a_failure_of_their_rows_alone(model_factory):
    student = student_of(model_factory("llama"), lora=None)
    sampler = HfSampler(student, Sampling(2, 8), V)
    weights = trained(student)
    with torch.no_grad():
        student.model.get_input_embeddings().weight[7] = torch.nan
    sampler.load(weights, 1)
    good, bad = prompts_of(6, 6)
    good.token_ids[good.token_ids == 7] = 8
    bad.token_ids[2] = 7
    one, two = sampler.sample([bad, good])
    assert isinstance(one, RolloutFailure) and "after 0 tokens" in one.why
    assert isinstance(two, Rollout)


def test_weights_of_another_student_are_refused(model_factory):
    student = student_of(model_factory("qwen2"))
    sampler = HfSampler(student, Sampling(2, 8), V)
    with pytest.raises(RolloutError, match="1 differ"):
        sampler.load(dict(list(trained(student).items())[1:]), 1)
    wrong = {name: p[:1] for name, p in trained(student).items()}
    with pytest.raises(RolloutError, match="has the shape"):
        sampler.load(wrong, 1)


def test_a_student_whose_cache_changes_its_logits_is_refused(model_factory, monkeypatch):
    student = student_of(model_factory("qwen2"))
    plain = type(student.body).forward
    monkeypatch.setattr(
        type(student.body), "forward",
        lambda self, *args, attention_mask=None, **kwargs: plain(self, *args, **kwargs),
    )  # fmt: skip
    with pytest.raises(RolloutError, match=r"on_policy.engine=hf: .* left padding gives logits that differ"):
        HfSampler(student, Sampling(2, 8), V)
