"""Runs against a teacher behind the real wire in this process."""

from __future__ import annotations

import pytest

from student_trainer.config.run import parse_config
from teacher_wire.core.identity import added_tokens, base_tokenizer_sha256, template_sha256, tokenizer_sha256
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve


def fake_for(folder, **changes) -> FakeTeacher:
    """A fake teacher that speaks the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = tokenizer.backend_tokenizer.to_str()
    shape = {"vocab_rows": 300, "hidden_size": 24} | changes
    return FakeTeacher(
        tokenizer_sha256=tokenizer_sha256(written),
        base_tokenizer_sha256=base_tokenizer_sha256(written),
        added_tokens=added_tokens(written),
        chat_template_sha256=template_sha256(tokenizer.chat_template),
        **shape,
    )


def run_config(folder, model, rows, address=None, /, **sections):
    """A small run; sections are merged into the defaults."""
    tree = {
        "run": {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")},
        "model": {"path": str(model), "dtype": "float32", "lora": {"rank": 4, "dropout": 0.1}},
        "data": {"train": [str(rows)], "eval": [f"{rows}#6"], "max_tokens": 100},
        "teacher": {"address": address} if address else None,
        "labels": {"transport": "hidden"},
        "train": {
            "batch_size": 2, "accumulation": 2, "max_steps": 6, "learning_rate": 1e-2, "log_steps": 1, "save_steps": 2,
            "report_to": [],
        },
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = {**(tree.get(name) or {}), **section} if isinstance(section, dict) else section
    return tree


@pytest.fixture
def fake(model_factory):
    return fake_for(model_factory("qwen2"))


@pytest.fixture
def server(fake):
    with serve(fake) as running:
        yield running


@pytest.fixture
def config_of(tmp_path, model_factory, rows_file, server):
    """Sections -> a config against the fake teacher, in a fresh folder."""

    def build(**sections):
        tree = run_config(tmp_path, model_factory("qwen2"), rows_file, server.address, **sections)
        return parse_config(tree, "test")

    return build


@pytest.fixture(scope="session")
def adapter(model_factory, tmp_path_factory):
    """A LoRA adapter that changes what its tiny base says, as a run saves it."""
    import torch

    from student_trainer.config.model import ModelConfig
    from student_trainer.model.load import load_student
    from student_trainer.model.saving import save_student

    folder = tmp_path_factory.mktemp("adapter")
    settings = ModelConfig(path=str(model_factory("qwen2")), dtype="float32", lora={"rank": 4}, compiled=False)
    student = load_student(settings, seed=0)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    save_student(student, folder, exported=True)
    return folder


@pytest.fixture(scope="session")
def run_folder(adapter, model_factory, tmp_path_factory):
    """What a finished run leaves, as far as it is read by those who ask its student."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "final").symlink_to(adapter)
    (folder / "config.yaml").write_text(
        f"run: {{output_dir: {folder}, cache_dir: {folder / 'cache'}}}\nmodel: {{path: {model_factory('qwen2')}, dtype: float32}}\n"
        "data: {train: [rows.jsonl]}\nloss: {output: null, sft_weight: 1.0}\n"
    )
    return folder


@pytest.fixture(scope="session")
def served(model_factory):
    """Address of a teacher with the weights of `model_factory("qwen2", seed=5)`, behind the real engine and the real wire."""
    from teacher_server.config.server import TeacherConfig
    from teacher_server.replica.engine import TeacherEngine
    from tests.e2e.classroom import EngineService

    backend = {
        "kind": "transformers",
        "model": str(model_factory("qwen2", seed=5)),
        "dtype": "float32",
        "device": "cpu",
    }
    engine = TeacherEngine(TeacherConfig.model_validate({"name": "big", "backend": backend, "deterministic": True}))
    service = EngineService(engine)
    with serve(service) as server:
        yield server.address
        service.stop()
