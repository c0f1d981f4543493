"""Which models a teacher serves: labels are the model's own logits or it is refused by name; adapters merged; damaged files found early."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from student_trainer.config.model import ModelConfig
from student_trainer.labels.device_transfer import to_torch
from student_trainer.labels.rows_on_device import head_on
from student_trainer.model.load import load_student
from teacher_server.backends import logits
from teacher_server.backends.model_folder import check_local
from teacher_server.backends.transformers.backend import load
from teacher_server.config.backends import TransformersBackend
from teacher_server.config.server import ServerConfig
from teacher_server.control.preflight import check_files
from teacher_server.errors import ServerConfigError
from teacher_wire.core.batch import TokenBatch
from teacher_wire.score.signals import spec_of
from tests.tiny import head_of

CHANGED = [
    "falcon_h1",
    "hyperclovax",
    "recurrent_gemma",
    "granite",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "nanochat",
    "granitemoe",
]
PLAIN = ["glm4", "qwen3_moe", "internlm3", "phi", "llama4_text"]
ROWS = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 7)]


def teacher(folder, dtype="float32"):
    return load(TransformersBackend(model=str(folder), dtype=dtype, device="cpu"), deterministic=False)


def served(model):
    """Logits by `full` and by states and head, as a student computes them."""
    batch = TokenBatch.pack(ROWS)
    full, hidden = model.score([(batch, spec_of("full", 300)), (batch, spec_of("hidden", 300))])
    head = head_on(head_of(model), 300, torch.device("cpu"))
    return to_torch(full["logits_NV"]).float(), head.logits(to_torch(hidden["hidden_ND"])).float()


def direct(model):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in ROWS])


@pytest.mark.parametrize("family", CHANGED + PLAIN)
def test_labels_are_the_models_own_logits(model_factory, family):
    folder = model_factory(family)
    expected = direct(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    model = teacher(folder)
    for found in served(model):
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)
    head = head_of(model)
    assert (head.logit_scale != 1 or head.final_softcap > 0) == (family in CHANGED)


def test_a_soft_cap_of_attention_scores_is_in_the_labels_or_the_model_is_refused(model_factory):
    """transformers' sdpa leaves it out: the labels would be another model's."""
    folder = model_factory("gemma2", attn_logit_softcapping=0.5)
    eager, sdpa = (
        direct(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name).eval())
        for name in ("eager", "sdpa")
    )
    model = teacher(folder)
    for found in served(model):
        torch.testing.assert_close(found, eager, atol=5e-4, rtol=0)
        assert not torch.allclose(found, sdpa, atol=1e-2), "a case that shows nothing"
    config = TransformersBackend(model=str(folder), dtype="float32", device="cpu", attention="sdpa")
    with pytest.raises(ServerConfigError, match=r"attn_logit_softcapping=0\.5.* set attention to auto or eager"):
        load(config, deterministic=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "said"), [("bert", "BertLMHeadModel.*not its head"), ("bert-generation", "tokens that come later")]
)
def test_an_architecture_that_does_more_is_refused_by_name(model_factory, family, said, dtype):
    with pytest.raises(ServerConfigError, match=said):
        teacher(model_factory(family), dtype)


@pytest.mark.parametrize("family", CHANGED)
def test_what_the_table_does_not_know_is_found_by_the_probe(model_factory, monkeypatch, family):
    monkeypatch.setattr(logits, "_SENSES", {})
    with pytest.raises(ServerConfigError, match="its logits are not its head"):
        teacher(model_factory(family))


def test_both_houses_have_the_same_table():
    from student_trainer.model import logit_probe

    assert logits._SENSES == logit_probe._SENSES and logits._OTHERWISE == logit_probe._OTHERWISE


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 128),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
            512,
        ),
    ],
)
def test_the_longest_sequence_is_what_the_model_has_positions_for(model_factory, settings, limit):
    assert teacher(model_factory("llama", **settings)).facts.max_sequence_tokens == limit
    assert logits.position_limit(AutoConfig.for_model("mamba")) == 1 << 20


# ---------------------------------------------------------------- adapters


def adapter_of(folder, base, targets=("q_proj", "down_proj")):
    lora = {"rank": 4, "alpha": 8, "target_modules": list(targets)}
    student = load_student(ModelConfig(path=str(base), dtype="float32", lora=lora), 0)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    student.save(folder, exported=True)
    student.tokenizer.save_pretrained(folder)
    return direct(student.model.eval())


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("llama", ["lm_head"]),
        ("qwen2", ["v_proj", "lm_head"]),
        ("qwen2", ["embed_tokens"]),
    ],
    ids=["layers", "head", "tied_head", "embedding"],
)
def test_an_adapter_is_merged_at_loading(model_factory, tmp_path, family, targets):
    base = model_factory(family)
    expected = adapter_of(tmp_path, base, targets)
    check_local(str(tmp_path))
    model = teacher(tmp_path)
    for found in served(model):
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)
    assert model.facts.fingerprint != teacher(base).facts.fingerprint
    assert model.facts.tokenizer_sha256 == teacher(base).facts.tokenizer_sha256


def changed(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_adapters_that_cannot_be_merged_are_refused_by_name(model_factory, tmp_path):
    adapter_of(tmp_path / "a", model_factory("llama"))
    other = str(model_factory("llama", hidden=64))
    for name, breaks, said in (
        ("gone", lambda f: changed(f, base_model_name_or_path="/gone/base"), "/gone/base"),
        ("kind", lambda f: changed(f, peft_type="IA3"), "IA3"),
        ("chain", lambda f: changed(f, base_model_name_or_path=str(tmp_path / "a")), "an adapter too"),
        ("dora", lambda f: changed(f, use_dora=True), "use_dora"),
        ("other", lambda f: changed(f, base_model_name_or_path=other), "do not fit"),
        ("less", lambda f: less(f), "not both factors"),
    ):
        folder = shutil.copytree(tmp_path / "a", tmp_path / name)
        breaks(folder)
        with pytest.raises(ServerConfigError, match=said) as refusal:
            teacher(folder)
        assert str(folder) in str(refusal.value)


def less(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)


# --------------------------------------------- what is found before anything is started


def config_for(folder, kind="transformers"):
    return ServerConfig.model_validate({"teachers": [{"name": "t", "backend": {"kind": kind, "model": str(folder)}}]})


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("model.safetensors", lambda data: data[:500]),
        ("model.safetensors", lambda data: data[:-1]),
        ("model.safetensors", lambda data: data + b"\0"),
        ("model.safetensors", lambda data: b""),
        ("model.safetensors", lambda data: b"<html>404 Not Found</html>"),
        ("model.safetensors", lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        ("config.json", lambda data: data[:20]),
    ],
    ids=["cut", "one_less", "one_more", "empty", "html", "lfs", "config"],
)
def test_a_damaged_file_is_named_before_anything_is_loaded(model_factory, tmp_path, name, cut):
    folder = shutil.copytree(model_factory("llama"), tmp_path / "m")
    check_files(config_for(folder))
    (folder / name).write_bytes(cut((folder / name).read_bytes()))
    with pytest.raises(ServerConfigError, match=rf"teachers\.t\.backend\.model: .*{name}"):
        check_files(config_for(folder))


def test_a_missing_shard_is_named_before_anything_is_loaded(model_factory, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_factory("llama")).save_pretrained(tmp_path, max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_factory("llama") / name, tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    check_files(config_for(tmp_path))
    shards[1].unlink()
    with pytest.raises(ServerConfigError, match=shards[1].name):
        check_files(config_for(tmp_path))


@pytest.mark.parametrize("family", ["falcon_h1", "hyperclovax", "bert"])
def test_a_head_that_vllm_is_not_known_to_have_is_refused_before_anything_is_started(model_factory, family):
    with pytest.raises(
        ServerConfigError, match=r"backend vllm does not know the head of .*ForCausalLM|BertLMHeadModel"
    ):
        check_files(config_for(model_factory(family), "vllm"))
    check_files(config_for(model_factory("granite"), "vllm"))
