"""Adapter folders as a student: gone on with, merged, or refused by name; the base is found, or named with the adapter."""

import hashlib
import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from student_trainer.config.model import ModelConfig
from student_trainer.errors import ModelError
from student_trainer.model.load import load_outline, load_student
from student_trainer.training.run import train
from tests.cases.material import case_config

LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def loaded(folder, **changes):
    return load_student(ModelConfig(path=str(folder), **{"dtype": "float32", "lora": None, **changes}), 0)


def logits(student):
    with torch.no_grad():
        return student.head(300).logits(student.states(IDS).flatten(0, 1))


def adapter_of(folder, base, *, lora=LORA, tokenizer=True):
    """A trained adapter in `folder`, and the logits it gives."""
    student = loaded(base, lora=lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    student.save(folder, exported=True)
    if tokenizer:
        student.tokenizer.save_pretrained(folder)
    return logits(student)


@pytest.mark.parametrize("lora", [LORA, {}, None], ids=["same", "default", "merged"])
def test_an_adapter_is_gone_on_with_or_merged(model_factory, tmp_path, lora):
    base = model_factory("llama")
    expected = adapter_of(tmp_path, base)
    student = loaded(tmp_path, lora=lora)
    torch.testing.assert_close(logits(student), expected, atol=1e-5, rtol=0)
    trained = [name for name, parameter in student.model.named_parameters() if parameter.requires_grad]
    if lora is None:
        assert len(trained) == len(list(student.model.named_parameters())) and not any(
            "lora" in name for name in trained
        )
        assert "merged" in student.notes[0]
    else:
        assert trained and all("lora_" in name for name in trained)
        assert "rank 4, alpha 8" in student.notes[0] and str(base) in student.notes[0]
        assert len(trained) == 2 * 2 * 3  # A and B, layers, the adapter's own target modules


def test_what_is_saved_after_going_on_is_an_adapter_of_the_same_base(model_factory, tmp_path):
    base = model_factory("llama")
    adapter_of(tmp_path / "one", base)
    loaded(tmp_path / "one", lora={}).save(tmp_path / "two", exported=True)
    settings = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["r"] == 4
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_tokenizer_comes_from_the_base_if_the_adapter_has_none(model_factory, tmp_path):
    adapter_of(tmp_path, model_factory("llama"), tokenizer=False)
    assert len(loaded(tmp_path, lora={}).tokenizer) == 300
    assert load_outline(ModelConfig(path=str(tmp_path))).vocab_rows == 300


@pytest.mark.parametrize("setting", [{"rank": 3}, {"alpha": 5}, {"target_modules": ["q_proj"]}])
def test_settings_that_say_another_shape_are_refused(model_factory, tmp_path, setting):
    adapter_of(tmp_path, model_factory("llama"))
    with pytest.raises(ModelError, match=rf"model\.lora\.{next(iter(setting))}"):
        loaded(tmp_path, lora=setting)


def changed(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("base", ["/nowhere/base", "../nowhere", ""])
def test_a_base_that_is_missing_is_named_with_its_adapter(model_factory, tmp_path, base):
    adapter_of(tmp_path, model_factory("llama"))
    changed(tmp_path, base_model_name_or_path=base)
    for load in (loaded, lambda folder: load_outline(ModelConfig(path=str(folder)))):
        with pytest.raises(ModelError) as refusal:
            load(tmp_path)
        assert str(tmp_path) in str(refusal.value) and (base or "names no base model") in str(refusal.value)


def test_other_damage_is_named(model_factory, tmp_path):
    base = model_factory("llama")
    adapter_of(tmp_path / "a", base)
    for name, breaks, said in (
        ("kind", lambda f: changed(f, peft_type="PREFIX_TUNING"), "PREFIX_TUNING"),
        ("cut", lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "does not fit"),
        ("gone", lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        ("json", lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        ("chain", lambda f: changed(f, base_model_name_or_path=str(tmp_path / "a")), "an adapter too"),
        ("less", lambda f: keep(f, lambda key: "layers.0" in key), "are missing"),
        ("other", lambda f: changed(f, base_model_name_or_path=str(model_factory("llama", hidden=64))), "does not fit"),
        ("strange", lambda f: changed(f, use_newest_trick=True), "use_newest_trick"),
    ):
        folder = shutil.copytree(tmp_path / "a", tmp_path / name)
        breaks(folder)
        with pytest.raises(ModelError, match=said) as refusal:
            loaded(folder, lora={})
        assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def keep(folder, wanted):
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if wanted(key)}, file)


def test_an_adapter_on_a_tied_head_is_not_merged_into_the_embedding(model_factory, tmp_path):
    expected = adapter_of(tmp_path, model_factory("qwen2"), lora={"rank": 2, "target_modules": ["q_proj", "lm_head"]})
    torch.testing.assert_close(logits(loaded(tmp_path, lora={})), expected, atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="tied"):
        loaded(tmp_path, lora=None)


@pytest.mark.parametrize("second", ["{rank: 4}", "null"])
def test_a_run_of_an_adapter_is_resumed_to_the_same_bits(tmp_path, second):
    quiet = Console(file=io.StringIO(), width=200)
    first = train(case_config(tmp_path, "model.lora={rank: 4}", f"run.output_dir={tmp_path}/first"), console=quiet)
    hashes = []
    for name in ("whole", "halves"):
        config = case_config(
            tmp_path, f"run.output_dir={tmp_path}/{name}", f"model.path={first.output_dir}/final", f"model.lora={second}",
            "train.max_steps=4", "train.save_steps=2",
        )  # fmt: skip
        told = Console(file=io.StringIO(), width=400)
        result = train(config, console=told)
        assert "is an adapter (rank 4, alpha 32) of" in told.file.getvalue()
        if name == "halves":
            shutil.rmtree(result.output_dir / "final")
            shutil.rmtree(result.output_dir / "checkpoint-4")
            (result.output_dir / "result.json").unlink()
            result = train(config, resume=True, console=quiet)
        files = [f for f in (result.output_dir / "final").iterdir() if f.name.endswith("model.safetensors")]
        hashes.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert hashes[0] == hashes[1] and len(hashes[0]) == 1
